"""The state of the figures, not their pixels; and the files that they become."""

from __future__ import annotations

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from workbench import figures
from workbench.analysis.overlap import jaccard
from workbench.errors import InputError
from workbench.figures.marks import WRITTEN
from workbench.figures.template import DPS, GAP, PLAIN, RANDOM
from workbench.heads import HeadSet
from workbench.scores import HeadScores

HOSTILE = '<a href="http://x.example/">$x$</a> & <b>y</b>'
ESCAPED = '&lt;a href="http://x.example/"&gt;&#36;x&#36;&lt;/a&gt; &amp; &lt;b&gt;y&lt;/b&gt;'


def make_scores(pcs, users, tasks=None):
    """Scores of given values [example, layer, head]."""
    pcs = np.asarray(pcs, dtype=np.float32)
    count, layers, heads = pcs.shape
    data = xr.Dataset(
        {
            "pcs": (("example", "layer", "head"), pcs),
            "nll": ("example", np.ones(count, np.float32)),
            "target_tokens": ("example", np.ones(count, np.int32)),
        },
        coords={
            "example": [f"e{i}" for i in range(count)],
            "user": ("example", list(users)),
            "task": ("example", list(tasks or ["tag"] * count)),
            "layer": np.arange(layers),
            "head": np.arange(heads),
        },
        attrs={"units": "nats/token", "sign": "ablated - full"},
    )
    return HeadScores(data, {})


