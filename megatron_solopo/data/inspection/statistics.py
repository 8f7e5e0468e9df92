"""Distributions and oddities of a whole file, from one pass that keeps no text.

Of an example there remain 8 bytes for each number, and a digest of 8 bytes with a count for each text that may come
again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_solopo.data.inspection.examples import CONTEXTS, FLAGS, LONG, SHORT, Example, Facts
from megatron_solopo.data.pairing.lengths import FEWEST, Lengths

_EXCERPT = 160


class Distribution:
    """Finite numbers, each as 8 bytes, rounded to ``digits`` decimals, multiples of ``step``."""

    def __init__(self, digits: int = 0) -> None:
        self._digits, self.step = digits, 10.0**-digits
        self._numbers = array("d")

    def add(self, value: float) -> None:
        self._numbers.append(round(float(value), self._digits))

    @property
    def values(self) -> np.ndarray:
        """[numbers] float64, in the order of their coming."""
        return np.array(self._numbers)

    @property
    def total(self) -> int:
        return len(self._numbers)

    @property
    def mean(self) -> float:
        return float((self.values / self.total).sum())  # the sum of large numbers may not be finite

    def quantile(self, share: float) -> float:
        """The smallest value that at least ``share`` of the numbers do not exceed."""
        return float(np.quantile(self.values, share, method="inverted_cdf"))

    def figures(self) -> tuple[str, str, str]:
        """Median, mean, and the middle 90 %, in words."""
        digits = 3 if self._digits else 0
        low, median, high = (number(self.quantile(share), digits) for share in (0.05, 0.5, 0.95))
        return median, number(self.mean, digits or 1), f"{low} to {high}"

    def words(self) -> str:
        return "median {}, mean {}, middle 90 % from {}".format(*self.figures())


def number(value: float, digits: int) -> str:
    """With so many decimals; large ones in powers of ten."""
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.4g}"


class Repeats:
    """How often each text came; the texts themselves are not kept but for the beginnings of repeated ones."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._excerpts: dict[bytes, str] = {}

    def add(self, text: str) -> None:
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._counts[key] = count = self._counts.get(key, 0) + 1
        if count == 2:
            self._excerpts[key] = text[:_EXCERPT].replace("\0", " / ") + ("..." if len(text) > _EXCERPT else "")

    @property
    def repeated(self) -> int:
        """Examples whose text came before."""
        return sum(self._counts.values()) - len(self._counts)

    def most(self, number: int) -> list[tuple[str, int]]:
        """(beginning, times) of the texts that came most often, at least twice."""
        keys = sorted(self._excerpts, key=lambda key: (-self._counts[key], self._excerpts[key]))
        return [(self._excerpts[key], self._counts[key]) for key in keys[:number]]


@dataclass
class Statistics:
    """What a file holds.

    Attributes:
        tokens: "short", "long" (prompts), "chosen", "rejected" (responses) -> tokens.
        ratio: rho = short / long prompt tokens.
        difference: chosen - rejected tokens; ``lengths`` counts both sides for `length_bias`.
        depths: "short", "long" -> where the evidence stands, 0 to 1.
        documents: "short", "long" -> documents of a context.
        scores: name -> values as recorded.
        flags: key of `FLAGS` -> examples; ``refusals``: why training refuses -> examples.
        repeats: what is compared -> how often it came.
    """

    examples: int = 0
    without_answers: int = 0
    without_long: int = 0
    tokens: dict[str, Distribution] = field(default_factory=dict)
    ratio: Distribution = field(default_factory=lambda: Distribution(4))
    difference: Distribution = field(default_factory=Distribution)
    lengths: Lengths = field(default_factory=lambda: Lengths("tokens"))
    depths: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution(3) for name in CONTEXTS})
    documents: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution() for name in CONTEXTS})
    scores: dict[str, Distribution] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    repeats: dict[str, Repeats] = field(default_factory=dict)

    def add(self, example: Example, facts: Facts) -> None:
        self.examples += 1
        self.without_answers += not example.answers
        self.without_long += LONG not in example.chats
        self.sources[example.source] += 1
        for name, length in facts.tokens.items():
            self.tokens.setdefault(name, Distribution()).add(length)
        if {SHORT, LONG} <= facts.tokens.keys():
            self.ratio.add(facts.tokens[SHORT] / facts.tokens[LONG])
        if {"chosen", "rejected"} <= facts.tokens.keys():
            self.difference.add(facts.tokens["chosen"] - facts.tokens["rejected"])
            self.lengths.add(facts.tokens["chosen"], facts.tokens["rejected"])
        for name in facts.documents:
            self.documents[name].add(facts.documents[name])
            for depth in facts.depths[name]:
                self.depths[name].add(depth)
        for name, value in example.scores.items():
            self.scores.setdefault(name, Distribution(3)).add(value)
        self.flags.update(facts.flags)
        if facts.refused is not None:
            self.refusals[facts.refused] += 1
        for what, text in _compared(example):
            self.repeats.setdefault(what, Repeats()).add(text)

    def checks(self) -> list[tuple[str, str, int]]:
        """(key, plain words, examples) of every flag that could have been raised."""
        return [(key, words, self.flags[key]) for key, words in FLAGS.items()]

    def length_bias(self) -> tuple[str, bool] | None:
        """What the lengths of chosen and rejected say in plain words, and whether that is a warning; None without
        responses."""
        if not len(self.lengths):
            return None
        if bias := self.lengths.bias():
            return f"{bias[0].upper()}{bias[1:]}.", True
        verdict = "With so few groups that shows no bias." if len(self.lengths) < FEWEST else "No length bias."
        line = self.lengths.line()
        return f"{line[0].upper()}{line[1:]}. {verdict}", False


def _compared(example: Example) -> Iterator[tuple[str, str]]:
    if example.question:
        yield "question", example.question
    yield "short context", example.content(SHORT)
    if example.group is not None:
        yield "chosen", example.group.chosen
        yield "rejected", example.group.rejected
        yield "pair of chosen and rejected", f"{example.group.chosen}\0{example.group.rejected}"
