"""Intervals and tests against plain loops, scipy and full enumeration."""

import itertools

import numpy as np
import pytest
from scipy import stats as sps

from workbench.evaluation.metrics import macro_f1
from workbench.stats import (
    bootstrap_mean,
    bootstrap_statistic,
    estimate,
    holm,
    mean_of,
    paired_statistic,
    rank_correlation,
    sign_flip_p,
    simultaneous,
)


def root_mean(sums, counts):
    return np.sqrt(sums[..., 0] / counts)


def clustered(users, examples, trials, seed):
    """Values [user × example, trial] of mean 0 whose users differ more than their examples."""
    rng = np.random.default_rng(seed)
    user = rng.normal(size=(users, 1, trials))
    values = user + 0.5 * rng.normal(size=(users, examples, trials))
    return values.reshape(users * examples, trials), np.repeat(np.arange(users), examples)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    values, groups = clustered(users=30, examples=5, trials=2000, seed=0)
    _, low, high = bootstrap_mean(values, groups, level=0.95)
    coverage = np.mean((low <= 0) & (high >= 0))
    # The percentile bootstrap of 30 users is known to fall a little short of .95; the coverage
    # of 2,000 trials has a standard error of .005.
    assert 0.91 < coverage < 0.97


def test_resampling_examples_instead_of_users_would_be_overconfident():
    values, _ = clustered(users=30, examples=5, trials=500, seed=0)
    _, low, high = bootstrap_mean(values, np.arange(len(values)))
    assert np.mean((low <= 0) & (high >= 0)) < 0.8


def test_the_interval_agrees_with_scipy_on_equal_users():
    values, groups = clustered(users=25, examples=4, trials=1, seed=1)
    result = sps.bootstrap(
        (values.reshape(25, 4).mean(axis=1),),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    _, low, high = bootstrap_mean(values[:, 0], groups)
    # An end is a 2.5 % quantile of 2,000 draws: its standard error is .06 of the means' spread.
    slack = 5 * 0.06 * result.standard_error
    assert low == pytest.approx(result.confidence_interval.low, abs=slack)
    assert high == pytest.approx(result.confidence_interval.high, abs=slack)


def test_users_with_more_examples_weigh_more():
    rng = np.random.default_rng(3)
    groups = np.repeat(list("abcdefgh"), [1, 2, 3, 4, 5, 6, 7, 20])
    values = rng.normal(size=len(groups)) + (groups == "h")
    means = []
    for _ in range(4000):
        drawn = rng.choice(list("abcdefgh"), size=8)
        means.append(np.concatenate([values[groups == user] for user in drawn]).mean())
    mean, low, high = bootstrap_mean(values, groups)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    # Two quantiles of thousands of draws, each with a standard error of .06 spreads or less.
    slack = 5 * 0.09 * np.std(means)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=slack)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=slack)


def test_trailing_positions_are_estimated_as_if_alone():
    values, groups = clustered(users=6, examples=3, trials=8, seed=4)
    together = bootstrap_mean(values.reshape(18, 2, 4), groups)
    for trial in range(8):
        alone = bootstrap_mean(values[:, trial], groups)
        for whole, part in zip(together, alone, strict=True):
            # The same resamples; only the order of a matrix product's sums may differ.
            assert whole.reshape(-1)[trial] == pytest.approx(part, rel=1e-12)


def test_a_missing_position_leaves_the_others_alone():
    values, groups = clustered(users=6, examples=3, trials=2, seed=5)
    values[:, 1] = np.nan
    mean, low, high = bootstrap_mean(values, groups)
    assert np.isfinite([mean[0], low[0], high[0]]).all()
    assert np.isnan([mean[1], low[1], high[1]]).all()


def test_a_single_user_has_a_mean_and_no_interval():
    one = estimate([1.0, 2.0, 3.0], ["a", "a", "a"])
    assert (one.mean, one.n, one.groups) == (2.0, 3, 1)
    assert np.isnan([one.low, one.high]).all()
    assert not one.excludes_zero
    assert str(one) == "2.000 [no interval: 1 user]"


