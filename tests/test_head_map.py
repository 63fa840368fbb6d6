"""One group's head map, the specific part of scores, the presets, and the picture of it."""

import numpy as np
import pytest
import xarray as xr

import workbench as wb
from workbench.figures.head_map import TRACES
from workbench.figures.template import GAP
from workbench.heads import random_matched

SHAPE = (4, 2, 0, 4)


def scores(pcs, users=None, noise=0.0, **settings):
    pcs = np.asarray(pcs, dtype=float)
    count = len(pcs)
    users = users or [f"u{i}" for i in range(count)]
    for layer, heads in enumerate(SHAPE):
        pcs[:, layer, heads:] = np.nan
    data = xr.Dataset(
        {
            "nll": ("example", np.ones(count)),
            "target_tokens": ("example", np.ones(count, dtype=int)),
            "pcs": (("example", "layer", "head"), pcs),
        },
        coords={
            "example": [f"t/{i}" for i in range(count)],
            "user": ("example", users),
            "task": ("example", ["t"] * count),
            "layer": np.arange(4),
            "head": np.arange(4),
        },
        attrs={"units": "nats/token", "sign": "ablated - full"},
    )
    shared = {"heads_per_layer": list(SHAPE), "prompt": {}}
    return wb.HeadScores(data, {"settings": {**shared, **settings}, "noise": {"p95": noise}})


@pytest.fixture
def drawn():
    rng = np.random.default_rng(1)
    users = ["ann", "ann", "ann", "bob", "bob", "cy"]
    return scores(rng.normal(0, 0.1, (6, 4, 4)), users, noise=0.02)


def test_the_map_of_a_user_is_the_mean_of_their_examples(drawn):
    table = wb.head_map(drawn, "user", "ann")
    pcs = drawn.data["pcs"].values[:3]
    np.testing.assert_allclose(table["mean"], pcs.mean(axis=0))
    assert (int(table["examples"]), int(table["users"])) == (3, 1)
    low, high = table["low"].values, table["high"].values
    there = ~np.isnan(low)
    # Means of resampled examples lie between the smallest and the largest example.
    assert (low[there] >= pcs.min(axis=0)[there] - 1e-9).all()
    assert (high[there] <= pcs.max(axis=0)[there] + 1e-9).all()
    # The noise of a mean of three.
    assert float(table["noise_floor"]) == pytest.approx(0.02 / np.sqrt(3))
    expected = np.abs(pcs.mean(axis=0)) < 0.02 / np.sqrt(3)
    assert (table["below_noise"].values == expected).all()


def test_the_map_of_all_resamples_users_and_knows_missing_heads(drawn):
    table = wb.head_map(drawn)
    assert int(table["users"]) == 3
    assert table["exists"].values.sum(axis=1).tolist() == list(SHAPE)
    assert np.isnan(table["mean"].values[1, 2:]).all()
    whole = drawn.mean("all").isel(group=0)
    xr.testing.assert_equal(table["low"].drop_vars(["group"]), whole["low"].drop_vars(["group"]))


def test_a_map_by_cluster(drawn):
    clustered = drawn.assign_clusters({"ann": 0, "bob": 1, "cy": 1})
    table = wb.head_map(clustered, "cluster", "1")
    np.testing.assert_allclose(table["mean"], drawn.data["pcs"].values[3:].mean(axis=0))
    assert int(table["users"]) == 2


def test_unknown_groups_are_named(drawn):
    with pytest.raises(wb.InputError, match="no user 'dan' in these scores; there are ann, bob"):
        wb.head_map(drawn, "user", "dan")
    with pytest.raises(wb.InputError, match="have no clusters"):
        wb.head_map(drawn, "cluster", "0")


def test_the_specific_part_is_the_difference_example_by_example(drawn):
    other = scores(np.random.default_rng(2).normal(0, 0.1, (6, 4, 4)), noise=0.03)
    other.data["user"] = drawn.data["user"]
    # In another order, as another run may have it.
    other = wb.HeadScores(other.data.isel(example=[3, 1, 5, 0, 4, 2]), other.manifest)
    found = wb.specific_scores(drawn, other, "none")
    expected = drawn.data["pcs"] - other.data["pcs"].sel(example=drawn.data["example"])
    np.testing.assert_allclose(found.data["pcs"], expected)
    assert found.noise_floor(1) == pytest.approx((0.02**2 + 0.03**2) ** 0.5)
    assert wb.head_map(found).attrs["part"] == "own - none"


def test_another_models_scores_have_no_specific_part(drawn):
    other = scores(drawn.data["pcs"].values, ["ann"] * 3 + ["bob"] * 2 + ["cy"], tensors="x")
    with pytest.raises(wb.InputError, match="another model"):
        wb.specific_scores(drawn, other)


