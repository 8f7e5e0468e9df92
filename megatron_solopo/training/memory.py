"""Peak memory of a run, separate for training and saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_solopo.parallel.platform import Platform, max_over_processes

TRAINING = "training"


class PeakMemory:
    """Measures peak memory in GiB by activity, from the object's creation on.

    Where the system cannot reset its peak, an activity's peak is measured only if it is the highest so far; otherwise
    `of` returns the highest so far, which is too high.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._peaks: dict[str, float] = {}
        self.activities = [TRAINING]
        """Training and the other activities; the same on every rank."""
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
        """Counts the memory inside the block as ``activity``, not as training."""
        self._credit(TRAINING)
        self._start()
        if activity not in self.activities:
            self.activities.append(activity)
        try:
            yield
        finally:
            self._credit(activity)
            self._start()

    def on_this_rank(self, activity: str = TRAINING) -> float:
        """Returns the peak of an activity so far in this process, in GiB."""
        if activity == TRAINING:
            self._credit(TRAINING)
        return self._peaks.get(activity, self._platform.peak_memory_gib())

    def of(self, activity: str = TRAINING) -> float:
        """Returns the largest peak of all ranks, in GiB; collective."""
        return max_over_processes(self.on_this_rank(activity), self._platform.device)