def test_the_same_seed_gives_the_same_interval():
    values, groups = clustered(users=8, examples=2, trials=1, seed=6)
    first = estimate(values[:, 0], groups, seed=1)
    assert first == estimate(values[:, 0], groups, seed=1)
    assert first != estimate(values[:, 0], groups, seed=2)


def test_a_wider_level_gives_a_wider_interval():
    values, groups = clustered(users=12, examples=2, trials=1, seed=7)
    narrow, wide = (estimate(values[:, 0], groups, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_an_estimate_prints_its_interval_in_the_asked_format():
    both = estimate([1.0, 1.0], ["a", "b"])
    assert f"{both:.1f}" == "1.0 [1.0, 1.0]"
    assert both.excludes_zero
    assert not estimate([1.0, -1.0], ["a", "b"]).excludes_zero


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], [])


# Paired test


def test_sign_flips_agree_with_full_enumeration():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(7), [1, 2, 3, 1, 2, 3, 4])
    differences = rng.normal(0.4, 1, size=len(groups))
    sums = [differences[groups == user].sum() for user in range(7)]
    flipped = [abs(np.dot(signs, sums)) for signs in itertools.product([1, -1], repeat=7)]
    exact = np.mean(np.array(flipped) >= abs(sum(sums)) - 1e-9)
    # 10,000 draws of a share have a standard error of at most .005.
    assert sign_flip_p(differences, groups) == pytest.approx(exact, abs=4 * 0.005)


def test_examples_of_one_user_are_no_independent_evidence():
    # Two users: of the four sign assignments two are as far out, whatever the examples.
    assert sign_flip_p(np.ones(200), np.repeat([0, 1], 100)) == pytest.approx(0.5, abs=0.02)
    assert sign_flip_p(np.ones(200), np.arange(200)) < 0.001


def test_sign_flip_p_is_uniform_without_an_effect():
    values, groups = clustered(users=14, examples=3, trials=300, seed=1)
    p = [sign_flip_p(values[:, trial], groups, seed=trial) for trial in range(300)]
    assert sps.kstest(p, "uniform").pvalue > 0.01  # seeded: it is .2 or more, or the test is wrong
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09  # two to three standard errors about .05


def test_sign_flip_p_is_small_under_an_effect_and_never_zero():
    values, groups = clustered(users=40, examples=3, trials=1, seed=2)
    p = sign_flip_p(values[:, 0] + 1.5, groups)
    assert 0 < p < 0.001


def test_no_difference_at_all_has_p_one():
    assert sign_flip_p(np.zeros(6), [0, 0, 1, 1, 2, 2]) == 1.0


def test_a_missing_difference_gives_no_p():
    # A comparison with NaN is false, which would count as the smallest p there is.
    assert np.isnan(sign_flip_p([1.0, np.nan, 2.0], [0, 1, 2]))


def test_differences_that_cancel_are_reached_by_every_flip():
    # .1 + .2 + .3 - .6 is not 0 in floating point, and in another order it is.
    assert sign_flip_p([0.1, 0.2, 0.3, -0.6], [0, 1, 2, 3]) == 1.0
    a, b = np.array([[0.1], [0.2], [0.3], [0.0]]), np.array([[0.0], [0.0], [0.0], [0.6]])
    assert paired_statistic(a, b, [0, 1, 2, 3], mean_of)[1] == 1.0


# Statistics that are no means


def test_a_mean_through_its_sums_is_the_mean():
    values, groups = clustered(users=12, examples=3, trials=1, seed=8)
    plain, pooled = estimate(values[:, 0], groups), bootstrap_statistic(values, groups, mean_of)
    assert (pooled.n, pooled.groups) == (plain.n, plain.groups) == (36, 12)
    # The same resamples; only the order of sums may differ.
    for end in ("mean", "low", "high"):
        assert getattr(pooled, end) == pytest.approx(getattr(plain, end), rel=1e-12)


