"""The state of the figures of stability and of the published files, not their pixels."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import xarray as xr
from test_figures import ESCAPED, HOSTILE, make_scores, written
from test_official import group_of, overlap_of

from workbench.analysis import needed
from workbench.analysis import recurrence as again
from workbench.analysis.official import official_overlap
from workbench.data.official import read_official
from workbench.errors import InputError
from workbench.figures import counts, official, stability
from workbench.figures.counts import AGAINST
from workbench.figures.template import DIVERGING, DPS, GAP, RANDOM, SEQUENTIAL


def random_scores(examples=24, tasks=("tag",), layers=2, heads=4, users=None):
    pcs = np.random.default_rng(0).normal(size=(examples, layers, heads))
    named = users or [f"u{i // 2}" for i in range(examples)]
    return make_scores(pcs, named, [tasks[i % len(tasks)] for i in range(examples)])


def noise_table(groups=("tag",), ends=0.01):
    """A table as `profile_noise` gives it."""
    shape = (len(groups), 2)
    columns = {"jaccard": [0.8, 0.4], "spearman": [0.9, 0.5], "pcs": [0.02, 0.01]}
    columns |= {"drop": [0.01, 0.02], "cost": [0.1, 0.2]}
    data = {}
    for name, row in columns.items():
        values = np.broadcast_to(row, shape)
        for end, step in (("", 0), ("_low", -ends), ("_high", ends)):
            data[name + end] = (("group", "share"), values + step)
    for end, step in (("", 0), ("_low", -ends), ("_high", ends)):
        data["clean" + end] = ("group", np.full(len(groups), 0.03) + step)
    data["swapped"] = (("group", "share"), np.broadcast_to([0.5, 1.0], shape))
    data |= {name: ("group", [12] * len(groups)) for name in ("examples", "users")}
    coords = {"group": list(groups), "share": [0.4, 1.0]}
    return xr.Dataset(data, coords=coords, attrs={"k": 3, "chance": 0.2, "by": "task"})


def precision_table(rho=0.9, runs=("attribution", "screened")):
    shape = (len(runs), 2)
    data = {
        "precision": (("run", "group"), np.broadcast_to([1.0, 0.75], shape)),
        "spearman": (("run", "group"), np.broadcast_to([rho, 0.5], shape)),
        "compared": (("run", "group"), np.full(shape, 8)),
    }
    coords = {"run": list(runs), "group": ["tag", HOSTILE]}
    return xr.Dataset(data, coords=coords, attrs={"k": 4, "heads": 8, "chance": 0.5})


def strings(value):
    """All text in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from strings(entry)


