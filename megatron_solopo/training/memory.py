"""The peak of memory of a run, saves apart from training: a save gathers the optimizer's state to the first process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_solopo.parallel.platform import Platform, max_over_processes

TRAINING = "training"


class PeakMemory:
    """The most memory that any process held, in GiB, by what it was held for; from its creation on.

    Where the system cannot reset its own peak, a peak is known only if it is the highest so far; otherwise `of` gives
    the highest so far, which is too high.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._peaks: dict[str, float] = {}
        self.activities = [TRAINING]
        """Training and what happened apart from it; the same on every process."""
        self._start()

    def _start(self) -> None:
        self._exact = self._platform.reset_peak_memory()
        self._from = self._platform.peak_memory_gib()

    def _credit(self, activity: str) -> None:
        peak = self._platform.peak_memory_gib()
        if self._exact or peak > self._from:
            self._peaks[activity] = max(peak, self._peaks.get(activity, 0.0))

    @contextmanager
    def apart(self, activity: str) -> Iterator[None]:
        """What happens inside counts as ``activity``, not as training."""
        self._credit(TRAINING)
        self._start()
        if activity not in self.activities:
            self.activities.append(activity)
        try:
            yield
        finally:
            self._credit(activity)
            self._start()

    def own(self, activity: str = TRAINING) -> float:
        """The peak of all times of an activity so far in this process."""
        if activity == TRAINING:
            self._credit(TRAINING)
        return self._peaks.get(activity, self._platform.peak_memory_gib())

    def of(self, activity: str = TRAINING) -> float:
        """That of the process where it is the largest; collective."""
        return max_over_processes(self.own(activity), self._platform.device)