def test_a_paired_mean_through_its_sums_is_the_mean_difference():
    values, groups = clustered(users=9, examples=3, trials=2, seed=9)
    a, b = values[:, :1] + 0.5, values[:, 1:]
    found, p = paired_statistic(a, b, groups, mean_of, level=0.9, seed=3)
    plain = estimate((a - b)[:, 0], groups, level=0.9, seed=3)
    for end in ("mean", "low", "high"):
        assert getattr(found, end) == pytest.approx(getattr(plain, end), rel=1e-12)
    assert p == sign_flip_p((a - b)[:, 0], groups, seed=3)


def test_the_interval_of_a_root_mean_square_agrees_with_a_plain_loop():
    values, groups = clustered(users=20, examples=3, trials=1, seed=10)
    found = bootstrap_statistic(values**2, groups, root_mean)
    rng = np.random.default_rng(0)
    by_user = values.reshape(20, 3)
    drawn = [np.sqrt(np.mean(by_user[rng.integers(0, 20, 20)] ** 2)) for _ in range(4000)]
    assert found.mean == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-12)
    # Two quantiles of thousands of draws, each with a standard error of .06 spreads or less.
    slack = 5 * 0.09 * np.std(drawn)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=slack)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=slack)


def test_swaps_agree_with_full_enumeration():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(7), [1, 2, 3, 1, 2, 3, 4])
    a = rng.normal(0.3, 1.5, size=len(groups)) ** 2
    b = rng.normal(0, 1, size=len(groups)) ** 2
    differences = []
    for swapped in itertools.product([False, True], repeat=7):
        mask = np.array(swapped)[groups]
        left, right = np.where(mask, b, a), np.where(mask, a, b)
        differences.append(np.sqrt(left.mean()) - np.sqrt(right.mean()))
    observed = differences[0]
    exact = np.mean(np.abs(differences) >= abs(observed) - 1e-9)
    found, p = paired_statistic(a[:, None], b[:, None], groups, root_mean)
    assert found.mean == pytest.approx(observed, rel=1e-12)
    assert 0.05 < exact < 0.95  # or the test would see nothing
    # 10,000 draws of a share have a standard error of at most .005.
    assert p == pytest.approx(exact, abs=4 * 0.005)


def squared_errors(rng):
    """Squares [example, 1] of two equally good sides, of 20 users who differ."""
    spread = np.repeat(rng.uniform(0.5, 2, 20), 4)
    return [(spread * rng.normal(size=80))[:, None] ** 2 for _ in range(2)]


def label_parts(rng):
    """Hits, answers and golds [example, 3 * 4] of two equally good sides of 20 users."""
    gold = rng.integers(0, 4, 80)
    ability = np.repeat(rng.uniform(0.2, 0.9, 20), 4)
    sides = []
    for _ in range(2):
        said = np.where(rng.random(80) < ability, gold, rng.integers(0, 4, 80))
        eye = np.eye(4)
        sides.append(np.hstack([eye[said] * (said == gold)[:, None], eye[said], eye[gold]]))
    return sides


@pytest.mark.parametrize(
    ("draw", "combine"), [(squared_errors, root_mean), (label_parts, macro_f1)]
)
def test_a_paired_test_rejects_without_a_difference_as_often_as_it_says(draw, combine):
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 4)
    p = np.array([paired_statistic(*draw(rng), groups, combine, seed=i)[1] for i in range(300)])
    assert 0.02 < np.mean(p < 0.05) < 0.09  # two to three standard errors about .05
    assert sps.kstest(p, "uniform").pvalue > 0.01


def test_examples_of_one_user_are_swapped_together():
    # Side a is always better, by two users: they are as far apart in half of the assignments.
    a, b = np.full((200, 1), 1.0), np.full((200, 1), 4.0)
    assert paired_statistic(a, b, np.repeat([0, 1], 100), root_mean)[1] == pytest.approx(
        0.5, abs=0.02
    )
    found, p = paired_statistic(a, b, np.arange(200), root_mean)
    assert 0 < p < 0.001
    assert (found.mean, found.low, found.high) == (-1.0, -1.0, -1.0)


