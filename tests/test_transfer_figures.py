"""The state of the figures of recovery, transfer and lending, not their pixels."""

import numpy as np
import pytest
import xarray as xr
from test_figures import written

from workbench import figures
from workbench.analysis.recovery import METHODS, recovery
from workbench.analysis.transfer import transfer
from workbench.figures.export import save
from workbench.figures.transfer import MEASURES
from workbench.heads import HeadSet
from workbench.scores import HeadScores

FORGED = "<b>x</b><script>alert(1)</script>"


def make_scores(pcs, tasks):
    count = len(pcs)
    data = xr.Dataset(
        {"pcs": (("example", "layer", "head"), pcs.astype(np.float32))},
        coords={
            "example": [f"e{i}" for i in range(count)],
            "user": ("example", [f"u{i // 2}" for i in range(count)]),
            "task": ("example", [tasks[i % len(tasks)] for i in range(count)]),
        },
    )
    return HeadScores(data, {"settings": {}})


def two_models(tasks=("x",), names=("one", "two"), shape=(2, 3), other=(2, 3), seed=0):
    rng = np.random.default_rng(seed)
    count = 24 * len(tasks)
    a, b = (make_scores(rng.normal(0.2, 1, (count, *s)), tasks) for s in (shape, other))
    return transfer(a, b, 2, names, permutations=20)


@pytest.fixture
def found():
    """Two levels of noise; at the second the specific method finds nothing."""
    rng = np.random.default_rng(0)
    other = rng.normal(0, 0.1, (32, 1, 4))
    own = other + rng.normal(0, 0.01, other.shape)
    own[..., 0] += 1
    pairs = {
        0.0: (make_scores(own, "x"), make_scores(other, "x")),
        0.5: (make_scores(own, "x"), make_scores(own, "x")),
    }
    return recovery(pairs, HeadSet.parse("L0H0"), counts=[8, 16])


def lent(names, attrs=None, seed=0):
    rng = np.random.default_rng(seed)
    count = len(names)
    ends = {"gap": 0.1, "gap_low": 0.05, "gap_high": 0.15}
    ends |= {"edge": 0.1, "edge_low": np.nan, "edge_high": np.nan}
    return xr.Dataset(
        {
            "change": (("group", "other"), rng.normal(0.1, 0.1, (count, count))),
            "random": ("group", rng.normal(0, 0.1, count)),
            "examples": ("group", [8] * count),
            "users": ("group", [1] * count),
        },
        coords={"group": names, "other": names},
        attrs={"k": 8, "by": "user", **ends, **(attrs or {})},
    )


# Recovery


def test_a_level_of_noise_is_a_column_with_precision_above_recall(found):
    figure = figures.recovery(found)
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [
        f"<b>noise {noise}</b>, {value}"
        for value in ("precision", "recall")
        for noise in ("0", "0.5")
    ]
    assert len(figure.data) == 4 * len(METHODS)
    recall = next(t for t in figure.data if t.xaxis == "x3" and t.legendgroup == "specific")
    np.testing.assert_allclose(
        recall.y, found["recall"].sel({"method": "specific", "noise": 0.0}).values
    )
    assert sum(bool(t.showlegend) for t in figure.data) == len(METHODS)


def test_a_marker_is_filled_where_every_draw_is_exact_and_absent_where_nothing_is_found(found):
    traces = figures.recovery(found).data
    specific = {t.xaxis: t for t in traces if t.legendgroup == "specific"}
    # Eight examples are four users, of whom no test is significant.
    assert found["exact"].sel({"method": "specific", "noise": 0}).values.tolist() == [0, 1]
    assert specific["x"].marker.color == ("white", "#009E73")
    assert specific["x2"].marker.color == ("white", "white")
    assert np.isnan(specific["x2"].y).all()
    assert "nothing found" in specific["x2"].hovertext[0]


