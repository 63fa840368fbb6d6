"""The verdict: an effect is named only where its interval leaves 0 out."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from workbench.analysis.headline import headline

NAN = float("nan")
NONE = (NAN, NAN)


def specificity(specific, firm, fraction=(0.5, 0.3, 0.7), kinds=("stranger",)):
    """Heads of one task, behind other profiles, a row each."""
    cells = ("counterfactual", "group", "layer", "head")
    value, low, high = fraction
    ends = {"": value, "_low": low, "_high": high}
    pair = ("counterfactual", "group")
    shape = (len(kinds), 1, 1, -1)
    return xr.Dataset(
        {
            "specific": (cells, np.array(specific, float).reshape(shape)),
            "is_specific": (cells, np.array(firm).reshape(shape)),
            **{
                f"specific_fraction{end}": (pair, [[number]] * len(kinds))
                for end, number in ends.items()
            },
        },
        coords={"counterfactual": list(kinds), "group": ["t"]},
    )


def recurrence(firm):
    return xr.Dataset({"firm": ("group", [firm])}, coords={"group": ["t"]})


def classes(user, nobody, p=0.01, random=None, less=None, less_p=0.01):
    """Preference heads' costs; `random`, those of random heads; `less`, the paired difference."""
    columns = {"user_loss": [user, random], "neutral_loss": [nobody, random]}
    if less:
        columns |= {f"{name}_less_random": [less, NONE] for name in list(columns)}
    number = 2 if random else 1
    data = {}
    for name, pairs in columns.items():
        data[name] = [sum(ends) / 2 for ends in pairs[:number]]
        data[f"{name}_low"] = [ends[0] for ends in pairs[:number]]
        data[f"{name}_high"] = [ends[1] for ends in pairs[:number]]
        data[f"{name}_p"] = [less_p if "less" in name else p] * number
    return xr.Dataset(
        {name: (("task", "cls"), [values]) for name, values in data.items()},
        coords={"task": ["t"], "cls": ["preference", "random"][:number]},
        attrs={"draws": 5},
    )


def sweep(gain, low, high, beaten=3, better="higher"):
    row = {"gain": gain, "gain_low": low, "gain_high": high, "beaten": beaten}
    return xr.Dataset(
        {
            **{name: (("task", "k"), [[value]]) for name, value in row.items()},
            "better": ("task", [better]),
            "metric": ("task", ["accuracy"]),
            "random_draws": (("task", "k", "draw"), np.zeros((1, 1, 3))),
        },
        coords={"task": ["t"], "k": [8]},
    )


def test_without_a_stranger_there_is_no_verdict():
    assert headline({}, 8)[0].startswith("No verdict")
    other = specificity([1, 1], [True, True], kinds=("none",))
    assert headline({"specificity": other}, 8)[0].startswith("No verdict")


def test_heads_are_counted_by_their_sign_and_missing_ones_not_at_all():
    first, line = headline(
        {"specificity": specificity([1, 2, -1, NAN], [True, True, True, False])}, 8
    )
    assert first.startswith("2 of 3 scores of heads are about the user")
    assert first.endswith("; 1 is lower.")
    assert line.startswith("t: 2 of 3 heads are specific to the user (1 the other way).")
    assert "50% (30% to 70%)" in line


def test_no_specific_head_is_said_first():
    first, line = headline({"specificity": specificity([1, -1], [False, False])}, 8)
    assert first.startswith("No head is shown to be about the user: of 2 scores")
    assert "0 of 2 heads" in line


def test_a_share_without_an_interval_is_not_told():
    lines = headline({"specificity": specificity([1], [True], (0.5, NAN, NAN))}, 8)
    assert "PCS" not in lines[1]


def test_a_share_whose_interval_holds_0_is_no_finding():
    (_, line) = headline({"specificity": specificity([1], [True], (0.32, -0.08, 0.76))}, 8)
    assert "is not shown: 32% (-8% to 76%)" in line


