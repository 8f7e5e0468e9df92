"""Distributions and oddities of a whole file, from one pass that keeps no text.

Of an example there remain 8 bytes for each number, and a digest of 8 bytes with a count for each text that may come
again.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_solopo.data.inspection.examples import LONG, SHORT, Example
from megatron_solopo.data.inspection.facts import FLAGS, Facts, pair_lengths
from megatron_solopo.data.pairing.lengths import FEWEST, Lengths
from megatron_solopo.data.schema import text_of

_EXCERPT = 160


class Repeats:
    """How often each text came; the texts themselves are not kept but for the beginnings of repeated ones."""

    def __init__(self) -> None:
        self._counts: Counter[bytes] = Counter()
        self._excerpts: dict[bytes, str] = {}

    def add(self, text: str) -> None:
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._counts[key] += 1
        if self._counts[key] == 2:
            self._excerpts[key] = text[:_EXCERPT].replace("\0", " / ") + ("..." if len(text) > _EXCERPT else "")

    @property
    def repeated(self) -> int:
        """Examples whose text came before."""
        return self._counts.total() - len(self._counts)

    def most(self, number: int) -> list[tuple[str, int]]:
        """Returns (beginning, times) of the texts that came most often, at least twice."""
        repeated = ((text, self._counts[key]) for key, text in self._excerpts.items())
        return sorted(repeated, key=lambda one: (-one[1], one[0]))[:number]


@dataclass
class Statistics:
    """What a file holds.

    Attributes:
        numbers: name (see `Facts.numbers`) -> values in the order of their coming.
        flags: key of `FLAGS` -> examples; ``refusals``: why training refuses -> examples.
        repeats: what is compared -> how often it came.
        lengths: those of the pairs of a chosen and a rejected response.
    """

    examples: int = 0
    without_answers: int = 0
    without_long: int = 0
    numbers: defaultdict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    flags: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    repeats: defaultdict[str, Repeats] = field(default_factory=lambda: defaultdict(Repeats))
    lengths: Lengths = field(default_factory=lambda: Lengths("tokens"))

    def add(self, example: Example, facts: Facts) -> None:
        self.examples += 1
        self.without_answers += not example.answers
        self.without_long += LONG not in example.chats
        self.sources[example.source] += 1
        self.flags.update(facts.flags)
        if facts.refused is not None:
            self.refusals[facts.refused] += 1
        for name, value in facts.numbers:
            self.numbers[name].append(value)
        for chosen, rejected in pair_lengths(facts.tokens):
            self.lengths.add(chosen, rejected)
        for what, text in _compared(example):
            self.repeats[what].add(text)

    def checks(self) -> list[tuple[str, str, int]]:
        """Returns (key, plain words, examples) of every flag that could have been raised."""
        return [(key, words, self.flags[key]) for key, words in FLAGS.items()]

    def length_bias(self) -> tuple[str, bool] | None:
        """Returns a sentence about the lengths of chosen and rejected, and whether it is a warning; None without
        responses."""
        lengths = self.lengths
        if not len(lengths):
            return None
        line, bias = lengths.line(), lengths.bias()
        verdict = "With so few groups that shows no bias." if len(lengths) < FEWEST else "No length bias."
        sentence = f"{bias}." if bias else f"{line}. {verdict}"
        return sentence[0].upper() + sentence[1:], bool(bias)


def _compared(example: Example) -> Iterator[tuple[str, str]]:
    if example.question:
        yield "question", example.question
    yield "short context", example.content(SHORT)
    if example.group is not None:
        chosen, rejected = (list(map(text_of, example.group.responses(side))) for side in ("chosen", "rejected"))
        yield from (("chosen", text) for text in chosen)
        yield from (("rejected", text) for text in rejected)
        yield from (("pair of chosen and rejected", "\0".join(pair)) for pair in itertools.product(chosen, rejected))