def test_swapping_the_sides_turns_the_difference_round():
    a, b = squared_errors(np.random.default_rng(3))
    groups = np.repeat(np.arange(20), 4)
    (there, p), (back, q) = (
        paired_statistic(*sides, groups, root_mean) for sides in ((a, b), (b, a))
    )
    assert (there.mean, p) == (-back.mean, q)
    # A quantile of the mirrored draws interpolates from the other side.
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), rel=1e-9)


def test_sums_of_squares_stay_squares_when_swapped():
    # The errors of one side are 0: taken as a half of a sum minus a difference, its sum would
    # round below 0 and its root to NaN, with a warning.
    a = np.array([[0.1], [0.7], [1e-9], [0.3]]) ** 2 * 3.3
    _, p = paired_statistic(a, np.zeros((4, 1)), [0, 1, 2, 3], root_mean)
    assert p == pytest.approx(2 / 16, abs=0.02)


def test_equal_sides_have_no_difference_and_p_one():
    a, _ = label_parts(np.random.default_rng(4))
    found, p = paired_statistic(a, a, np.repeat(np.arange(20), 4), macro_f1)
    assert (found.mean, found.low, found.high, p) == (0.0, 0.0, 0.0, 1.0)


def test_a_missing_part_gives_no_statistic():
    # A macro F1 compares its sums with 0, which would take NaN for a label nobody named.
    a, b = label_parts(np.random.default_rng(5))
    groups = np.repeat(np.arange(20), 4)
    a[3, 4:] = np.nan  # what was said, and what is so
    alone = bootstrap_statistic(a, groups, macro_f1)
    assert np.isnan([alone.mean, alone.low, alone.high]).all()
    found, p = paired_statistic(a, b, groups, macro_f1)
    assert np.isnan([found.mean, found.low, found.high, p]).all()


def test_a_statistic_that_is_missing_gives_no_p():
    def ratio(sums, counts):
        return np.where(sums[..., 0] > 2, np.nan, sums[..., 0])

    a, b = np.array([[1.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [0.0]])
    assert np.isnan(paired_statistic(a, b, [0, 1, 2], ratio)[1])


def test_a_single_user_has_a_statistic_and_no_interval():
    a, b = np.array([[4.0], [4.0]]), np.array([[1.0], [1.0]])
    alone = bootstrap_statistic(a, ["u", "u"], root_mean)
    assert (alone.mean, alone.n, alone.groups) == (2.0, 2, 1)
    found, p = paired_statistic(a, b, ["u", "u"], root_mean)
    assert (found.mean, p) == (1.0, 1.0)
    assert np.isnan([alone.low, alone.high, found.low, found.high]).all()


def test_parts_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"parts are \[example, part\] .* got \(3,\)"):
        bootstrap_statistic([1.0, 2.0, 3.0], [0, 1, 2], mean_of)
    with pytest.raises(ValueError, match=r"got \(0, 1\)"):
        bootstrap_statistic(np.empty((0, 1)), [], mean_of)
    with pytest.raises(ValueError, match=r"got shapes \(2, 1\) and \(2, 3\)"):
        paired_statistic(np.ones((2, 1)), np.ones((2, 3)), [0, 1], mean_of)


# Several tests


def test_holm_on_a_hand_worked_example():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last may not fall below .06.
    np.testing.assert_allclose(
        holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=1e-12
    )


def test_holm_caps_at_one_and_leaves_a_single_test_alone():
    np.testing.assert_array_equal(holm([0.6, 0.9]), [1.0, 1.0])
    np.testing.assert_array_equal(holm([0.03]), [0.03])
    assert holm([]).shape == (0,)