def heatmaps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def words(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def subtitle(figure):
    return figure.layout.title.subtitle.text


# Examples needed


def test_each_group_has_both_matrices_with_their_values_written():
    table = needed.by_examples(random_scores(tasks=("tag", "rating")), 3)
    figure = counts.example_counts(table)
    maps = heatmaps(figure)
    assert len(maps) == 4
    for panel, (group, name) in enumerate(
        (group, name) for group in ("tag", "rating") for name in ("jaccard", "spearman")
    ):
        assert np.array_equal(maps[panel].z, table[name].sel(group=group), equal_nan=True)
        values = table[name].sel(group=group).values
        for place, text in written(figure)[panel].items():
            assert text == f"{values[place]:.2f}"
        assert len(written(figure)[panel]) == np.isfinite(values).sum() > 0
    assert figure.layout.xaxis.ticktext == ("1", "2", "5", "10", "all")
    assert figure.layout.yaxis.range == (4.5, -0.5)
    assert "agree with them by construction" in subtitle(figure)
    assert "<b>rating</b>, n = 12: Jaccard of the sets" in words(figure)


def test_both_ways_of_agreeing_are_drawn_beside_chance():
    table = needed.by_examples(random_scores(), 3)
    figure = counts.example_counts(table)
    lines = [line for line in figure.data if line.name in [words for _, words, _, _ in AGAINST]]
    assert np.allclose(lines[0].y, table["to_all"].values[0, :-1])
    assert np.allclose(lines[1].y, table["apart"].values[0, :-1], equal_nan=True)
    up = table["to_all_high"].values - table["to_all"].values
    assert np.allclose(lines[0].error_y.array, up[0, :-1])
    (line,) = figure.layout.shapes
    assert (line.y0, line.y1, line.line.color) == (*[table.attrs["chance"]] * 2, RANDOM)


def test_values_are_not_written_where_they_do_not_fit():
    table = needed.by_examples(random_scores(24), 3, counts=range(1, 20))
    assert not written(counts.example_counts(table))


def test_cells_that_were_left_out_are_blank():
    scores = make_scores(
        np.random.default_rng(0).normal(size=(9, 2, 4)), list("abcabcabc"), ["x"] * 2 + ["y"] * 7
    )
    first = heatmaps(counts.example_counts(needed.by_examples(scores, 3)))[0]
    assert np.isnan(first.z[2]).all()
    assert set(first.hovertext[2]) == {""}


def test_a_single_example_says_that_there_is_nothing_to_leave_out():
    figure = counts.example_counts(needed.by_examples(random_scores(1), 3))
    assert any("too few examples" in text for text in words(figure))


def test_negative_correlations_get_a_scale_centred_at_zero():
    turned = [group_of("a", [[1, 2], [3, 4]], 2), group_of("b", [[4, 3], [2, 1]], 2)]
    axis = counts.example_counts(overlap_of(*turned)).layout.coloraxis2
    assert (axis.cmin, axis.cmax, axis.colorscale[0][1]) == (-1, 1, DIVERGING[0])
    axis = counts.example_counts(overlap_of(turned[0])).layout.coloraxis2
    assert (axis.cmin, axis.cmax, axis.colorscale[0][1]) == (0, 1, SEQUENTIAL[0])


def test_published_groups_are_drawn_with_what_they_share():
    mean = [[1, 0.5], [0.25, 0]]
    a = group_of("k1", mean, 2, scores=[mean])
    b = group_of("k2", mean, 2, scores=[mean, mean], examples=2)
    figure = counts.example_counts(overlap_of(a, b))
    assert len(heatmaps(figure)) == 2
    assert (
        "k1 and k2<br><b>Jaccard of the sets 1.0000</b><br>1 example in both"
        in (heatmaps(figure)[0].hovertext[0])
    )
    assert "means over 1 to 2 examples" in subtitle(figure)


def test_the_published_matrix_is_drawn_in_every_digit(shared):
    folder = shared / "official"
    if not folder.is_dir():
        pytest.skip("no folder `official` with the authors' score files in the shared data")
    figure = counts.example_counts(official_overlap(read_official(folder), "LaMP-1"))
    for trace, file in zip(heatmaps(figure), ("headset_jaccard", "pcs_spearman"), strict=True):
        with (folder / f"{file}.csv").open(newline="") as opened:
            _, *rows = csv.reader(opened)
        for row, hover in zip(rows, trace.hovertext, strict=True):
            digits = [text.split("</b>")[0].rsplit(" ", 1)[1] for text in hover]
            assert digits == row[1:]


# Found again


def test_shares_and_the_set_of_all_examples_are_drawn():
    table = again.recurrence(random_scores(tasks=("tag", "rating")), 3, draws=50)
    figure = stability.recurrence(table)
    dots = [trace for trace in figure.data if trace.type == "scatter"]
    for panel, group in enumerate(("tag", "rating")):
        part = table.sel(group=group)
        assert np.array_equal(heatmaps(figure)[panel].z, part["share"])
        marked = {(int(y), int(x)) for x, y in zip(dots[panel].x, dots[panel].y, strict=True)}
        assert marked == {tuple(place) for place in np.argwhere(part["member"].values == 1)}
    assert [dot.showlegend for dot in dots] == [True, False]
    share = float(table["share"].sel(group="tag")[1, 2])
    assert f"<b>L1H2</b> in {share:.1%} of resamples" in heatmaps(figure)[0].hovertext[1][2]
    assert "share of 50 resamples of the users" in subtitle(figure)


def test_a_single_user_is_said_to_be_one_and_absent_heads_stay_grey():
    scores = random_scores(5, users=["a"] * 5)
    figure = stability.recurrence(again.recurrence(scores, 3))
    assert any("a single user" in text for text in words(figure))
    assert figure.layout.plot_bgcolor == GAP
    assert set(heatmaps(figure)[0].hovertext[0]) == {""}


# Strangers' items


def test_curves_begin_at_the_clean_scores_with_a_hollow_mark():
    figure = stability.profile_noise(noise_table())
    overlap, score, cost = figure.data[:3]
    assert list(overlap.y) == [1, 0.8, 0.4]
    assert list(score.y) == [0.03, 0.02, 0.01]
    assert list(cost.y) == [0, 0.1, 0.2]
    assert list(score.x) == [0, 0.5, 1.0]
    assert score.marker.color == ("white", DPS, DPS)
    assert np.allclose(score.error_y.array, 0.01)
    assert overlap.error_y.array[0] is None
    assert figure.layout.shapes[0].y0 == 0.2


def test_without_intervals_there_are_no_whiskers_and_the_figure_says_so():
    figure = stability.profile_noise(noise_table(ends=np.nan))
    assert set(figure.data[1].error_y.array) == {None}
    assert "no intervals: a single user" in subtitle(figure)


# Cheaper scores


def test_each_run_has_its_colour_and_a_place_on_each_groups_line():
    figure = stability.precision(precision_table())
    runs = [trace for trace in figure.data if trace.mode == "markers"]
    assert [trace.name for trace in runs] == ["attribution", "screened"] * 2
    assert [list(trace.x) for trace in runs] == [[1, 0.75]] * 2 + [[0.9, 0.5]] * 2
    assert runs[0].marker.color == runs[2].marker.color != runs[1].marker.color
    assert all(round(y) == place for trace in runs for place, y in enumerate(trace.y))
    assert figure.layout.shapes[0].x0 == 0.5
    assert figure.layout.xaxis2.range[0] > -0.1
    assert stability.precision(precision_table(rho=-0.4)).layout.xaxis2.range[0] < -1


# Published files


def test_bars_add_up_to_the_heads_at_the_cut_and_to_all_scores():
    mean = [[1, 0.5], [0.5, 0.5]]
    table = overlap_of(
        group_of("k1", mean, 2, scores=[[[1, 1 / 64], [0, 0.5]]]),
        group_of("global", mean, 3, examples=4),
    )
    figure = official.resolution(table)
    assert [list(trace.x) for trace in figure.data[:3]] == [[1, 1], [1, 2], [2, 1]]
    first = [trace.x[0] for trace in figure.data[3:]]
    assert first == [0.25, 0.5, 0.25]
    assert np.isnan([trace.x[1] for trace in figure.data[3:]]).all()
    assert "not published; the sums are multiples of 1" in words(figure)
    assert "all multiples of 1/64 nat" in subtitle(figure)
    assert figure.layout.barmode == "stack"


def test_files_without_any_step_claim_none():
    table = overlap_of(group_of("k1", [[0.1, 0.2], [0.3, 0.7]], 2, examples=3))
    figure = official.resolution(table)
    assert "not published" in words(figure)
    assert "multiples of 1/" not in subtitle(figure)


# All of them


def published(name):
    mean = [[1, 0.5], [0.25, 0]]
    return overlap_of(group_of(name, mean, 2, scores=[mean]))


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (counts.example_counts, lambda: needed.by_examples(random_scores(tasks=(HOSTILE,)), 3)),
        (counts.example_counts, lambda: published(HOSTILE)),
        (stability.recurrence, lambda: again.recurrence(random_scores(tasks=(HOSTILE,)), 3)),
        (stability.profile_noise, lambda: noise_table((HOSTILE,))),
        (stability.precision, precision_table),
        (official.resolution, lambda: published(HOSTILE)),
    ],
)
def test_names_from_data_are_shown_as_text(draw, table):
    shown = list(strings(json.loads(draw(table()).to_json())))
    assert not [text for text in shown if "<a href" in text or "$x$" in text]
    assert [text for text in shown if ESCAPED in text]


@pytest.mark.parametrize(
    ("draw", "make"),
    [
        (counts.example_counts, lambda s: needed.by_examples(s, 3, by="user")),
        (stability.recurrence, lambda s: again.recurrence(s, 3, by="user")),
        (stability.profile_noise, lambda _: noise_table([f"u{i}" for i in range(12)])),
    ],
)
def test_of_many_groups_the_first_are_drawn_and_the_rest_counted(draw, make):
    table = make(random_scores(24))
    assert "the first 2 of 12 groups; " in subtitle(draw(table, limit=2))
    with pytest.raises(InputError, match="nothing to draw of 12 groups with limit=0"):
        draw(table, limit=0)
