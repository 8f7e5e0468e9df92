"""The longest context whose step stays within a memory limit, from few steps, none far beyond the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_solopo.errors import UserError

UNIT = 64
"""Lengths are multiples of this many tokens."""
WITHIN = 0.03
"""The search ends where the next length that was tried is too long and at most this share longer."""
MOST_LONGER = 2
"""A length is at most this many times the longest that fits."""
MOST_TRIES = 12


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        length: the longest that fits; too_long: the shortest beyond it that does not; 0: none was tried.
    """

    length: int
    too_long: int


def longest(
    peak: Callable[[int], float], limit: float, start: int, known: Mapping[int, float] = MappingProxyType({})
) -> Search:
    """Searches the longest context.

    Memory grows almost linearly with the length, so each next length is where the line through the first and the
    longest that fits reaches the limit, then between the longest that fits and the shortest that does not: no step is
    far beyond the limit.

    Args:
        peak: returns the bytes of a step at a length.
        start: the first length; where it is too long, half of it, and so on down to `UNIT`.
        known: peaks that were measured already.

    Raises:
        UserError: `UNIT` tokens are beyond the limit.
    """
    peaks = dict(known)

    def fits(length: int) -> bool:
        if length not in peaks:
            peaks[length] = peak(length)
        return peaks[length] <= limit

    while not fits(start):
        if start <= UNIT:
            raise UserError(
                "memory-limit",
                f"--memory-limit: a step of {start:,} tokens takes {peaks[start] / 2**30:.3f} GiB, the limit is "
                f"{limit / 2**30:.3f}; raise it",
            )
        start = max(UNIT, start // 2 // UNIT * UNIT)
    if len(peaks) == 1:
        fits(start + max(UNIT, start // 2 // UNIT * UNIT))
    good, bad = _bounds(peaks, limit)
    while len(peaks) < MOST_TRIES and (bad is None or bad - good > max(UNIT, WITHIN * good)):
        fits(_next(peaks, limit, start, good, bad))
        good, bad = _bounds(peaks, limit)
    return Search(good, bad or 0)


def _bounds(peaks: Mapping[int, float], limit: float) -> tuple[int, int | None]:
    """Returns the longest length that fits, and the shortest beyond it that does not."""
    good = max(length for length, size in peaks.items() if size <= limit)
    return good, min((length for length, size in peaks.items() if size > limit and length > good), default=None)


def _next(peaks: Mapping[int, float], limit: float, start: int, good: int, bad: int | None) -> int:
    """Returns the next length to try, above ``good``, the longest that fits, and below ``bad``, the shortest that does
    not."""
    other = start if bad is None else bad
    slope = (peaks[other] - peaks[good]) / (other - good)
    aim = int(good + (limit - peaks[good]) / slope) if slope > 0 else MOST_LONGER * good
    aim = min(aim, MOST_LONGER * good) // UNIT * UNIT
    aim = max(aim, good + max(UNIT, int(WITHIN * good) // UNIT * UNIT))  # where a line cannot tell more
    return aim if bad is None or aim < bad else max(good + UNIT, (good + bad) // 2 // UNIT * UNIT)