def test_holm_decides_as_the_step_down_procedure_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.1, size=6)
        rejected, going = set(), True
        for step, i in enumerate(np.argsort(p)):
            going = going and p[i] <= 0.05 / (6 - step)
            if going:
                rejected.add(int(i))
        assert set(np.flatnonzero(holm(p) <= 0.05).tolist()) == rejected


def correlated_nulls(trial, users=20, examples=3, positions=30):
    """Values [example, position] of mean 0 whose positions and users hang together."""
    rng = np.random.default_rng((7, trial))
    user = rng.normal(size=(users, 1, positions)) + rng.normal(size=(users, 1, 1))
    values = user + rng.normal(size=(users, examples, positions))
    return values.reshape(-1, positions), np.repeat(np.arange(users), examples)


def test_any_false_finding_among_many_heads_is_as_rare_as_promised():
    trials, families, single = 300, 0, 0
    for trial in range(trials):
        values, groups = correlated_nulls(trial)
        _, low, high, _ = simultaneous(values, groups)
        families += bool(((low > 0) | (high < 0)).any())
        single += bool(
            (np.abs(sps.ttest_1samp(values.reshape(20, 3, -1).mean(1), 0)[0]) > 2.1).any()
        )
    # Binomial at 5 %: fewer than 4 or more than 29 of 300 have a probability of 4e-4.
    assert 4 <= families <= 29
    assert single > 90  # what heads tested one by one would come to


def skewed(rng, users):
    """Exponential means of users, the same for all positions in part; 0 in the population."""
    own, shared = rng.exponential(size=(users, 1, 30)), rng.exponential(size=(users, 1, 1))
    return own + shared - 2, 1.0


def of_few(rng, users):
    """One user in ten has an effect, at all positions; 0 in the population."""
    return (rng.random((users, 1, 1)) < 0.1) * rng.exponential(size=(users, 1, 30)) - 0.1, 0.1


def of_others_each(rng, users):
    """One user in ten has an effect, another one at each position; 0 in the population."""
    sizes = rng.exponential(size=(users, 1, 1)) + rng.exponential(size=(users, 1, 30))
    return (rng.random((users, 1, 30)) < 0.1) * sizes / 2 - 0.1, 0.1


@pytest.mark.parametrize(
    ("draw", "users"),
    [(skewed, 16), (skewed, 48), (of_few, 48), (of_others_each, 16), (of_others_each, 48)],
)
def test_skewed_users_and_rare_effects_make_no_false_findings(draw, users):
    trials, families = 150, 0
    for trial in range(trials):
        rng = np.random.default_rng((11, trial))
        means, scale = draw(rng, users)
        values = (means + scale * rng.normal(size=(users, 3, 30))).reshape(-1, 30)
        _, low, high, _ = simultaneous(values, np.repeat(np.arange(users), 3))
        families += bool(((low > 0) | (high < 0)).any())
    # Binomial at 5 %: more than 17 of 150 have a probability of 5e-4. Sign flips, which take
    # users for symmetric, come to 106 and more of 150 where effects are rare.
    assert families <= 17


def test_the_few_users_of_a_rare_effect_are_no_proof_against_it():
    # Of 12 users one has an effect: a third of the draws are without it, and all alike.
    values = np.zeros((12, 3))
    values[:, 0] = np.random.default_rng(1).normal(size=12)
    values[:, 1] = -0.1
    values[4, 1] = 3.0
    values[:, 2] = -values[:, 1]
    _, low, high, p = simultaneous(values, np.arange(12))
    assert np.isnan(high).tolist() == [False, True, False]
    assert np.isnan(low).tolist() == [False, False, True]
    assert low[1] < 0 < high[2] and p.min() > 0.05
    # On the side where it has no end it takes none from the others.
    both, alone = (simultaneous(values[:, :number], np.arange(12)) for number in (2, 1))
    assert both[2][0] == pytest.approx(alone[2][0], rel=1e-12)
    few = np.array([1.0, 1, 1, -2, -2, -2])[:, None]
    # (1 / 2) ** 6 of the draws lie beyond each end: more than half of 1 %, less than 2.5 %.
    assert np.isnan(simultaneous(few, np.arange(6), level=0.99)[1:]).all()
    assert np.isfinite(simultaneous(few, np.arange(6))[3]).all()


