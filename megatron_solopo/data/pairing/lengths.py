"""Lengths of chosen against rejected responses: a length bias is the commonest defect of preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

FEWEST = 20
"""With fewer pairs a difference is likely chance, and no warning is printed."""
RATIO, SHARE = 1.5, 0.8
"""The ratio of means, and the share of pairs in one direction, from which a warning is printed."""


@dataclass
class Lengths:
    """Counts of lengths; memory grows with the number of different lengths, not of pairs.

    Attributes:
        unit: of the lengths, "words" or "tokens".
        longer, shorter: pairs whose chosen response is longer, shorter than the rejected one.
    """

    unit: str
    chosen: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)
    longer: int = 0
    shorter: int = 0

    @classmethod
    def of(cls, unit: str, pairs: Iterable[tuple[int, int]]) -> Lengths:
        """Returns the lengths of (chosen, rejected) pairs."""
        lengths = cls(unit)
        for chosen, rejected in pairs:
            lengths.add(chosen, rejected)
        return lengths

    def add(self, chosen: int, rejected: int) -> None:
        """Counts a pair."""
        self.chosen[chosen] += 1
        self.rejected[rejected] += 1
        self.longer += chosen > rejected
        self.shorter += chosen < rejected

    def __len__(self) -> int:
        return self.chosen.total()

    def line(self) -> str:
        """Returns the mean, median and range of chosen and rejected lengths, and the shares of pairs whose chosen one
        is longer."""
        return (
            f"length in {self.unit}: chosen {_spread(self.chosen)}; rejected {_spread(self.rejected)}; chosen longer "
            f"in {self.longer / len(self):.1%} of the pairs, shorter in {self.shorter / len(self):.1%}"
        )

    def bias(self) -> str | None:
        """Returns a warning if the two sides differ so much that training may favour a length, else None."""
        if len(self) < FEWEST:
            return None
        chosen, rejected = _mean(self.chosen), _mean(self.rejected)
        longer, shorter = self.longer / len(self), self.shorter / len(self)
        # Lengths of 0 exist in words alone (a blank text).
        if max(chosen, rejected) < RATIO * min(chosen, rejected) and max(longer, shorter) < SHARE:
            return None
        return (
            f"chosen answers have {chosen:.1f} {self.unit}, rejected ones {rejected:.1f} (chosen longer in "
            f"{longer:.0%} of the pairs, shorter in {shorter:.0%}): the model may learn length; balance the pairs "
            "(build-pairs --policy length_matched), or use a loss that divides by length (simpo, orpo)"
        )


def _mean(counts: Counter[int]) -> float:
    return sum(length * count for length, count in counts.items()) / counts.total()


def _spread(counts: Counter[int]) -> str:
    half, seen = (counts.total() + 1) // 2, accumulate(counts[length] for length in sorted(counts))
    median = next(length for length, count in zip(sorted(counts), seen, strict=True) if count >= half)
    return f"mean {_mean(counts):.1f}, median {median}, {min(counts)} to {max(counts)}"
