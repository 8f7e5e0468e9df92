"""How a response is compared with the gold answers: sub-EM, EM and F1 on normalised text (`answers.normalise`).

EM and F1 are SQuAD's (evaluate-v2.0.py, arXiv 1806.03822), MuSiQue's (metrics/answer.py, arXiv 2108.00573) and
HotpotQA's (hotpot_evaluate_v1.py, arXiv 1809.09600) with ``--normalisation squad``, but for what each docstring names.
``module:function`` names a function of the user instead.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import numpy as np

from megatron_solopo.data.answers import answers_response, golds, normalise
from megatron_solopo.errors import UserError
from megatron_solopo.metrics import ACCURACY, Metric, register
from megatron_solopo.user_function import error_text, load_function, short, source_digest

AnswerScore = Callable[..., float]
"""(prediction, gold answers, fold): ``fold`` as in `answers.normalise`; its default differs between scores."""

SCORERS: dict[str, AnswerScore] = {}
"""The scores by their names in options and files, in the order of tables."""


def _scorer(label: str, binary: bool = True) -> Callable[[AnswerScore], AnswerScore]:
    """Registers a function as a score under its name; ``binary``: its values are 0 and 1."""

    def add(function: AnswerScore) -> AnswerScore:
        name = function.__name__
        register(Metric(name, label, higher_is_better=True, figure=ACCURACY, limits=(0, 1), binary=binary))
        SCORERS[name] = function
        return function

    return add


@_scorer("sub-EM")
def sub_em(prediction: str, answers: Iterable[str], fold: bool = True) -> float:
    """1.0 when any gold answer is found in the prediction, else 0.0; short ones count in its answer part only.

    `answers.answers_response` has the rule, which differs from the paper's sub-EM for short gold answers (yes, no,
    one short word, a number) and for numbers at the edge of longer ones.
    """
    return float(answers_response(prediction, answers, fold))


@_scorer("plain sub-EM")
def sub_em_plain(prediction: str, answers: Iterable[str], fold: bool = False) -> float:
    """1.0 when any normalised answer is a substring of the normalised prediction, else 0.0: sub-EM of arXiv 2505.11166.

    It finds "no" in "not". An answer of articles and punctuation alone is never found.
    """
    text = normalise(prediction, fold)
    return float(any(gold.text in text for gold in golds(answers, fold) if gold.keep == "words"))


@_scorer("EM")
def em(prediction: str, answers: Iterable[str], fold: bool = True) -> float:
    """1.0 when the normalised prediction equals any normalised answer, else 0.0.

    Answers of articles or punctuation alone are compared as they are; the three scripts compare empty texts there.
    """
    return float(any(normalise(prediction, fold, gold.keep) == gold.text for gold in golds(answers, fold)))


_JUDGEMENTS = frozenset({"yes", "no", "noanswer"})


@_scorer("F1", binary=False)
def f1(prediction: str, answers: Iterable[str], fold: bool = True) -> float:
    """Returns the best F1 of words between the prediction and any answer, in [0, 1].

    HotpotQA's rule for yes, no and noanswer: 0 unless prediction and answer are equal. SQuAD and MuSiQue count the
    shared words there too.
    """
    best = 0.0
    for gold in golds(answers, fold):
        text = normalise(prediction, fold, gold.keep)
        if text != gold.text and not _JUDGEMENTS.isdisjoint((text, gold.text)):
            continue
        words, gold_words = Counter(text.split()), Counter(gold.text.split())
        # 2 P R / (P + R) with P = common / found and R = common / gold.
        best = max(best, 2 * (words & gold_words).total() / (words.total() + gold_words.total()))
    return best


NORMALISATIONS = {"unicode": True, "squad": False}
"""Choice of ``--normalisation`` -> ``fold`` of `answers.normalise`."""


def score(name: str, prediction: str, answers: Iterable[str], normalisation: str | None = None) -> float:
    """Returns a score of `SCORERS` by name; ``normalisation=None`` is its default, and plain sub-EM has no other."""
    if normalisation is None or name == "sub_em_plain":
        return SCORERS[name](prediction, answers)
    return SCORERS[name](prediction, answers, NORMALISATIONS[normalisation])


Scorer = Callable[[str, Sequence[str], str], float]
"""(response, accepted answers, question) -> a finite score; higher is better."""


def load_scorer(name: str, normalisation: str | None = None) -> Scorer:
    """Returns a metric of `SCORERS`, or a user's function named ``module:function``.

    Args:
        normalisation: a key of `NORMALISATIONS`; None is the metric's default.

    The module is searched in the current folder first, then on the path of Python. The function is called as
    ``function(response, answers)``, with ``question=...`` if it has such a parameter, and returns a number or a bool.

    Raises:
        UserError: there is no such metric, module or function, or the scorer has no normalisation. Later,
            from the scorer: the function raised, or did not return a finite number.
    """
    flag = f"--scorer {name}"
    if normalisation is not None and (name == "sub_em_plain" or name not in SCORERS):
        raise UserError(
            "option-unused",
            f"--normalisation {normalisation} has no effect with {flag}, which defines its comparison of texts; "
            "leave it out",
        )
    if name in SCORERS:
        return lambda response, answers, question: score(name, response, answers, normalisation)
    return UserScorer(flag, load_function(flag, name, SCORERS))


class UserScorer:
    """A scorer of the user; an error names the response that the function was called for.

    Attributes:
        digest: hash of the file that holds the function.
    """

    def __init__(self, flag: str, function: Callable[..., object]) -> None:
        self._flag, self._function, self.digest = flag, function, source_digest(function)
        try:
            self._with_question = "question" in inspect.signature(function).parameters
        except (TypeError, ValueError):  # functions written in C may have no signature
            self._with_question = False

    def __call__(self, response: str, answers: Sequence[str], question: str) -> float:
        extra = {"question": question} if self._with_question else {}
        try:
            score = self._function(response, list(answers), **extra)
        except Exception as error:
            raise UserError(
                "scorer-raises", f"{self._flag}: raised {error_text(error)} for the response {short(response)}"
            ) from None
        if not isinstance(score, Real | np.bool_) or not math.isfinite(score):
            raise UserError(
                "scorer-value",
                f"{self._flag}: returned {short(score)} for the response {short(response)}; a score is a finite "
                "number, or True or False",
            )
        return float(score)