@pytest.mark.parametrize("users", [6, 8, 20])
def test_an_interval_leaves_zero_out_exactly_where_p_is_small(users):
    found = 0
    for trial in range(60):
        values, groups = correlated_nulls(trial, users=users)
        values = values + np.random.default_rng(trial).normal(scale=3, size=30)
        _, low, high, p = simultaneous(np.exp(values / 2) - 1.5, groups)
        assert ((p <= 0.05) == ((low > 0) | (high < 0))).all()
        found += bool((p <= 0.05).any())
    assert found or users < 8


def test_fewer_than_six_users_are_not_judged():
    values = 5 + 0.1 * np.random.default_rng(0).normal(size=(6, 3))
    _, low, _, p = simultaneous(values, np.arange(6))
    assert (low < values.mean(axis=0)).all() and np.isfinite(p).all()
    assert np.isnan(simultaneous(values[:5], np.arange(5))[1:]).all()


def test_a_planted_effect_is_found_and_nothing_beside_it():
    values, groups = correlated_nulls(1)
    values[:, 4] += 4.0
    mean, low, high, p = simultaneous(values, groups)
    assert np.flatnonzero((low > 0) | (high < 0)).tolist() == [4]
    assert p[4] < 0.001 < p[np.arange(30) != 4].min()
    assert low[4] < mean[4] < high[4] and mean == pytest.approx(values.mean(axis=0), rel=1e-12)


def test_simultaneous_intervals_cover_all_means_where_all_heads_have_effects():
    missed = 0
    for trial in range(300):
        values, groups = correlated_nulls(trial)
        _, low, high, _ = simultaneous(values + 10.0, groups)
        missed += bool(((low > 10) | (high < 10)).any())
    assert 4 <= missed <= 32


def test_ends_and_p_are_those_of_all_draws_of_users():
    rng = np.random.default_rng(3)
    counts = np.array([1, 2, 3, 1, 2, 4])
    groups = np.repeat(np.arange(6), counts)
    values = rng.exponential(size=(13, 3)) + np.array([0.1, -0.5, -1.5])
    sums = np.stack([values[groups == user].sum(axis=0) for user in range(6)])

    def ratio(drawn):
        """Mean [draw, position] and its linearised standard error."""
        sizes = counts[drawn].sum(axis=1)
        mean = sums[drawn].sum(axis=1) / sizes[:, None]
        left = sums[drawn] - mean[:, None] * counts[drawn][:, :, None]
        return mean, np.sqrt((left**2).sum(axis=1) * 6 / 5) / sizes[:, None]

    mean, se = (part[0] for part in ratio(np.arange(6)[None]))
    means, errors = ratio(np.array(list(itertools.product(range(6), repeat=6))))
    alike = errors < 1e-9  # one user six times over
    assert alike.mean() == pytest.approx(6 / 6**6)
    ends = np.where(means > mean, np.inf, -np.inf)
    t = np.where(alike, ends, (means - mean) / np.where(alike, 1, errors))
    found, low, high, p = simultaneous(values, groups)
    assert found == pytest.approx(mean, rel=1e-12)
    # A quantile of 2,000 draws lies between those at two to three standard errors, .0035 each.
    for end, draws in (((mean - low) / se, t.max(axis=1)), ((high - mean) / se, -t.min(axis=1))):
        assert end == pytest.approx([end[0]] * 3, rel=1e-6)
        assert np.quantile(draws, 0.966) < end[0] < np.quantile(draws, 0.984)
    up, down = t.max(axis=1)[:, None] >= mean / se, t.min(axis=1)[:, None] <= mean / se
    exact = np.minimum(1, 2 * np.minimum(up.mean(axis=0), down.mean(axis=0)))
    assert exact.min() < 0.2
    assert p == pytest.approx(exact, abs=0.06)  # twice a share, of standard error .011 at most