def test_presets(drawn):
    table = wb.head_map(drawn)
    means = table["mean"].values
    top = wb.choose_heads("top", table, 3)
    chosen = [means[h.layer, h.head] for h in top]
    assert chosen == sorted(means[~np.isnan(means)].tolist(), reverse=True)[:3]
    drawn_heads = wb.choose_heads("random", table, 3, seed=4)
    assert sorted(h.layer for h in drawn_heads) == sorted(h.layer for h in top)
    assert drawn_heads == random_matched(top, SHAPE, np.random.default_rng(4))
    assert {wb.choose_heads("random", table, 3, seed=s) for s in range(8)} != {drawn_heads}
    assert len(wb.choose_heads("none", table, 3)) == 0
    assert wb.choose_heads("capability", table, 2, capability=drawn) == drawn.top(2, "all")["all"]


def test_presets_say_what_they_need(drawn):
    table = wb.head_map(drawn)
    with pytest.raises(wb.InputError, match="neutral_examples"):
        wb.choose_heads("capability", table, 2)
    with pytest.raises(wb.InputError, match="preset must be one of top, random"):
        wb.choose_heads("best", table, 2)
    with pytest.raises(wb.InputError, match="between 1 and 10"):
        wb.choose_heads("top", table, 11)
    empty = table.assign(mean=table["mean"] * np.nan)
    with pytest.raises(wb.InputError, match="no head of all users has a score"):
        wb.choose_heads("top", empty, 2)


def test_an_estimate_mean_ablation_and_an_aspect_are_called_that(drawn):
    more = {"method": "attribution", "ablation": "mean", "prompt": {"aspect": "topic"}}
    settings = {**drawn.manifest["settings"], **more}
    figure = wb.figures.head_map(wb.head_map(wb.HeadScores(drawn.data, {"settings": settings})))
    title = "PCS of every head, estimated, by mean ablation, over topic tokens only"
    assert figure.layout.title.text == title
    assert wb.figures.head_map(wb.head_map(drawn)).layout.title.text == "PCS of every head"


# The picture


def test_the_picture_holds_the_means_on_a_scale_around_0(drawn):
    table = wb.head_map(drawn, "user", "ann")
    figure = wb.figures.head_map(table, wb.HeadSet.parse("L0H1, L3H2"))
    cells = np.array(figure.data[0].z, dtype=float)
    np.testing.assert_allclose(cells, table["mean"])
    axis = figure.layout.coloraxis
    assert axis.cmid == 0
    assert axis.cmin == -axis.cmax
    assert axis.cmax == pytest.approx(np.nanmax(np.abs(table["mean"])))
    assert figure.layout.plot_bgcolor == GAP
    frame = figure.data[TRACES.index("chosen")]
    assert list(zip(frame.y, frame.x, strict=True)) == [(0, 1), (3, 2)]
    assert "ann, 3 examples" in figure.layout.title.subtitle.text


def test_hovering_names_the_head_its_interval_and_the_noise(drawn):
    table = wb.head_map(drawn, "user", "ann")
    texts = wb.figures.head_map(table).data[0].hovertext
    mean, low, high = (float(table[name][3, 2]) for name in ("mean", "low", "high"))
    assert f"L3H2</b> {mean:+.4f}, 95 % [{low:+.4f}, {high:+.4f}]" in texts[3][2]
    assert texts[2][0] == ""
    for layer, head in np.argwhere(table["exists"].values):
        said = "below the noise floor" in texts[layer][head]
        assert said == bool(table["below_noise"][layer, head])


def test_what_was_shown_before_goes_when_a_widget_takes_the_next_picture(drawn):
    from workbench.lab.maps import unscored

    before = wb.figures.head_map(unscored(SHAPE))
    after = wb.figures.head_map(wb.head_map(drawn), wb.HeadSet(()))
    assert len(before.data) == len(after.data) == len(TRACES)
    assert {v for row in before.data[1].z for v in row} == {1.0, None}
    for old, new in zip(before.data, after.data, strict=True):
        old.update(new.to_plotly_json())
    assert {v for row in before.data[1].z for v in row} == {None}
    assert len(before.data[TRACES.index("strokes")].x) == 0
    assert len(before.data[TRACES.index("chosen")].x) == 0


def test_text_from_data_is_shown_as_it_is():
    one = scores(np.full((2, 4, 4), 0.1), ["<b>x</b>", "<b>x</b>"])
    figure = wb.figures.head_map(wb.head_map(one, "user", "<b>x</b>"))
    assert "&lt;b&gt;x" in figure.layout.title.subtitle.text
    assert "<b>x" not in figure.data[0].hovertext[0][0]