def test_a_head_about_the_user_matters_more_than_behind_a_stranger_and_behind_none():
    # The first head does so against both, the second against a stranger only.
    found = specificity(
        [[1, 1, -1], [1, 1, -1]],
        [[True, True, True], [True, False, True]],
        kinds=("stranger", "none"),
    )
    first, line = headline({"specificity": found}, 8)
    assert first.startswith("1 of 3 scores")
    assert "than behind a stranger's and than behind no profile" in first
    assert line.startswith("t: 1 of 3 heads are specific to the user (1 the other way).")


UP, DOWN, BOTH = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)


@pytest.mark.parametrize(
    ("user", "nobody", "told"),
    [
        (
            UP,
            DOWN,
            "rises (+0.200 nats per token, +0.100 to +0.300). On text of nobody it falls",
        ),
        (BOTH, UP, "text is not shown to change (+0.100"),
        (UP, BOTH, "On text of nobody it is not shown to change"),
    ],
)
def test_what_text_loses_is_named_by_its_interval(user, nobody, told):
    tables = {"specificity": specificity([1], [True]), "classes": classes(user, nobody)}
    assert told in headline(tables, 8)[1]


def test_what_an_adjusted_p_does_not_carry_is_not_named():
    tables = {"specificity": specificity([1], [True]), "classes": classes(UP, UP, p=0.06)}
    line = headline(tables, 8)[1]
    assert line.count("is not shown to change (+0.200 nats per token, +0.100 to +0.300, ") == 2
    assert line.count("to +0.300, adjusted p = 0.06)") == 2


MORE, LESS, SAME = (0.05, 0.15), (-0.15, -0.05), (-0.1, 0.1)


@pytest.mark.parametrize(
    ("less", "p", "told"),
    [
        (MORE, 0.01, "the top heads cost more (difference +0.100, +0.050 to +0.150)"),
        (LESS, 0.01, "the top heads cost less (difference -0.100, -0.150 to -0.050)"),
        (SAME, 0.01, "are not shown to cost more or less (difference +0.000, -0.100 to +0.100)"),
        (
            MORE,
            0.06,
            "not shown to cost more or less (difference +0.100, +0.050 to +0.150, adj",
        ),
    ],
)
def test_the_top_heads_are_judged_by_their_paired_difference_to_random_heads(less, p, told):
    # Side by side both rise, whatever the difference says.
    found = classes(UP, UP, random=(0.2, 0.6), less=less, less_p=p)
    line = headline({"specificity": specificity([1], [True]), "classes": found}, 8)[1]
    assert (
        line.count("same layers it changes by +0.400 (+0.200 to +0.600): ") == line.count(told) == 2
    )
    assert line.endswith("whether the two texts lose unlike amounts is not tested.")


def test_without_a_test_or_without_random_heads_that_is_said():
    for found, told in (
        (
            classes(UP, BOTH, random=UP),
            "layers it changes by +0.200 (+0.100 to +0.300), the difference not",
        ),
        (classes(UP, BOTH, random=UP, less=NONE), ", the difference not tested"),
        (classes(UP, BOTH), "Random heads were not removed: the same may be true of any heads."),
    ):
        line = headline({"specificity": specificity([1], [True]), "classes": found}, 8)[1]
        assert told in line
        assert "cost more" not in line and "cost less" not in line


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (sweep(0.1, 0.05, 0.2), "Steering helps (accuracy +0.100"),
        (sweep(0.1, 0.05, 0.2, beaten=1), "helps, though 2 of 3 random sets do as well"),
        (sweep(-0.1, -0.2, -0.05), "Steering hurts"),
        (sweep(-0.1, -0.2, -0.05, better="lower"), "Steering helps"),
        (sweep(0.1, -0.05, 0.2), "is not shown to help"),
        (sweep(0.0, 0.0, 0.0), "is not shown to help"),
        (sweep(0.1, NAN, NAN), "can't be told from one user"),
    ],
)
def test_steering_is_named_by_its_interval_and_by_the_random_sets(found, told):
    lines = headline({"specificity": specificity([1], [True]), "sweep": found}, 8)
    assert told in lines[1]


@pytest.mark.parametrize(
    ("firm", "told"), [(3.0, "3 of the top 8"), (NAN, "can't be told from one")]
)
def test_how_firm_the_heads_are_is_told(firm, told):
    tables = {"specificity": specificity([1], [True]), "recurrence": recurrence(firm)}
    assert told in headline(tables, 8)[1]