def test_users_with_the_same_mean_have_no_spread_however_many_examples_they_have():
    values = np.full((9, 1), 0.1)
    _, low, high, p = simultaneous(values, np.repeat(np.arange(6), [1, 1, 1, 1, 2, 3]))
    assert np.isnan([low, high]).all() and p.tolist() == [1.0]


def test_many_positions_in_parts_are_those_of_one_loop():
    values, groups = correlated_nulls(2, positions=300)
    values[:, 0] = np.repeat(np.random.default_rng(0).exponential(size=20) ** 3, 3)
    _, low, high, _ = simultaneous(values, groups)
    # One family has one factor, whichever part a position was in.
    sums = values.reshape(20, 3, 300).sum(axis=1)
    se = sums.std(axis=0, ddof=1) * np.sqrt(20) / 60
    for end in (low, high):
        c = np.abs(end - values.mean(axis=0)) / se
        assert c == pytest.approx([c[0]] * 300, rel=1e-9)
    # The first position's tail is the longest, and the last one's end is as far out for it.
    without = simultaneous(values[:, 1:], groups)
    assert high[-1] > without[2][-1] + se[-1]


def test_positions_without_spread_or_numbers_are_no_findings():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 4))
    values[:, 1], values[:, 2] = 0.0, 0.1
    values[3, 3] = np.nan
    mean, low, high, p = simultaneous(values, np.repeat(np.arange(6), 2))
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, True, True, True]
    assert p[1:3].tolist() == [1, 1] and np.isnan([mean[3], p[3]]).all()
    alone = simultaneous(values[:, :1], np.repeat(np.arange(6), 2))
    assert (low[0], high[0], p[0]) == (alone[1][0], alone[2][0], alone[3][0])


def test_one_user_gives_no_simultaneous_interval_and_no_p():
    mean, low, high, p = simultaneous(np.arange(6.0).reshape(3, 2), ["a"] * 3)
    assert mean.tolist() == [2, 3] and np.isnan([low, high, p]).all()
    with pytest.raises(ValueError, match="no values"):
        simultaneous(np.zeros((0, 2)), [])


def test_simultaneous_keeps_the_trailing_shape():
    values, groups = correlated_nulls(0)
    flat = simultaneous(values, groups)
    square = simultaneous(values.reshape(-1, 5, 6), groups)
    for a, b in zip(flat, square, strict=True):
        assert np.array_equal(a.reshape(5, 6), b)


def test_rank_correlation_is_scipys_and_its_interval_covers():
    rng = np.random.default_rng(5)
    truth, covered, found = rng.normal(size=40), 0, []
    other = 0.7 * truth + 0.7 * rng.normal(size=40)
    real = sps.spearmanr(truth, other).statistic
    for _ in range(60):
        a = truth + rng.normal(size=(60, 40))
        b = other + rng.normal(size=(30, 40))
        result = rank_correlation(a, np.repeat(np.arange(20), 3), b, np.arange(30))
        found.append((result.mean, sps.spearmanr(a.mean(0), b.mean(0)).statistic))
        covered += result.low < real < result.high
    assert np.ptp(found, axis=1).max() < 1e-12
    assert (result.n, result.groups) == (40, 20)
    # Binomial at 95 %: fewer than 50 of 60 has a probability of 3e-4.
    assert covered >= 50


def test_rank_correlation_without_the_means_for_an_interval_says_so():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    one = rank_correlation(a, ["u"] * 6, b, np.arange(6))
    assert -1 <= one.mean <= 1 and np.isnan(one.low) and np.isnan(one.high)
    assert np.isnan(rank_correlation(a, np.arange(6), np.ones((6, 4)), np.arange(6)).mean)
    a[0, 0] = b[0, 1] = np.nan
    assert np.isnan(rank_correlation(a, np.arange(6), b, np.arange(6)).mean)
    with pytest.raises(ValueError, match="same positions"):
        rank_correlation(a, np.arange(6), b[:, :2], np.arange(6))
