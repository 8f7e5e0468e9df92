"""Seconds of each phase of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from megatron_solopo.benchmark.jobs import synchronize
from megatron_solopo.training import step_work
from megatron_solopo.training.profiling import NAMES
from megatron_solopo.training.trainer import Trainer

DATA, PACKS, FORWARD, BACKWARD, OPTIMIZER, LOG, REST = "data packs forward backward optimizer log rest".split()
PHASES = {
    DATA: "waiting for the step's packs",
    PACKS: "making the next step's packs, in another thread beside the step",
    FORWARD: "forward passes, the loss included",
    BACKWARD: "backward passes",
    OPTIMIZER: "clipping and update",
    LOG: "metrics",
    REST: "zeroing gradients, their norm, the collective of the step's sums",
}
"""Phases of a step and what each is. All but `PACKS` follow one another."""


WALL, CPU = "seconds", "cpu"
"""Seconds of the clock, and processor seconds of all threads of the process."""


class Times(NamedTuple):
    """A moment, or what is between two."""

    wall: float
    cpu: float

    def since(self, start: Times) -> Times:
        return Times(self.wall - start.wall, self.cpu - start.cpu)


def now(device: str) -> Times:
    """Returns the moment at which the device has done its work."""
    synchronize(device)
    return Times(time.perf_counter(), time.process_time())


class Clock:
    """Adds up the seconds of phases. On CUDA a phase begins and ends when the device is idle, which a run's do not."""

    def __init__(self, device: str) -> None:
        self._device, self._open = device, dict[str, _Timer]()
        self.phases = {WALL: dict.fromkeys(PHASES, 0.0), CPU: dict.fromkeys(PHASES, 0.0)}
        self.steps: list[Times] = []

    def now(self) -> Times:
        return now(self._device)

    def add(self, name: str, times: Times) -> None:
        for kind, seconds in zip((WALL, CPU), times, strict=True):
            self.phases[kind][name] = self.phases[kind].get(name, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as a phase."""
        start = self.now()
        yield
        self.add(name, self.now().since(start))

    def timer(self, name: str, log_level: int | None = None) -> _Timer:
        """Returns a timer of megatron-core's schedule (``config.timers``)."""
        name = NAMES.get(name, name)
        return self._open.setdefault(name, _Timer(self, name))

    def counted[**P, T](self, name: str, work: Callable[P, T]) -> Callable[P, T]:
        """Returns ``work``, counted as a phase; without waiting for the device, since it may run in another thread."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> T:
            start = now("cpu")
            try:
                return work(*args, **kwargs)
            finally:
                self.add(name, now("cpu").since(start))

        return counted

    @contextmanager
    def following(self, trainer: Trainer) -> Iterator[None]:
        """Within it the phases of the trainer's steps are counted."""
        settings = trainer.engine.chunks[0].config  # which the schedule reads
        before: Any = settings.timers
        settings.timers = self.timer
        try:
            with (
                mock.patch.object(step_work, "step_work", self.counted(PACKS, step_work.step_work)),
                mock.patch.object(trainer.profiler, "phase", self.phase),
                mock.patch.object(trainer.log, "step", self.counted(LOG, trainer.log.step)),
            ):
                yield
        finally:
            settings.timers = before

    def step(self, work: Callable[[], object]) -> None:
        """Runs a step and counts its whole time."""
        start = self.now()
        work()
        self.steps.append(self.now().since(start))

    def of_each(self, kind: str) -> list[float]:
        """Returns the times of the steps."""
        return [times.wall if kind == WALL else times.cpu for times in self.steps]

    def of_a_step(self, kind: str) -> dict[str, float]:
        """Returns the mean times of `PHASES`, with what is in none of them as `REST`."""
        phases = {name: self.phases[kind][name] for name in PHASES}
        phases[REST] = max(0.0, sum(self.of_each(kind)) - sum(phases[name] for name in PHASES if name != PACKS))
        return {name: seconds / len(self.steps) for name, seconds in phases.items()}


class _Timer:
    """One of megatron-core's timers."""

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name, self._start = clock, name, Times(0.0, 0.0)

    def start(self, barrier: bool = False) -> None:
        self._start = self._clock.now()

    def stop(self, barrier: bool = False) -> None:
        self._clock.add(self._name, self._clock.now().since(self._start))
