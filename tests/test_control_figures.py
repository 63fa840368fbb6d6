"""The state of the figures of controls and coherence, on tables made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from test_figures import ESCAPED, HOSTILE

from workbench.errors import InputError
from workbench.figures.classes import COLOURS, class_effects
from workbench.figures.coherence import coherence
from workbench.figures.controls import OTHER, OUTLINED, PANELS, damage, specific_heads
from workbench.figures.template import GAP, INK

HEADS = ("group", "layer", "head")


def make_damage(groups=("tag",), shape=(2, 4), interval=0.01):
    """Head 0 of layer 1 is a preference head and the last one a capability head."""
    size = (len(groups), *shape)
    user = np.linspace(-0.01, 0.2, np.prod(size)).reshape(size)
    cls = np.full(size, "", dtype=object)
    cls[:, 1, 0], cls[:, -1, -1] = "preference", "capability"
    data = {"cls": (HEADS, cls), "all_cls": (HEADS, np.where(cls == "", "", cls + ", induction"))}
    for name, values in (("user", user), ("neutral", user[..., ::-1] * 2)):
        data[name] = (HEADS, values)
        data[f"{name}_low"] = (HEADS, values - interval)
        data[f"{name}_high"] = (HEADS, values + interval)
    for name, value in (("", 0.25), ("_low", -0.5), ("_high", 0.75)):
        data[f"correlation{name}"] = ("group", [value] * len(groups))
    data["neutral_examples"] = ("group", [48] * len(groups))
    coordinates = {"group": list(groups), "layer": range(shape[0]), "head": range(shape[1])}
    return xr.Dataset(data, coordinates)


def make_specific(groups=("tag",), kinds=("none", "stranger"), shape=(2, 4)):
    own = np.linspace(-0.1, 0.3, len(groups) * np.prod(shape)).reshape(len(groups), *shape)
    own[:, 0, 3] = np.nan
    specific = np.stack([own * (i + 1) / 2 for i in range(len(kinds))])
    dims = ("counterfactual", *HEADS)
    return xr.Dataset(
        {
            "own": (HEADS, own),
            "specific": (dims, specific),
            "low": (dims, specific - 0.15),
            "high": (dims, specific + 0.15),
            "p": (dims, np.full(specific.shape, 0.03)),
            "is_specific": (dims, np.abs(np.nan_to_num(specific)) > 0.15),
        },
        {
            "group": list(groups),
            "counterfactual": list(kinds),
            "layer": range(shape[0]),
            "head": range(shape[1]),
        },
    )


def make_classes(tasks=("tag",), interval=0.05, p=0.01):
    names = ["preference", "random"]
    shape = (len(tasks), len(names))
    data = {}
    means = {"user_loss": 0.1, "neutral_loss": 0.02, "change_ablated": -0.2, "change_dps": 0.01}
    for name, value in means.items():
        for end, step in (("", 0), ("_low", -interval), ("_high", interval)):
            data[name + end] = (("task", "cls"), np.full(shape, value + step))
        data[f"{name}_p"] = (("task", "cls"), np.full(shape, p))
    return xr.Dataset(
        {
            **data,
            "heads": (("task", "cls"), np.full(shape, "L0H1, L1H0")),
            "examples": ("task", [12] * len(tasks)),
            "users": ("task", [6] * len(tasks)),
            "plain": ("task", [0.5] * len(tasks)),
            "metric": ("task", ["accuracy"] * len(tasks)),
            "better": ("task", ["higher"] * len(tasks)),
        },
        {"task": list(tasks), "cls": names},
        attrs={"gamma": 0.5, "draws": 3},
    )


def make_coherence(tasks=("tag", "rating"), gammas=(0.5, 1.0, 2.0), better=("higher", "lower")):
    names = ["preference", "random"]
    shape = (len(tasks), len(names), len(gammas))
    strength = np.broadcast_to(np.array(gammas), shape)
    dims, data = ("task", "cls", "gamma"), {}
    for name, value in (("gain", 0.1), ("neutral_nll", 0.3), ("user_nll", -0.1)):
        for end, step in (("", 0), ("_low", -0.15), ("_high", 0.15)):
            data[name + end] = (dims, strength * value + step)
    data["gain_p"] = (dims, np.full(shape, 0.01))
    return xr.Dataset(
        {
            **data,
            "agreement": (dims, np.full(shape, 0.75)),
            "examples": ("task", [12] * len(tasks)),
            "users": ("task", [6] * len(tasks)),
            "neutral_examples": ("task", [48] * len(tasks)),
            "metric_name": ("task", ["accuracy"] * len(tasks)),
            "better": ("task", list(better)),
        },
        {"task": list(tasks), "cls": names, "gamma": list(gammas)},
    )


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


# Damage


def test_a_point_lies_at_its_damage_to_both_texts_in_its_class_colour():
    table = make_damage()
    figure = damage(table)
    (point,) = named(figure, "preference")
    assert point.x == (table["neutral"].values[0, 1, 0],)
    assert point.y == (table["user"].values[0, 1, 0],)
    assert point.marker.color == COLOURS["preference"]
    assert (point.error_y.array, point.error_y.arrayminus) == (
        pytest.approx((0.01,)),
        pytest.approx((0.01,)),
    )
    assert "<b>L1H0</b> preference, induction" in point.hovertext[0]
    assert "users' text: +0.1100, 95 % [+0.1000, +0.1200]" in point.hovertext[0]
    (others,) = named(figure, "other heads")
    assert len(others.x) == 6 and others.marker.color == OTHER


def test_the_subtitle_says_that_classes_were_chosen_by_these_scores():
    table = make_damage()
    said = "classes chosen by these scores stand too far out"
    assert said in damage(table).layout.title.subtitle.text
    table["cls"][:] = ""
    assert said not in damage(table).layout.title.subtitle.text


def test_a_head_that_is_bounded_on_one_side_says_so():
    table = make_specific()
    table["low"][:, :, 0, 0], table["high"][:, :, 1, 1] = np.nan, np.nan
    cells = [t.hovertext for t in specific_heads(table).data if t.type == "heatmap"][1]
    assert "-0.0500, 95 % at most +0.1000<br>" in cells[0][0]
    assert "95 % at least" in cells[1][1] and "nan" not in str(cells)


def test_the_diagonal_is_where_both_damages_are_equal():
    figure = damage(make_damage())
    (line,) = named(figure, "equal damage")
    assert line.x == line.y and line.x[0] < 0 < line.x[1]
    low, high = figure.layout.xaxis.range
    assert low <= line.x[0] and line.x[1] <= high
    point = named(figure, "capability")[0]
    assert low < point.x[0] - 0.01 and point.x[0] + 0.01 < high


def test_each_class_is_named_once_and_each_group_has_its_panel():
    figure = damage(make_damage(groups=("tag", "rating", "headline", "more")))
    for name in ("preference", "capability", "other heads", "equal damage"):
        assert [trace.showlegend for trace in named(figure, name)] == [True, False, False, False]
    text = [note.text for note in figure.layout.annotations]
    assert text[0] == "<b>tag</b><br>rank correlation 0.25 [-0.50, 0.75]"
    assert figure.layout.yaxis4.title.text == "damage to users' text<br>(nats per target token)"
    assert figure.layout.yaxis2.title.text is None


def test_of_many_heads_only_those_of_a_class_have_whiskers():
    figure = damage(make_damage(shape=(16, 16)))
    assert named(figure, "other heads")[0].error_x.array is None
    assert named(figure, "preference")[0].error_x.array is not None


def test_points_without_an_interval_have_no_whiskers():
    table = make_damage()
    for name in ("user_low", "user_high", "correlation_low", "correlation_high"):
        table[name][:] = np.nan
    figure = damage(table)
    assert named(figure, "preference")[0].error_y.array == (None,)
    assert figure.layout.annotations[0].text.endswith("rank correlation 0.25")
    table["correlation"][:] = np.nan
    assert damage(table).layout.annotations[0].text.endswith("rank correlation cannot be had")


def test_more_groups_than_panels_are_counted():
    figure = damage(make_damage(groups=[f"u{i}" for i in range(12)]))
    assert len(figure.layout.annotations) == PANELS
    assert f"the first {PANELS} of 12 groups" in figure.layout.title.subtitle.text


# Specific heads


def test_own_scores_and_what_is_left_of_them_share_one_scale_centred_at_zero():
    table = make_specific(groups=("tag", "rating"))
    figure = specific_heads(table)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == 6 and {trace.coloraxis for trace in maps} == {"coloraxis"}
    np.testing.assert_array_equal(maps[0].z, table["own"].values[0])
    np.testing.assert_array_equal(maps[5].z, table["specific"].values[1, 1])
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmid, scale.cmax) == (-0.3, 0, 0.3)
    assert figure.layout.plot_bgcolor == GAP
    assert maps[0].hovertext[0][3] == ""  # no such head
    assert "adjusted p = 0.03" in maps[1].hovertext[1][0]
    titles = [note.text for note in figure.layout.annotations if note.text]
    assert titles == ["PCS, own profile", "own − no profile", "own − a stranger's"]


def test_frames_are_on_the_specific_heads_and_named_once():
    table = make_specific()
    frames = named(specific_heads(table), OUTLINED)
    assert [trace.showlegend for trace in frames] == [True, False]
    for trace, kind in zip(frames, table["counterfactual"], strict=True):
        found = table["is_specific"].sel(counterfactual=kind).values[0]
        wanted = np.argwhere(found).tolist()
        drawn = [[y, x] for x, y in zip(trace.x, trace.y, strict=True) if x is not None]
        assert drawn == wanted
        assert trace.marker.color == INK


# Classes


def test_each_effect_has_its_row_and_is_filled_only_where_its_interval_leaves_zero_out():
    figure = class_effects(make_classes())
    assert figure.layout.yaxis.ticktext == ("preference", "random")
    (user,) = named(figure, "loss on users' text")
    (neutral,) = named(figure, "loss on neutral text")
    (steered,) = named(figure, "metric, DPS (gamma = 0.5)")
    assert user.x == (0.1, 0.1) and [round(y) for y in user.y] == [0, -1]
    assert user.marker.color == (INK, INK)
    assert neutral.marker.color == steered.marker.color == ("white", "white")
    (unsure,) = named(class_effects(make_classes(p=0.06)), "loss on users' text")
    assert unsure.marker.color == ("white", "white")
    assert "<b>preference</b> loss on users' text<br>+0.1000, 95 % [+0.0500" in user.hovertext[0]
    assert figure.layout.xaxis2.title.text == "change of accuracy (higher is better)"
    low, high = figure.layout.xaxis.range
    assert low < -0.03 and high > 0.15


def test_class_effects_name_marks_once_and_tasks_each():
    figure = class_effects(make_classes(tasks=("tag", "rating")))
    assert [t.showlegend for t in named(figure, "metric, removed")] == [True, False]
    text = [note.text for note in figure.layout.annotations]
    assert text[2] == "<b>rating</b>, 12 examples of 6 users"
    assert text[3] == "accuracy of the plain model: 0.500"


# Coherence


def test_curves_start_at_the_plain_model_and_up_is_better():
    figure = coherence(make_coherence())
    curves = named(figure, "preference heads")
    assert curves[0].x == pytest.approx((0, 0.15, 0.3, 0.6))
    assert curves[0].y == pytest.approx((0, 0.05, 0.1, 0.2))
    higher, lower = figure.layout.yaxis.range, figure.layout.yaxis2.range
    assert higher[0] < higher[1] and lower[0] > lower[1]
    assert set(map(abs, higher)) == set(map(abs, lower))
    assert [t.showlegend for t in curves] == [True, False]
    # Of 0.05, 0.1 and 0.2 give or take 0.15 only the last leaves 0 out.
    assert curves[0].marker.color == ("white", "white", "white", COLOURS["preference"])
    assert "75% of answers as the plain model's" in curves[0].hovertext[1]
    assert "gamma = 0.5" in curves[0].hovertext[1]


def test_strengths_are_written_where_there_is_room():
    figure = coherence(make_coherence(tasks=("tag",), better=("higher",)))
    assert named(figure, "preference heads")[0].text == ("", "0.5", "1", "2")
    assert named(figure, "random heads")[0].text == ("",) * 4, "they lie on those of the other"
    table = make_coherence(tasks=("tag",), better=("higher",))
    table["gain"].loc[{"cls": "random"}] -= 0.3
    apart = coherence(table)
    assert named(apart, "random heads")[0].text == ("", "", "", "2")
    crowded = make_coherence(tasks=("tag",), gammas=(1.0, 1.01, 2.0), better=("higher",))
    assert named(coherence(crowded), "preference heads")[0].text == ("", "", "1.01", "2")


# All


def test_nothing_to_draw_is_refused():
    empty = make_damage()
    empty["user"][:] = np.nan
    with pytest.raises(InputError, match="no head has a score"):
        damage(empty)
    nothing = make_specific()
    nothing["own"][:] = np.nan
    with pytest.raises(InputError, match="no head has a score"):
        specific_heads(nothing)
    with pytest.raises(InputError, match="needs a task and a strength"):
        coherence(make_coherence().isel(gamma=[]))


def test_names_from_data_are_shown_as_text_and_never_read_as_markup():
    drawn = [
        damage(make_damage(groups=(HOSTILE,))),
        specific_heads(make_specific(groups=(HOSTILE,), kinds=(HOSTILE,))),
        class_effects(make_classes(tasks=(HOSTILE,)).assign_coords(cls=[HOSTILE, "random"])),
        coherence(
            make_coherence(tasks=(HOSTILE,), better=("higher",)).assign_coords(cls=[HOSTILE, "b"])
        ),
    ]
    for figure in drawn:
        text = figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<a href" not in text and "$x$" not in text
    assert ESCAPED in named(drawn[0], "preference")[0].hovertext[0]


def test_every_figure_draws_one_task_and_six_small_models_and_large():
    for groups, shape in ((("a",), (32, 32)), (tuple("abcdef"), (4, 8))):
        sizes = [
            damage(make_damage(groups, shape)).layout.width,
            specific_heads(make_specific(groups, shape=shape)).layout.width,
            class_effects(make_classes(groups)).layout.width,
            coherence(make_coherence(groups, better=["higher"] * len(groups))).layout.width,
        ]
        assert all(700 < size < 1200 for size in sizes)