@pytest.mark.parametrize("levels", [1, 6])
def test_recovery_reads_for_one_level_of_noise_and_for_six(found, levels):
    table = xr.concat([found.isel(noise=[0])] * levels, "noise")
    figure = figures.recovery(table.assign_coords(noise=np.arange(levels) / 10))
    assert 720 <= figure.layout.width <= 1300
    # 150 pixels a panel at least, for five counts.
    axis = figure.layout.xaxis.domain
    inner = figure.layout.width - figure.layout.margin.l - figure.layout.margin.r
    assert (axis[1] - axis[0]) * inner >= 149


# Transfer


def test_both_models_masses_and_all_measures_are_drawn_for_each_task():
    table = two_models(("x", "y"))
    figure = figures.transfer(table)
    assert len(figure.data) == 2 * 4
    one, two, chance, value = figure.data[4:]
    np.testing.assert_allclose(one.y, table["mass"].sel(group="y", model="one"))
    np.testing.assert_allclose(two.y, table["mass"].sel(group="y", model="two"))
    assert list(value.x) == [float(table[m[0]].sel(group="y")) for m in MEASURES]
    assert list(chance.x) == [float(table[m[1]].sel(group="y")) for m in MEASURES]
    assert [bool(t.showlegend) for t in figure.data] == [True] * 4 + [False] * 4


def test_a_measure_is_filled_where_its_p_is_small_and_named_where_there_is_none():
    table = two_models(other=(3, 2))
    table["matched_p"][:] = 0.01
    table["overlap_p"][:] = 0.6
    value = figures.transfer(table).data[3]
    filled = dict(zip([m[0] for m in MEASURES], value.marker.color, strict=True))
    assert filled["matched"] != "white"
    assert filled["overlap"] == "white"
    words = figures.transfer(table).layout.yaxis2.ticktext
    assert sum("none" in text for text in words) == 2  # by place: other shapes
    assert value.error_x.array[0] is None


def test_names_of_models_and_groups_are_shown_as_they_are():
    figure = figures.transfer(two_models((FORGED,), (FORGED, "two")))
    lend = figures.lend(lent([FORGED, "b"], {"by": FORGED}))
    for drawn in (figure, lend):
        text = drawn.to_json().replace("\\u003c", "<")
        assert "<script>" not in text
        assert "<b>x" not in text


# Lending


def test_the_matrix_is_centred_at_0_and_the_means_stand_beside_it():
    table = lent(["a", "b", "c"])
    figure = figures.lend(table)
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax == -np.abs(table["change"].values).max()
    np.testing.assert_array_equal(figure.data[0].z, table["change"].values)
    own, others, random = (trace for trace in figure.data if trace.xaxis == "x2")
    matrix = table["change"].values
    np.testing.assert_allclose(own.x, [matrix[i, i] for i in range(3)])
    np.testing.assert_allclose(others.x, [np.delete(matrix[i], i).mean() for i in range(3)])
    np.testing.assert_allclose(random.x, table["random"])
    # The same rows in the same order in both panels.
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range == (2.5, -0.5)


def test_a_gap_without_an_interval_says_so():
    text = figures.lend(lent(["a", "b"])).layout.title.subtitle.text
    assert "own minus another user's: +0.100, 95 % [+0.050, +0.150]" in text
    assert "own minus random ones: +0.100, no interval" in text


@pytest.mark.parametrize("users", [2, 50])
def test_lending_reads_for_two_users_and_for_fifty(users):
    figure = figures.lend(lent([f"a-user-with-a-long-name-{i:03d}" for i in range(users)]))
    assert figure.layout.width <= 1100
    assert len(figure.layout.xaxis.tickvals) <= 35
    assert bool(written(figure)) == (users == 2)


def test_the_figures_are_drawn(found, tmp_path, browser):
    drawn = {
        "recovery": figures.recovery(found),
        "transfer": figures.transfer(two_models()),
        "lend": figures.lend(lent(["a", "b"])),
    }
    saved = save(drawn, tmp_path)
    assert saved.note == ""
    assert len(saved.paths) == 9