def random_scores(users=3, layers=2, heads=4, per_user=4, seed=0):
    rng = np.random.default_rng(seed)
    pcs = rng.normal(0.02, 0.05, (users * per_user, layers, heads))
    names = np.repeat([f"u{i}" for i in range(users)], per_user)
    return make_scores(pcs, names, ["tag", "rating"] * (len(names) // 2))


def make_sweep(k=(1, 4), tasks=("tag", "rating"), interval=0.05, draws=3):
    """A table as `sweep_head_count` gives it; DPS gains .02 at the first K and .1 elsewhere."""
    shape = (len(tasks), len(k))
    gain = np.full(shape, 0.1)
    gain[:, 0] = 0.02
    columns = {
        "dps": 0.6 + gain,
        "random": np.full(shape, 0.55),
        "gain": gain,
        "edge": gain + 0.05,
        "beaten": np.full(shape, 2),
    }
    data = {}
    for name, mean in columns.items():
        data[name] = (("task", "k"), mean)
        data[f"{name}_low"] = (("task", "k"), mean - interval)
        data[f"{name}_high"] = (("task", "k"), mean + interval)
    sizes = np.array(k, dtype=float)
    nested = np.minimum.outer(sizes, sizes) / np.maximum.outer(sizes, sizes)
    return xr.Dataset(
        {
            **data,
            "plain": ("task", np.full(len(tasks), 0.6)),
            "plain_low": ("task", np.full(len(tasks), 0.6 - interval)),
            "plain_high": ("task", np.full(len(tasks), 0.6 + interval)),
            "random_draws": (("task", "k", "draw"), np.full((*shape, draws), 0.55)),
            "nested": (("task", "k", "other"), np.stack([nested] * len(tasks))),
            "ties": (("task", "k"), np.zeros(shape, int)),
            "heads": (("task", "k"), np.full(shape, "L0H1, L1H0")),
            "examples": ("task", [12] * len(tasks)),
            "users": ("task", [6] * len(tasks)),
            "metric": ("task", ["accuracy", "mean absolute error"][: len(tasks)]),
            "better": ("task", ["higher", "lower"][: len(tasks)]),
            "kind": ("task", ["classification", "rating"][: len(tasks)]),
        },
        coords={"task": list(tasks), "k": list(k), "other": list(k), "draw": np.arange(draws)},
        attrs={
            "gamma": 0.5,
            "draws": draws,
            "seed": 0,
            "level": 0.95,
            "heads_from": "other users",
        },
    )


def make_overlap(names=("a", "b", "c"), **attrs):
    sets = [HeadSet.parse(f"L0H{i} L0H{i + 1} L1H0") for i in range(len(names))]
    table = jaccard(dict(zip(names, sets, strict=True)))
    table.attrs.update(attrs)
    return table


def references(**changed):
    return {
        "by": "user",
        "mean": 0.4,
        "chance": 0.1,
        "layer_chance": 0.2,
        "same": 0.6,
        "others": 0.5,
    } | {**changed}


def titles(figure):
    title = figure.layout.title
    return f"{title.text} {title.subtitle.text}"


def notes(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def traces(figure, kind):
    return [trace for trace in figure.data if isinstance(trace, kind)]


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def written(figure):
    """The values in the cells of each heatmap that has any, {(row, column): text}."""
    return [
        {(y, x): text for x, y, text in zip(trace.x, trace.y, trace.text, strict=True)}
        for trace in named(figure, WRITTEN)
    ]


def ends(error):
    """Plotly's error bars as (up, down), NaN for none."""
    return tuple(np.array(e, dtype=float) for e in (error.array, error.arrayminus))


# Heatmaps


def test_all_users_share_one_scale_centred_at_zero():
    scores = random_scores()
    figure = figures.user_heatmaps(scores)
    axis = figure.layout.coloraxis
    panels = traces(figure, go.Heatmap)
    assert [panel.coloraxis for panel in panels] == ["coloraxis"] * 3
    # An own limit would override the shared axis.
    assert all(panel.zmin is None and panel.zmax is None for panel in panels)
    assert axis.cmid == 0
    assert axis.cmin == -axis.cmax
    assert axis.cmax == pytest.approx(np.abs(scores.mean("user")["mean"].values).max())
    middle = axis.colorscale[len(axis.colorscale) // 2]
    assert tuple(middle) == (0.5, "#ffffff")


def test_scale_of_scores_that_are_all_zero_has_an_extent():
    axis = figures.user_heatmaps(make_scores(np.zeros((2, 1, 2)), "ab")).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-1, 1)


def test_colour_bar_names_the_unit():
    bar = figures.user_heatmaps(random_scores()).layout.coloraxis.colorbar
    assert bar.title.text == "PCS (nats per target token)"


def test_layers_go_up_and_heads_to_the_right():
    figure = figures.user_heatmaps(make_scores([[[1, 2, 3], [4, 5, 6]]], ["u"]))
    assert np.asarray(figure.data[0].z).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tuple(figure.layout.yaxis.range) == (-0.5, 1.5)
    assert tuple(figure.layout.xaxis.range) == (-0.5, 2.5)
    assert figure.layout.yaxis.title.text == "layer"
    assert figure.layout.xaxis.title.text == "head"


def test_title_says_how_many_users_of_how_many():
    figure = figures.user_heatmaps(random_scores(users=5), limit=2)
    assert len(traces(figure, go.Heatmap)) == 2
    assert "first 2 of 5 users" in titles(figure)
    assert notes(figure) == ["u0", "u1"]


@pytest.mark.parametrize(("by", "number"), [("user", 3), ("task", 2), ("all", 1)])
def test_there_is_one_heatmap_a_group(by, number):
    figure = figures.user_heatmaps(random_scores(), by)
    assert len(traces(figure, go.Heatmap)) == number


def test_hover_names_head_mean_interval_and_number_of_examples():
    scores = random_scores()
    cell = scores.mean("user").sel(group="u1", layer=1, head=3)
    text = traces(figures.user_heatmaps(scores), go.Heatmap)[1].hovertext[1][3]
    assert "L1H3" in text
    assert "4 examples" in text
    assert f"{float(cell['mean']):+.4f}" in text
    assert f"[{float(cell['low']):+.4f}, {float(cell['high']):+.4f}]" in text


def test_missing_head_is_a_gap_that_the_title_explains():
    pcs = np.full((4, 2, 3), 0.1)
    pcs[:, 1, 2] = np.nan
    figure = figures.user_heatmaps(make_scores(pcs, "aabb"))
    assert np.isnan(np.asarray(figure.data[0].z)[1, 2])
    assert figure.data[0].hovertext[1][2] == ""
    assert "no such head" in titles(figure)
    assert figure.layout.plot_bgcolor == GAP
    assert "no such head" not in titles(figures.user_heatmaps(random_scores()))


def test_ticks_of_a_large_model_are_few_integers():
    figure = figures.user_heatmaps(random_scores(users=10, layers=32, heads=32, per_user=2))
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert 4 <= len(axis.tickvals) <= 10
        assert all(isinstance(tick, int) for tick in axis.tickvals)


def test_heatmaps_of_many_users_stay_as_wide_as_the_page():
    many = figures.user_heatmaps(random_scores(users=12), limit=12)
    assert many.layout.width <= 960
    rows = {trace.yaxis for trace in many.data}
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("scores", "limit"),
    [
        (random_scores(), 0),
        (make_scores(np.zeros((0, 2, 2)), []), 10),
        (make_scores(np.full((1, 2, 2), np.nan), ["u"]), 10),
    ],
)
@pytest.mark.parametrize("draw", [figures.user_heatmaps, figures.ranked_heads])
def test_nothing_to_draw_is_refused(draw, scores, limit):
    with pytest.raises(InputError, match=r"score at least one example|at least 1 head"):
        draw(scores, limit=limit)


# Ranking


def test_ranked_heads_descend_from_the_top_with_their_intervals():
    scores = random_scores()
    dots = figures.ranked_heads(scores, limit=3).data[0]
    table = scores.mean("all").sel(group="all")
    assert list(dots.customdata) == [str(head) for head in scores.top(3, "all")["all"]]
    assert list(dots.x) == sorted(table["mean"].values.ravel(), reverse=True)[:3]
    assert list(dots.y) == sorted(dots.y, reverse=True)
    best = scores.top(1, "all")["all"].heads[0]
    cell = table.sel(layer=best.layer, head=best.head)
    up, down = ends(dots.error_x)
    assert dots.x[0] + up[0] == pytest.approx(float(cell["high"]))
    assert dots.x[0] - down[0] == pytest.approx(float(cell["low"]))


def test_ranking_draws_the_line_at_zero_though_all_scores_are_above():
    axis = figures.ranked_heads(make_scores(np.full((2, 1, 2), 0.3), "ab")).layout.xaxis
    assert axis.zeroline
    assert axis.rangemode == "tozero"


def test_ranking_of_one_user_has_no_whiskers_and_says_why():
    figure = figures.ranked_heads(random_scores(users=1))
    up, down = ends(figure.data[0].error_x)
    assert np.isnan(up).all()
    assert np.isnan(down).all()
    assert "only one user" in titles(figure)
    assert "no interval" in figure.data[0].hovertext[0]


def test_ranking_leaves_out_heads_that_are_not_there():
    pcs = np.full((2, 1, 3), 0.1)
    pcs[:, 0, 1] = np.nan
    figure = figures.ranked_heads(make_scores(pcs, "ab"))
    assert list(figure.data[0].customdata) == ["L0H0", "L0H2"]
    assert "highest 2 of 2" in titles(figure)


def test_ranking_of_a_group_without_scores_is_empty():
    pcs = np.full((2, 1, 2), 0.1)
    pcs[1] = np.nan
    figure = figures.ranked_heads(make_scores(pcs, "ab"), "user")
    assert [len(trace.x) for trace in figure.data] == [2, 0]


# Overlap


def test_diagonal_is_blank_and_the_scale_goes_from_zero_to_one():
    table = make_overlap()
    figure = figures.overlap(table)
    z = np.asarray(figure.data[0].z)
    assert np.isnan(np.diag(z)).all()
    others = ~np.eye(3, dtype=bool)
    assert (z[others] == table.values[others]).all()
    assert (table.values.diagonal() == 1).all()  # the caller's table stays
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert figure.layout.coloraxis.colorbar.title.text == "Jaccard"


def test_overlap_title_says_k_and_the_number_of_users():
    assert "K = 3, 3 users" in titles(figures.overlap(make_overlap(**references())))
    mixed = jaccard({"a": HeadSet.parse("L0H1"), "b": HeadSet.parse("L0H1 L0H2 L0H3")})
    assert "K = 1 to 3, 2 sets" in titles(figures.overlap(mixed))


@pytest.mark.parametrize(("number", "fit"), [(16, True), (17, False)])
def test_values_are_written_in_at_most_sixteen_sets(number, fit):
    figure = figures.overlap(make_overlap([f"u{i}" for i in range(number)]))
    assert [len(one) for one in written(figure)] == [number * (number - 1)] * fit


def test_overlap_stands_beside_chance_and_halves_of_the_examples():
    figure = figures.overlap(make_overlap(**references()))
    dots = [trace for trace in traces(figure, go.Scatter) if trace.xaxis == "x2"]
    drawn = {dot.name: dot.x[0] for dot in dots}
    assert drawn == {
        "mean over all pairs": 0.4,
        "halves of one user's examples": 0.6,
        "halves of two users' examples": 0.5,
        "chance, as many heads in each layer": 0.2,
        "chance, any heads": 0.1,
    }


def test_overlap_without_references_has_one_panel():
    figure = figures.overlap(make_overlap())
    assert {trace.xaxis for trace in figure.data} == {"x"}
    assert "xaxis2" not in figure.layout.to_plotly_json()


@pytest.mark.parametrize("absent", [float("nan"), None])
def test_reference_that_cannot_be_had_is_said_to_be_so(absent):
    figure = figures.overlap(make_overlap(**references(same=absent)))
    assert "halves of one user's examples:<br>cannot be had" in notes(figure)
    assert [trace.xaxis for trace in traces(figure, go.Scatter)].count("x2") == 4


def test_overlap_of_one_set_says_that_there_is_no_pair():
    assert "one set, no pair to compare" in notes(figures.overlap(make_overlap(["a"])))


def test_numbers_and_dates_as_names_do_not_become_an_axis_of_numbers_or_dates():
    axis = figures.overlap(make_overlap(["17", "3", "2020-01-01"])).layout.xaxis
    assert list(axis.ticktext) == ["17", "3", "2020-01-01"]
    assert list(axis.tickvals) == [0, 1, 2]


# Sweep


def test_axis_of_k_is_logarithmic_with_the_measured_k_as_ticks():
    axis = figures.head_count(make_sweep(k=(1, 3, 8))).layout.xaxis
    assert axis.type == "log"
    assert list(axis.tickvals) == [1, 3, 8]
    assert axis.range[0] < 0
    assert axis.range[1] > np.log10(8)


def test_axis_of_the_metric_says_which_way_is_better():
    layout = figures.head_count(make_sweep()).layout
    assert layout.yaxis.title.text == "accuracy<br>(higher is better)"
    assert layout.yaxis3.title.text == "mean absolute error<br>(lower is better)"


def test_plain_random_and_dps_keep_their_colours():
    figure = figures.head_count(make_sweep())
    assert {t.line.color for t in named(figure, "DPS")} == {DPS}
    assert {t.line.color for t in named(figure, "random heads, mean")} == {RANDOM}
    assert {t.line.color for t in named(figure, "plain model") if t.line.color} == {PLAIN}


def test_legend_names_each_curve_once_for_all_tasks():
    shown = [t.name for t in figures.head_count(make_sweep()).data if t.showlegend]
    assert sorted(shown) == ["DPS", "each random set", "plain model", "random heads, mean"]


def test_dps_and_random_have_their_intervals_as_whiskers():
    figure = figures.head_count(make_sweep(interval=0.05))
    for name in ("DPS", "random heads, mean"):
        for trace in named(figure, name):
            assert np.allclose(ends(trace.error_y), 0.05)


def test_every_random_set_is_a_point():
    points = named(figures.head_count(make_sweep(k=(1, 4), draws=5)), "each random set")
    assert [len(trace.y) for trace in points] == [10, 10]


def test_dps_is_filled_only_where_the_paired_gain_leaves_zero_out():
    curve = named(figures.head_count(make_sweep(k=(1, 4), interval=0.05)), "DPS")[0]
    assert list(curve.marker.color) == ["white", DPS]


def test_loss_that_leaves_zero_out_is_filled_too():
    table = make_sweep()
    for name in ("gain", "gain_low", "gain_high"):
        table[name] = -table[name]
    table["gain_low"], table["gain_high"] = table["gain_high"], table["gain_low"]
    assert list(named(figures.head_count(table), "DPS")[0].marker.color) == ["white", DPS]


def test_missing_intervals_are_not_drawn_as_points():
    figure = figures.head_count(make_sweep(interval=float("nan")))
    for name in ("DPS", "random heads, mean"):
        assert np.isnan(ends(named(figure, name)[0].error_y)).all()
    assert all(trace.fill is None for trace in traces(figure, go.Scatter))
    assert "no intervals" in titles(figure)
    assert "no interval" in named(figure, "DPS")[0].hovertext[0]


def test_band_of_the_plain_model_spans_its_interval():
    band = next(t for t in figures.head_count(make_sweep(interval=0.05)).data if t.fill)
    assert (min(band.y), max(band.y)) == pytest.approx((0.55, 0.65))


def test_hover_gives_the_paired_differences_and_the_heads():
    text = named(figures.head_count(make_sweep()), "DPS")[0].hovertext[1]
    assert "minus plain: +0.100, 95 % [+0.050, +0.150]" in text
    assert "better than 2 of 3 random sets" in text
    assert "L0H1, L1H0" in text


def test_nested_overlaps_are_written_on_a_scale_from_zero_to_one():
    figure = figures.head_count(make_sweep(k=(1, 4)))
    matrices = traces(figure, go.Heatmap)
    assert len(matrices) == 2
    assert np.asarray(matrices[0].z).tolist() == [[1, 0.25], [0.25, 1]]
    assert written(figure)[0] == {(0, 0): "1.00", (0, 1): "0.25", (1, 0): "0.25", (1, 1): "1.00"}
    assert list(figure.layout.xaxis2.ticktext) == ["1", "4"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_sweep_title_gives_gamma_users_and_whose_heads():
    text = titles(figures.head_count(make_sweep()))
    assert "γ = 0.5, 6 users" in text
    assert "heads found on other users" in text
    assert "3 draws" in text


def test_sweep_of_one_k_and_one_task_has_room_around_its_point():
    figure = figures.head_count(make_sweep(k=(4,), tasks=("tag",)))
    low, high = figure.layout.xaxis.range
    assert low < np.log10(4) < high
    assert len(traces(figure, go.Heatmap)) == 1


# Text from data


def hostile_figures():
    users = [HOSTILE, HOSTILE, "b", "b"]
    scores = make_scores(np.full((4, 2, 2), 0.1), users, users)
    return {
        "heatmaps": figures.user_heatmaps(scores),
        "ranking": figures.ranked_heads(scores, "user"),
        "overlap": figures.overlap(make_overlap([HOSTILE, "b"])),
        "sweep": figures.head_count(make_sweep(tasks=(HOSTILE, "b"))),
    }


def strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", ["heatmaps", "ranking", "overlap", "sweep"])
def test_names_from_data_are_shown_as_text_not_read_as_html_or_tex(name):
    texts = strings(json.loads(hostile_figures()[name].to_json()))
    assert any("&lt;a" in text for text in texts)
    assert not [text for text in texts if "<a" in text or "$" in text]
    if name != "sweep":  # which has the name in a title only, where it is shortened
        assert any(ESCAPED in text for text in texts)


def test_shortened_names_keep_both_ends_and_whole_entities():
    figure = figures.overlap(make_overlap(["user-" + "&" * 40 + "-0017", "b"]))
    short = figure.layout.xaxis.ticktext[0]
    assert short.startswith("user-")
    assert short.endswith("-0017")
    assert "…" in short
    assert not re.search(r"&(?!amp;)", short)


def test_page_cannot_be_closed_by_a_name():
    page = figures.overlap(make_overlap(["</script><script>alert(1)</script>", "b"])).to_html(
        include_plotlyjs=False
    )
    assert "<script>alert" not in page
