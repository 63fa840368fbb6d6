"""Marks in figures and tables: means below the noise floor, and heads that were not scored."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
from test_figures import make_scores, random_scores, titles, traces

from workbench import figures
from workbench.errors import InputError
from workbench.figures.marks import MINUS
from workbench.figures.template import DPS
from workbench.probe import Probe
from workbench.report import figure_tables
from workbench.scores import HeadScores


def with_floor(scores, p95):
    return HeadScores(scores.data, {"noise": {"p95": p95}})


def test_heads_below_the_noise_floor_have_a_dot_and_say_so():
    # Of 4 examples each: the floor of a mean is half of what one example's score moves by.
    scores = with_floor(
        make_scores(np.tile([[0.1, -0.019], [0.021, -0.3]], (8, 1, 1)), "aaaabbbb"), 0.04
    )
    figure = figures.user_heatmaps(scores)
    dots = [trace for trace in traces(figure, go.Scatter) if trace.name != MINUS]
    assert [(list(dot.x), list(dot.y)) for dot in dots] == [([1], [0])] * 2
    assert [dot.showlegend for dot in dots] == [True, False]
    assert dots[0].name.startswith("below the noise floor: sums in another order")
    hover = traces(figure, go.Heatmap)[0].hovertext
    assert hover[0][1].endswith("below the noise floor, 0.02")
    assert "noise" not in hover[0][0] + hover[1][0] + hover[1][1]


def test_ranked_heads_below_the_noise_floor_are_hollow():
    scores = with_floor(make_scores(np.tile([[0.1, 0.019, 0.021]], (4, 1, 1)), "aabb"), 0.04)
    figure = figures.ranked_heads(scores)
    assert list(figure.data[0].customdata) == ["L0H0", "L0H2", "L0H1"]
    assert list(figure.data[0].marker.color) == [DPS, DPS, "white"]
    assert "below the noise floor" in figure.data[0].hovertext[2]
    assert [trace.name for trace in figure.data if trace.showlegend] == [figure.data[1].name]
    # A head that is not drawn needs no entry.
    assert len(figures.ranked_heads(scores, limit=2).data) == 1


@pytest.mark.parametrize("draw", [figures.user_heatmaps, figures.ranked_heads])
def test_nothing_is_marked_where_all_means_are_above_the_floor(draw):
    plain, measured = (
        draw(scores) for scores in (random_scores(), with_floor(random_scores(), 1e-7))
    )
    assert measured.to_json() == plain.to_json()


def screened_scores():
    """Two tasks; L0H1 is scored in the first only, L1H2 isn't there."""
    pcs = np.full((4, 2, 3), 0.1)
    pcs[:, 1, 2] = np.nan
    estimate = pcs + 0.01
    pcs[2:, 0, 1] = np.nan
    scores = make_scores(pcs, "abab", ["tag", "tag", "rating", "rating"])
    dims = ("example", "layer", "head")
    return HeadScores(scores.data.assign(attribution=(dims, estimate)), {})


def test_head_that_was_not_scored_is_told_from_one_that_is_not_there():
    figure = figures.user_heatmaps(screened_scores(), "task")
    tag, rating, fill = traces(figure, go.Heatmap)
    assert tag.hovertext[0][1]
    assert rating.hovertext[0][1] == rating.hovertext[1][2] == ""
    assert list(map(list, fill.hovertext)) == [
        ["", "rating<br><b>L0H1</b> not scored", ""],
        ["", "", ""],
    ]
    assert np.argwhere(~np.isnan(np.asarray(fill.z))).tolist() == [[0, 1]]
    (stroke,) = traces(figure, go.Scatter)
    assert (stroke.name, stroke.showlegend, list(stroke.x), list(stroke.y)) == (
        "not scored",
        True,
        [1],
        [0],
    )
    assert "no such head" in titles(figure)


def test_legend_of_marks_stays_below_the_title():
    plain = figures.user_heatmaps(random_scores()).layout
    one = figures.user_heatmaps(with_floor(random_scores(), 0.05)).layout
    both = figures.user_heatmaps(with_floor(screened_scores(), 1.0), "task").layout
    for number, layout in ((1, one), (2, both)):
        assert layout.margin.t == plain.margin.t + 28 * number


def test_ranking_counts_scored_heads_and_refuses_groups_that_were_not_screened():
    assert "highest 5 of 5, task" in titles(figures.ranked_heads(screened_scores(), "task"))
    only = screened_scores().select(tasks=["rating"])
    assert "highest 4 of 4 scored" in titles(figures.ranked_heads(only))
    pcs = np.full((2, 1, 2), np.nan)
    pcs[0, 0, 0] = pcs[1, 0, 1] = 0.1
    with pytest.raises(InputError, match="no head was scored on all examples of a group by all"):
        figures.ranked_heads(make_scores(pcs, "ab"))


def test_estimate_is_called_one():
    scores = HeadScores(random_scores().data, {"settings": {"method": "attribution"}})
    assert "Estimated PCS of every head" in titles(figures.user_heatmaps(scores))
    assert "mean estimated PCS" in titles(figures.ranked_heads(scores))


def test_tables_of_the_figures_have_the_marks():
    scores = with_floor(make_scores(np.tile([[0.1, -0.019]], (4, 1, 1)), "aaaa"), 0.04)
    tables = figure_tables(Probe(scores, {}, [], [], {}))
    for name in ("figure-3-user-heatmaps", "task-heatmaps", "ranked-heads"):
        table = tables[name].sort_values("head")
        assert table["below_noise"].tolist() == [False, True]
        assert table["noise_floor"].tolist() == [0.02, 0.02]
