"""Figures 5 and 8 from tables made by hand: what is drawn, marked and said."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from test_figures import ESCAPED, HOSTILE, notes, titles, traces, written

from workbench import tables
from workbench.analysis.arms import ARMS, MAPS, ROUTED
from workbench.figures.routing import routing
from workbench.figures.template import GAP
from workbench.figures.weights import head_weights

TASKS = ("tag", "rating")


def make_routing(tasks=TASKS, clusters=3, draws=5, users=6, **edges):
    """A table as `routing_gain` gives it; `edges` maps an arm to the mean and p of its edge."""
    shape = (len(tasks), len(ARMS))
    spread = 0.02 if users > 1 else np.nan
    columns = {"value": np.full(shape, 0.6), "gain": np.full(shape, 0.0)}
    columns["edge"] = np.zeros(shape)
    p = np.ones(shape)
    for name, (mean, value) in edges.items():
        at = ARMS.index(name.replace("_", "-"))
        columns["edge"][:, at], p[:, at] = mean, value
        columns["value"][:, at] += mean
    data = {}
    for name, mean in columns.items():
        data[name] = (("task", "arm"), mean)
        data[f"{name}_low"] = (("task", "arm"), mean - spread)
        data[f"{name}_high"] = (("task", "arm"), mean + spread)
    entropy, temperature = np.full(shape, np.nan), np.full(shape, np.nan)
    if clusters > 1:
        entropy[:, [ARMS.index(arm) for arm in ROUTED]] = 0.0, 0.996, 0.5
        temperature[:, [ARMS.index(arm) for arm in ROUTED[1:]]] = 1.0, 0.05
    p[:, 0] = np.nan
    return xr.Dataset(
        {
            **data,
            "gain_p": (("task", "arm"), p.copy()),
            "edge_p": (("task", "arm"), np.where(np.arange(len(ARMS)) < 2, np.nan, p)),
            "beaten": (("task", "arm"), np.tile([*[np.nan] * 5, 3.0, 3.0, 3.0], (len(tasks), 1))),
            "draw_values": (("task", "arm", "draw"), np.full((*shape, draws), 0.55)),
            "entropy": (("task", "arm"), entropy),
            "cosine": (("task", "arm"), np.where(np.isnan(entropy), np.nan, 0.9998)),
            "uniform": (("task", "arm"), entropy >= 0.99),
            "temperature": (("task", "arm"), temperature),
            "clusters": ("task", [clusters] * len(tasks)),
            "sizes": ("task", [", ".join(["4"] * clusters)] * len(tasks)),
            "idle": ("task", [0] * len(tasks)),
            "heads": ("task", [2] * len(tasks)),
            "discovery_users": ("task", [4 * clusters] * len(tasks)),
            "examples": ("task", [12] * len(tasks)),
            "users": ("task", [users] * len(tasks)),
            "metric": ("task", (["accuracy", "mean absolute error"] * 3)[: len(tasks)]),
            "better": ("task", (["higher", "lower"] * 3)[: len(tasks)]),
        },
        coords={"task": list(tasks), "arm": list(ARMS), "draw": np.arange(draws)},
        attrs={
            **{"size": 4, "share": 0.1, "power": 1.0, "temperature": 1.0, "target": 0.5},
            **{"embedder": "tfidf", "gamma": 0.5, "draws": draws, "seed": 0, "level": 0.95},
        },
    )


def make_weights(table, layers=2, heads=4, absent=()):
    """Weights as `weight_controls` gives them: the second map mirrors the first, the third is 1."""
    first = np.zeros((layers, heads))
    first[0, 1], first[1, 2] = 1.0, 0.25
    for place in absent:
        first[place] = np.nan
    maps = np.stack([first, first[:, ::-1], np.ceil(first)])
    found = table.sel(arm=list(MAPS)).rename(arm="map")
    found = found[[n for n in found if n.startswith(("value", "gain", "edge"))]].merge(
        table[["metric", "better", "examples", "users"]]
    )
    every = np.stack([maps] * table.sizes["task"])
    found["weight"] = (("task", "map", "layer", "head"), every)
    found.attrs = table.attrs
    return found.assign_coords(layer=np.arange(layers), head=np.arange(heads))


# Figure 8


def test_every_arm_has_a_bar_of_its_value_with_its_whisker():
    table = make_routing(hard=(0.1, 0.01), random_clusters=(-0.05, 1.0))
    bars = traces(routing(table), go.Bar)[0::2]
    assert len(bars) == 2
    for bar in bars:
        np.testing.assert_allclose(bar.y, [0.6, 0.6, 0.7, 0.6, 0.6, 0.55])
        np.testing.assert_allclose(bar.error_y.array, 0.02)
        assert "minus global: +0.100, 95 % [+0.080, +0.120], Holm p 0.010" in bar.hovertext[2]
    assert len(set(bars[0].marker.color)) == 6


@pytest.mark.parametrize(
    ("edge", "filled"),
    [((0.1, 0.04), True), ((-0.1, 0.04), True), ((0.1, 0.06), False), ((0.01, 0.04), False)],
)
def test_a_difference_is_filled_where_its_interval_leaves_0_out_and_survives_correction(
    edge, filled
):
    dots = traces(routing(make_routing(soft=edge)), go.Scatter)[0]
    assert dots.y == pytest.approx((0, edge[0], 0, 0))
    assert [color != "white" for color in dots.marker.color] == [False, filled, False, False]


def test_entropies_are_drawn_and_a_uniform_one_says_so():
    entropies = traces(routing(make_routing()), go.Bar)[1]
    assert entropies.y == pytest.approx((0, 0.996, 0.5))
    assert entropies.text == ("0.000", "0.996<br>uniform", "0.500")
    assert "temperature 0.05" in entropies.hovertext[2]
    assert "uniform to two digits" in entropies.hovertext[1]


def test_one_cluster_has_no_entropy_and_one_user_no_whisker():
    figure = routing(make_routing(clusters=1, users=1))
    assert notes(figure).count("one cluster:<br>nothing to route") == 2
    assert "no intervals: there is only one user" in titles(figure)
    values, entropies = traces(figure, go.Bar)[:2]
    assert values.error_y.array is None
    assert entropies.text == ("", "", "")
    assert "95 %" in titles(routing(make_routing()))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_there_are_three_panels_a_task_in_a_row_of_their_own(count):
    figure = routing(make_routing([f"task {i}" for i in range(count)]))
    assert len(figure.data) == 3 * count
    assert len({trace.xaxis for trace in figure.data}) == 3 * count
    height = routing(make_routing(["a"])).layout.height
    assert figure.layout.height == pytest.approx(height + (count - 1) * (186 + 96), abs=2)


def test_a_table_read_back_from_its_file_gives_the_same_figures(tmp_path):
    table = make_routing(clusters=1, users=1)
    weights = make_weights(table, absent=[(1, 3)])
    for name, one, draw in (("r", table, routing), ("w", weights, head_weights)):
        tables.save(one, tmp_path / f"{name}.json")
        assert draw(tables.load(tmp_path / f"{name}.json")).to_json() == draw(one).to_json()


def test_names_from_data_are_shown_as_they_are():
    table = make_routing([HOSTILE, "b"])
    table["metric"] = ("task", [HOSTILE, "b"])
    table.attrs["embedder"] = HOSTILE
    figures = routing(table), head_weights(make_weights(table))
    for figure in figures:
        assert "<a href" not in figure.to_json().replace("\\u003c", "<")
    assert ESCAPED in titles(figures[0])
    assert ESCAPED in figures[1].data[0].hovertext[0][0]


# Figure 5


def test_the_three_maps_of_a_task_stand_side_by_side_on_one_scale():
    table = make_weights(make_routing())
    figure = head_weights(table)
    maps = traces(figure, go.Heatmap)
    assert len(maps) == 6
    assert {trace.coloraxis for trace in maps} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    np.testing.assert_array_equal(maps[0].z, [[0, 1, 0, 0], [0, 0, 0.25, 0]])
    np.testing.assert_array_equal(maps[1].z, [[0, 0, 1, 0], [0, 0.25, 0, 0]])
    assert [note for note in notes(figure) if "random" in note] == [
        "random weights",
        "random mask",
    ] * 2
    assert "<b>tag</b>: discovered" in notes(figure)


def test_under_each_map_stands_the_metric_with_its_interval():
    table = make_weights(make_routing(random_mask=(-0.1, 1.0)))
    figure = head_weights(table)
    below = [figure.layout[f"xaxis{n or ''}"].title.text for n in ("", 2, 3, 4, 5, 6)]
    assert below[0] == "head<br><b>0.600</b> [0.580, 0.620]<br>accuracy, higher is better"
    assert below[2].startswith("head<br><b>0.500</b> [0.480, 0.520]")
    assert below[5].endswith("mean absolute error, lower is better")
    alone = head_weights(make_weights(make_routing(users=1)))
    assert "<b>0.600</b> no interval" in alone.layout.xaxis.title.text
    assert "no intervals: one user only" in titles(alone)


def test_a_head_is_named_with_its_weight_and_one_that_is_not_there_is_a_gap():
    figure = head_weights(make_weights(make_routing(), absent=[(1, 3)]))
    first = figure.data[0]
    assert "<b>L1H2</b> weight 0.250" in first.hovertext[1][2]
    assert "accuracy 0.600, 95 % [0.580, 0.620]" in first.hovertext[1][2]
    assert first.hovertext[1][3] == ""
    assert np.isnan(first.z[1][3])
    assert figure.layout.plot_bgcolor == GAP
    row = {column: text for (layer, column), text in written(figure)[0].items() if layer == 1}
    assert row == {2: "0.25"}


def test_a_large_model_has_square_panels_without_numbers_in_the_cells():
    table = make_routing()
    small = head_weights(make_weights(table))
    large = head_weights(make_weights(table, 32, 32))
    assert large.layout.width == small.layout.width
    assert large.layout.height > small.layout.height
    assert written(small)
    assert not written(large)
    assert len(large.layout.xaxis.tickvals) <= 9
