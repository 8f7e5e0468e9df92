"""Scores of the benchmarks of ``--tasks``, as their own scripts compute them, beside those of `data.scoring`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_solopo.data.answers import normalise
from megatron_solopo.data.scoring import SCORERS, AnswerScore, score
from megatron_solopo.metrics import ACCURACY, Metric, register

BENCHMARK_SCORERS: dict[str, AnswerScore] = {}
"""(prediction, gold answers) -> score in [0, 1], by name."""


def _benchmark(label: str, binary: bool) -> Callable[[AnswerScore], AnswerScore]:
    def add(function: AnswerScore) -> AnswerScore:
        name = function.__name__
        register(Metric(name, label, higher_is_better=True, figure=ACCURACY, limits=(0, 1), binary=binary))
        BENCHMARK_SCORERS[name] = function
        return function

    return add


_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def _ruler_matches(prediction: str, answers: Sequence[str]) -> list[bool]:
    """Whether each answer is in the prediction, in any case; control characters are line breaks there.

    RULER (arXiv 2404.06654), scripts/eval: ``postprocess_pred`` of evaluate.py, then synthetic/constants.py.
    """
    text = _UNPRINTABLE.sub("\n", prediction.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]


@_benchmark("RULER recall", binary=False)
def ruler_all(prediction: str, answers: Sequence[str]) -> float:
    """Returns the share of the answers that are in the prediction: RULER's ``string_match_all``."""
    matches = _ruler_matches(prediction, answers)
    return sum(matches) / len(matches)


@_benchmark("RULER match", binary=True)
def ruler_part(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when any answer is in the prediction, else 0.0: RULER's ``string_match_part``, of its QA tasks."""
    return float(any(_ruler_matches(prediction, answers)))


@_benchmark("LongBench F1", binary=False)
def longbench_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best F1 of words between the prediction and any answer: LongBench's ``qa_f1_score``.

    LongBench (arXiv 2308.14508), metrics.py and eval.py: SQuAD's normalisation, and 0 where no word is shared. Unlike
    HotpotQA's F1 (`scoring.f1`) it has no rule for yes and no.
    """
    words = Counter(normalise(prediction, fold=False).split())
    best = 0.0
    for answer in answers:
        gold = Counter(normalise(answer, fold=False).split())
        if shared := (words & gold).total():
            best = max(best, 2 * shared / (words.total() + gold.total()))
    return best


_STATED = re.compile(r"The correct answer is \(([A-D])\)|The correct answer is ([A-D])")


@_benchmark("choice accuracy", binary=True)
def choice(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is the letter of the right choice, else 0.0: accuracy of MMLU (arXiv 2009.03300),
    evaluate.py."""
    return float(prediction in answers)


@_benchmark("LongBench v2 accuracy", binary=True)
def longbench_v2(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the response states the letter of the right choice, else 0.0.

    LongBench v2 (arXiv 2412.15204), ``extract_answer`` of pred.py: asterisks are removed; ``The correct answer is
    (X)`` is searched first, then the same without brackets; another form is no answer.
    """
    text = prediction.replace("*", "")
    matches = list(_STATED.finditer(text))
    stated = next((match for match in matches if match[1]), next(iter(matches), None))
    return choice(stated[1] or stated[2], answers) if stated else 0.0


GOLD_LOG_PROB = "gold_log_prob"
"""The score of --gold-log-prob, which the model computes and no text has."""
register(Metric(GOLD_LOG_PROB, "log-prob of the gold answer", "nats per token", True, figure=ACCURACY))


def score_answer(name: str, prediction: str, answers: Sequence[str], normalisation: str | None) -> float:
    """Returns a score by name; ``normalisation`` as in `scoring.score`, whose scores alone have one."""
    if name in SCORERS:
        return score(name, prediction, answers, normalisation)
    return BENCHMARK_SCORERS[name](prediction, answers)
