"""Intervals of means over questions, and differences between models on the same questions."""

import itertools
import math
import random

import pytest

from megatron_solopo.evaluation import intervals


@pytest.mark.parametrize(("mean", "count"), [(0.5, 10), (0.9, 512), (0.0, 20), (1.0, 20), (0.17, 300)])
def test_the_wilson_interval_inverts_the_score_test(mean, count):
    """Each end p solves |mean - p| = z sqrt(p (1 - p) / n), unless it is 0 or 1."""
    low, high = intervals.wilson_interval(mean, count)
    assert low <= mean <= high
    for p in (low, high):
        if 0 < p < 1:
            assert abs(mean - p) == pytest.approx(intervals.Z_95 * math.sqrt(p * (1 - p) / count), abs=1e-12)


def test_interval_of_scores_that_are_not_yes_or_no():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        (low, high), method = intervals.mean_interval("f1", [rng.random() for _ in range(50)])
        covered += low <= 0.5 <= high
    assert 0.91 <= covered / 400 <= 0.98 and method == "bootstrap"
    assert intervals.mean_interval("em", [1.0, 0.0, 1.0, 1.0]) == (intervals.wilson_interval(0.75, 4), "wilson")


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
def test_the_interval_of_few_f1_scores_covers_their_mean_at_least_at_its_nominal_rate(count):
    """The bootstrap does not: of one score it has no width at all."""
    rng = random.Random(count)
    covered = 0
    for _ in range(400):
        (low, high), method = intervals.mean_interval("f1", [rng.choice([0.0, 0.4, 0.8, 1.0]) for _ in range(count)])
        covered += low <= 0.55 <= high
    assert method == "wilson_bound" and covered / 400 >= 0.95
    assert intervals.mean_interval("f1", [0.5] * count)[0] == intervals.wilson_interval(0.5, count)


def test_the_interval_of_means_over_depths_is_not_that_of_yes_or_no():
    """A question that was answered at one depth of two counts half, so Wilson's count of outcomes does not hold."""
    halves = [0.5] * 20 + [1.0] * 20
    interval, method = intervals.mean_interval("em", halves)
    assert method == "bootstrap" and interval == intervals.bootstrap_interval(halves)
    assert interval[0] > intervals.wilson_interval(0.75, 40)[0]


def test_the_bootstrap_is_the_quantiles_of_resampled_means():
    """Of the 4 questions 0, 0, 1, 1 a resampled mean is a binomial proportion, whose quantiles are known."""
    chances = [math.comb(4, k) / 16 for k in range(5)]
    low = next(k / 4 for k in range(5) if sum(chances[: k + 1]) >= 0.025)
    high = next(k / 4 for k in range(5) if sum(chances[: k + 1]) >= 0.975)
    assert intervals.bootstrap_interval([0, 1, 0, 1]) == (low, high) == (0.0, 1.0)
    assert intervals.bootstrap_interval([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("baseline", "other", "p_value"),
    [(0, 0, 1.0), (1, 1, 1.0), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (3, 3, 1.0), (10, 2, 2 * 79 / 4096)],
)
def test_mcnemars_p_value_is_the_binomials(baseline, other, p_value):
    assert intervals.mcnemar(baseline, other) == pytest.approx(p_value)
    assert intervals.mcnemar(other, baseline) == pytest.approx(p_value)


def test_models_are_compared_on_the_questions_that_both_answered():
    baseline = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "only here": 1.0}
    other = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "only there": 0.0}
    difference = intervals.paired_difference(baseline, other)
    assert (difference.count, difference.mean, difference.test) == (4, 0.5, "McNemar")
    assert difference.p_value == 0.5 and difference.low <= 0.5 <= difference.high
    assert intervals.paired_difference(baseline, {"z": 1.0}) is None


def test_scores_between_0_and_1_have_a_permutation_test():
    rng = random.Random(0)
    baseline = {str(number): rng.random() for number in range(9)}
    other = {name: score + rng.gauss(0.1, 0.2) for name, score in baseline.items()}
    differences = [other[name] - baseline[name] for name in baseline]
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((-1, 1), repeat=9)
    ]
    exact = sum(abs(flip) >= abs(sum(differences)) - 1e-12 for flip in flips) / len(flips)
    difference = intervals.paired_difference(baseline, other)
    assert difference.test == "sign flips" and 0.01 < exact < 0.5
    assert difference.p_value == pytest.approx(exact, abs=0.02)
