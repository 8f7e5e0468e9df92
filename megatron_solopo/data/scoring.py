"""How a response is compared with the gold answers: sub-EM, EM and F1 on normalised text.

Normalisation is SQuAD's (Rajpurkar et al., EMNLP 2016): lower case, no ASCII punctuation, no English
articles, single spaces. A gold answer that normalises to nothing ("The", "?") matches nothing, because the
empty string is a substring of every text. A user's own function takes their place as ``module:function``.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import numpy as np

from megatron_solopo.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """``text`` in lower case, without ASCII punctuation and articles, words joined by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_answers(answers: Iterable[str]) -> list[str]:
    """The distinct non-empty normalised answers, in the order given."""
    return list(dict.fromkeys(filter(None, map(normalise, answers))))


UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han (for a regex class)."""

_WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """What spaces part; in scripts without spaces each character is a word."""
    return _WORDS.findall(text)


def is_word(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` is no part of a longer word.

    Words of letters with cases and of digits end where another character stands; in other scripts a word may begin
    and end anywhere (Chinese and Japanese have no spaces, Korean joins particles to its words).
    """
    return not any(_goes_on(text[place - 1 : place + 1]) for place in (start, end) if 0 < place < len(text))


def _goes_on(pair: str) -> bool:
    return all(c.isdigit() or c.lower() != c.upper() for c in pair)


def sub_em(prediction: str, answers: Iterable[str]) -> float:
    """1.0 when any normalised answer is a substring of the normalised prediction, else 0.0."""
    found = normalise(prediction)
    return float(any(answer in found for answer in normalised_answers(answers)))


def em(prediction: str, answers: Iterable[str]) -> float:
    """1.0 when the normalised prediction equals any normalised answer, else 0.0."""
    return float(normalise(prediction) in normalised_answers(answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best F1 of words between the prediction and any answer (SQuAD's), in [0, 1]."""
    found = Counter(normalise(prediction).split())
    best = 0.0
    for answer in normalised_answers(answers):
        gold = Counter(answer.split())
        common = (found & gold).total()
        # 2 P R / (P + R) with P = common / found and R = common / gold.
        best = max(best, 2 * common / (found.total() + gold.total()))
    return best


SCORERS: dict[str, Callable[[str, Iterable[str]], float]] = {"sub_em": sub_em, "em": em, "f1": f1}
"""Every metric by the name the commands know it under."""

Scorer = Callable[[str, Sequence[str], str], float]
"""(response, accepted answers, question) -> a finite score; higher is better."""


def load_scorer(name: str) -> Scorer:
    """A metric of `SCORERS`, or a user's function named ``module:function``.

    The module is looked for in the current folder first, then where Python looks. The function is called as
    ``function(response, answers)``, with ``question=...`` if it has such a parameter, and returns a number or a bool.

    Raises:
        UserError: there is no such metric, module or function. Later, from the scorer: the function raised, or
            what it returned is not a finite number.
    """
    flag = f"--scorer {name}"
    if name in SCORERS:
        metric = SCORERS[name]
        return lambda response, answers, question: metric(response, answers)
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"{flag}: give {', '.join(SCORERS)}, or a function of your own as module:function")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is read
        raise UserError(
            f"{flag}: the module {module_name} cannot be imported ({_told(error)}); put {module_name}.py into the "
            "current folder or on PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        kind = "is not a function" if hasattr(module, function_name) else "is not there"
        raise UserError(f"{flag}: {function_name} {kind} in {getattr(module, '__file__', None) or module_name}")
    return _UserScorer(flag, function)


class _UserScorer:
    """A user's function, whose mistakes are told by the response they were made on."""

    def __init__(self, flag: str, function: Callable[..., object]) -> None:
        self._flag, self._function = flag, function
        try:
            self._with_question = "question" in inspect.signature(function).parameters
        except (TypeError, ValueError):  # some functions written in C do not tell their parameters
            self._with_question = False

    def __call__(self, response: str, answers: Sequence[str], question: str) -> float:
        more = {"question": question} if self._with_question else {}
        try:
            score = self._function(response, list(answers), **more)
        except Exception as error:
            raise UserError(f"{self._flag}: raised {_told(error)} for the response {_short(response)}") from None
        if not isinstance(score, Real | np.bool_) or not math.isfinite(score):
            raise UserError(
                f"{self._flag}: returned {_short(score)} for the response {_short(response)}; a score is a finite "
                "number, or True or False"
            )
        return float(score)


def _told(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
