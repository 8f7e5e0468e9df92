"""Intervals of means over questions, and differences between models on the same questions.

The unit is the question: what was asked about it several times, at several depths or with several seeds, is averaged
first, because those answers are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_solopo.metrics import metric_of

Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

DRAWS = 10_000
"""Resamples of a bootstrap, and sign flips of a permutation test; both have a fixed seed."""

ENOUGH_FOR_BOOTSTRAP = 30
"""Values from which on the spread among them is trusted."""

INTERVAL_METHODS = {
    "wilson": "Wilson score interval",
    "wilson_bound": "Wilson score interval, an upper bound of the width",
    "bootstrap": "bootstrap over questions",
    "normal": "normal approximation",
}
"""How an interval was computed: its name in an evaluation file -> its name for people. Older files have "normal"."""


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion of ``count`` yes-or-no outcomes (Wilson 1927); honest near 0 and 1 too."""
    if count == 0:
        return 0.0, 1.0
    shrink = 1 + Z_95**2 / count
    centre = (mean + Z_95**2 / (2 * count)) / shrink
    half = Z_95 / shrink * math.sqrt(mean * (1 - mean) / count + Z_95**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean: 2.5 % and 97.5 % quantiles of `DRAWS` resampled means (Efron 1979)."""
    low, high = np.quantile(_resampled_means(np.asarray(values, dtype=float)), [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Returns [DRAWS] means of as many values, drawn with replacement."""
    rng = np.random.default_rng(0)
    # By blocks, so that a draw of thousands of questions does not need gigabytes.
    block = max(1, 10_000_000 // len(values))
    sizes = [min(block, DRAWS - first) for first in range(0, DRAWS, block)]
    return np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes])


def mean_interval(metric: str, values: Sequence[float]) -> tuple[tuple[float, float], str]:
    """95 % interval of the mean of a metric over questions, and how it was computed (`INTERVAL_METHODS`).

    sub-EM and EM are 0 or 1 for each question (`Metric.binary`): Wilson's interval. F1, recall, and means of a
    question over depths lie between, and have the bootstrap's. Below `ENOUGH_FOR_BOOTSTRAP` questions that is too
    narrow (with one question it has no width), so they have Wilson's interval of their mean there: values in [0, 1]
    vary at most as zeros and ones of the same mean do. Log-probs have the bootstrap's whatever their number.

    Args:
        values: one a question, within the metric's limits if it has any.
    """
    count = len(values)
    mean = sum(values) / count if count else 0.0
    if metric_of(metric).binary and all(value in (0, 1) for value in values):
        return wilson_interval(mean, count), "wilson"
    if count < ENOUGH_FOR_BOOTSTRAP and metric_of(metric).is_share:
        return wilson_interval(mean, count), "wilson_bound"
    return bootstrap_interval(values), "bootstrap"


def intervals_text(methods: Iterable[dict[str, str]]) -> str:
    """Returns how the intervals of several results were computed, each by metric: "sub-EM, EM: Wilson score interval;
    ..."."""
    of_metric: dict[str, dict[str, None]] = {}
    for one in methods:
        for metric, method in one.items():
            of_metric.setdefault(metric, {})[INTERVAL_METHODS.get(method, method)] = None
    metrics_of: dict[str, list[str]] = {}
    for metric, names in of_metric.items():
        metrics_of.setdefault(" or ".join(names), []).append(metric_of(metric).label)
    return "; ".join(f"{', '.join(labels)}: {names}" for names, labels in metrics_of.items())


@dataclass(frozen=True)
class PairedDifference:
    """How much better a model is than a baseline on the questions that both answered.

    Attributes:
        count: number of those questions.
        mean: mean of the differences of a question's score.
        low, high: 95 % interval of that mean, by bootstrap over questions.
        p_value: two-sided, of no difference; by ``test``.
        test: ``McNemar`` or ``sign flips``.
    """

    count: int
    mean: float
    low: float
    high: float
    p_value: float
    test: str


def paired_difference(baseline: Mapping[str, float], other: Mapping[str, float]) -> PairedDifference | None:
    """Compares two models question by question; None where they answered no common question.

    Scores of 0 and 1 have McNemar's exact test (McNemar 1947): of the questions that one model alone answered, each
    is either's with probability 1/2. Other scores have a permutation test that flips the signs of the differences
    (Fisher 1935), with `DRAWS` random flips, of which the observed one is counted too.

    Args:
        baseline, other: question -> its score.
    """
    shared = [question for question in baseline if question in other]
    if not shared:
        return None
    differences = np.array([other[question] - baseline[question] for question in shared])
    low, high = bootstrap_interval(differences.tolist())
    if all(scores[question] in (0, 1) for scores in (baseline, other) for question in shared):
        p_value, test = mcnemar(int((differences < 0).sum()), int((differences > 0).sum())), "McNemar"
    else:
        p_value, test = _sign_flips(differences), "sign flips"
    return PairedDifference(len(shared), float(differences.mean()), low, high, p_value, test)


def mcnemar(only_baseline: int, only_other: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    Args:
        only_baseline, only_other: questions that only the one, only the other model answered.
    """
    discordant = only_baseline + only_other
    smaller = min(only_baseline, only_other)
    tail = sum(math.comb(discordant, count) for count in range(smaller + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _sign_flips(differences: np.ndarray) -> float:
    rng = np.random.default_rng(0)
    observed = abs(differences.sum())
    differing = differences[differences != 0]
    block = max(1, 10_000_000 // max(len(differing), 1))
    extreme = 0
    for first in range(0, DRAWS, block):
        signs = rng.choice([-1.0, 1.0], size=(min(block, DRAWS - first), len(differing)))
        extreme += int((np.abs(signs @ differing) >= observed - 1e-12).sum())
    return (extreme + 1) / (DRAWS + 1)
