"""How a response is compared with the gold answers: sub-EM, EM and F1 on normalised text.

Normalisation is SQuAD's (Rajpurkar et al., EMNLP 2016): lower case, no ASCII punctuation, no English
articles, single spaces. A gold answer that normalises to nothing ("The", "?") matches nothing, because the
empty string is a substring of every text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """``text`` in lower case, without ASCII punctuation and articles, words joined by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_answers(answers: Iterable[str]) -> list[str]:
    """The distinct non-empty normalised answers, in the order given."""
    return list(dict.fromkeys(filter(None, map(normalise, answers))))


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
