"""The state of the figures of aspects and of the profile's place, not their pixels."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from test_figures import ESCAPED, HOSTILE, titles, written

from workbench.errors import InputError
from workbench.figures.aspects import aspect_heads, aspect_overlap
from workbench.figures.position import position
from workbench.figures.template import GAP


def make_aspects(names=("style", "topic"), layers=2, heads=3, users=5):
    """A table as `aspects` gives it; L0H1 of the first aspect scores .5, its interval above 0."""
    count = len(names)
    pcs = np.full((count, layers, heads), 0.01)
    pcs[0, 0, 1] = 0.5
    half = np.where(pcs > 0.1, 0.1, 0.2)
    if users < 2:
        half = np.full_like(pcs, np.nan)
    pairs = np.full((count, count), 0.3)
    np.fill_diagonal(pairs, 1.0)
    gap = np.full((count, count), 0.2)
    np.fill_diagonal(gap, np.nan)
    if count > 2:
        gap[0, 2] = gap[2, 0] = -0.1
    grid, square = ("aspect", "layer", "head"), ("aspect", "other")
    return xr.Dataset(
        {
            "pcs": (grid, pcs),
            "low": (grid, pcs - half),
            "high": (grid, pcs + half),
            "p": (grid, np.full_like(pcs, 0.5)),
            "below_noise": (grid, np.zeros(pcs.shape, dtype=bool)),
            "nll": ("aspect", np.linspace(1, 2, count)),
            "users": ("aspect", [users] * count),
            "tokens": ("aspect", [1234] * count),
            "jaccard": (square, pairs),
            "spearman": (square, pairs),
            "shared": (square, pairs * 0.8),
            "gap": (square, gap),
            "gap_low": (square, gap - 0.05),
            "gap_high": (square, gap + 0.05),
            "gap_p": (square, np.where(gap > 0, 0.01, 0.9)),
        },
        coords={"aspect": list(names), "other": list(names)},
        attrs={"k": 4, "level": 0.95, "chance": 0.15},
    )


def make_position(tasks=("tag", "rating"), kind="distance", users=5):
    """A table as `position` gives it; only step 4 of the first task has changed."""
    steps = [0, 1, 4]
    shape = (len(tasks), len(steps))
    change = np.zeros(shape)
    change[0, 2] = -0.2
    measures = {"nll": 1.0, "top_pcs": 0.05, "profile_value": 0.4, "jaccard": 0.6, "spearman": 0.7}
    data = {name: np.full(shape, value) for name, value in measures.items()}
    data |= {"value_change": change, "top_change": np.zeros(shape)}
    gap = np.full(shape, 0.01)
    gap[:, 0] = np.nan
    gap[1, 1] = 0.3
    data["gap"] = gap
    columns = {}
    for name, mean in data.items():
        reach = 0.1 if users > 1 else np.nan
        columns[name] = (("task", "step"), mean)
        columns[f"{name}_low"] = (("task", "step"), mean - reach)
        columns[f"{name}_high"] = (("task", "step"), mean + reach)
    columns["gap_p"] = (("task", "step"), np.where(gap > 0.1, 0.01, 0.9))
    columns["prompt_tokens"] = (("task", "step"), np.full(shape, 120.0))
    columns["shortened"] = (("task", "step"), np.full(shape, 0.0))
    columns["users"] = ("task", [users] * len(tasks))
    return xr.Dataset(
        columns,
        coords={"task": list(tasks), "step": steps},
        attrs={
            "kind": kind,
            "reference": 0,
            "k": 8,
            "level": 0.95,
            "heads_from": "step 0, the other half of the users",
        },
    )


def heatmaps(figure):
    return [trace for trace in figure.data if isinstance(trace, go.Heatmap)]


def scatters(figure):
    return [trace for trace in figure.data if isinstance(trace, go.Scatter)]


# Aspects


def test_aspects_stand_on_one_scale_centred_at_0():
    table = make_aspects()
    figure = aspect_heads(table)
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmid, axis.cmax) == (-0.5, 0, 0.5)
    for trace, name in zip(heatmaps(figure), table["aspect"].values, strict=True):
        assert trace.coloraxis == "coloraxis"
        np.testing.assert_array_equal(trace.z, table["pcs"].sel(aspect=name))
    assert "L0H1" in heatmaps(figure)[0].hovertext[0][1]
    assert "+0.5000, 95 % [+0.4000, +0.6000]" in heatmaps(figure)[0].hovertext[0][1]


def test_a_ring_marks_the_heads_that_are_shown_and_no_other():
    table = make_aspects()
    first, second = scatters(aspect_heads(table))
    assert (list(first.x), list(first.y)) == ([1], [0])
    assert list(second.x) == [None]
    assert first.showlegend
    assert not second.showlegend
    table["below_noise"].values[0, 0, 1] = True
    assert list(scatters(aspect_heads(table))[0].x) == [None]


def test_a_missing_head_is_a_gap_and_no_score_at_all_is_refused():
    table = make_aspects()
    for name in ("pcs", "low", "high"):
        table[name].values[:, 1, 2] = np.nan
    figure = aspect_heads(table)
    assert heatmaps(figure)[0].hovertext[1][2] == ""
    assert figure.layout.plot_bgcolor == GAP
    assert "grey: no such head" in titles(figure)
    table["pcs"].values[:] = np.nan
    with pytest.raises(InputError, match="nothing to draw"):
        aspect_heads(table)


@pytest.mark.parametrize(("number", "layers", "heads"), [(1, 4, 8), (6, 32, 32), (10, 4, 8)])
def test_panels_stay_inside_the_figure_whatever_the_table_holds(number, layers, heads):
    names = [f"a{i}" for i in range(number)]
    figure = aspect_heads(make_aspects(names, layers, heads))
    assert len(heatmaps(figure)) == number
    assert figure.layout.width <= 860
    assert figure.layout.height <= 1100


def test_the_overlap_writes_every_value_and_stars_what_differs():
    figure = aspect_overlap(make_aspects(("a", "b", "c")))
    whole, halves = written(figure)
    assert [whole.get((0, i), "") for i in range(3)] == ["", "0.30*", "0.30"]
    assert [halves[0, i] for i in range(3)] == ["0.80", "0.24*", "0.24"]
    whole = heatmaps(figure)[0]
    assert "short of noise by +0.20" in whole.hovertext[0][1]
    assert "short of noise" not in whole.hovertext[1][1]
    table = make_aspects(("a", "b", "c"))
    table["gap_p"].values[0, 1] = 0.06  # no longer below .05 once adjusted
    assert written(aspect_overlap(table))[0][0, 1] == "0.30"
    with pytest.raises(InputError, match="needs two aspects"):
        aspect_overlap(make_aspects(("a",)))


def test_names_are_shown_as_text_in_both_figures():
    table = make_aspects((HOSTILE, "b"))
    for figure in (aspect_heads(table), aspect_overlap(table)):
        assert ESCAPED in str(heatmaps(figure)[0].hovertext[0][1])
        assert "<a href" not in figure.to_json()


def test_one_user_is_said_to_give_no_interval():
    figure = aspect_heads(make_aspects(users=1))
    assert "no intervals: there is one user" in titles(figure)
    assert "no interval" in heatmaps(figure)[0].hovertext[0][1]


# Position


def test_a_row_of_three_panels_shows_each_task():
    table = make_position()
    figure = position(table)
    assert len(figure.data) == 6
    for i, task in enumerate(("tag", "rating")):
        for trace, name in zip(
            figure.data[3 * i : 3 * i + 3], ("profile_value", "top_pcs", "jaccard"), strict=True
        ):
            np.testing.assert_array_equal(trace.y, table[name].sel(task=task))
            assert list(trace.x) == [0, 1, 4]
            assert list(trace.error_y.array) == pytest.approx([0.1] * 3)
    assert figure.layout.xaxis.title.text == "strangers' items"
    assert "by strangers' items before the query, K = 8" in titles(figure)


def test_markers_are_filled_where_a_change_is_shown():
    figure = position(make_position())
    filled = [[color != "white" for color in trace.marker.color] for trace in figure.data]
    assert filled[0] == [False, False, True]  # the value of the first task's last step
    assert filled[5] == [False, True, False]  # the heads of the second task's middle step
    assert not any(any(row) for row in filled[1:5])
    assert list(figure.data[0].marker.symbol) == ["square", "circle", "circle"]


def test_a_gap_that_does_not_pass_the_adjustment_is_not_filled():
    table = make_position()
    table["gap_p"].values[1, 1] = 0.2
    assert set(position(table).data[5].marker.color) == {"white"}


def test_one_user_has_no_whiskers_and_no_task_is_refused():
    figure = position(make_position(users=1))
    assert all(end is None for trace in figure.data for end in trace.error_y.array)
    assert "no intervals: there is one user" in titles(figure)
    with pytest.raises(InputError, match="nothing to draw"):
        position(make_position().isel(task=[]))


def test_hover_says_the_step_its_change_and_the_prompt():
    text = position(make_position()).data[0].hovertext[2]
    for part in ("<b>tag</b>, step 4", "change from the reference: -0.200", "120 prompt tokens"):
        assert part in text
    hostile = position(make_position((HOSTILE, "b")))
    assert ESCAPED in hostile.data[0].hovertext[0]
    assert "<a href" not in hostile.to_json()
