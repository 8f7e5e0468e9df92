"""Names the copy of the model that computes slower than the others, from the time of forward and backward passes.

Ranks of one copy wait for each other in every layer (tensor, context and expert parallelism), and all ranks wait in the
gradients' reduction. So the time that tells them apart is that of the passes, without the waiting between them, per
unit of estimated work, and it is compared between copies of the model, stage by stage of the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_solopo.parallel.platform import from_all_ranks
from megatron_solopo.training.engine import Engine, data_parallel

PASSES = ("forward-compute", "backward-compute")
"""megatron-core's timers of one pass of one pack, which hold neither the receive before it nor the send after it."""


class Slowest(NamedTuple):
    """The slowest copy of the model, at one stage of the pipeline.

    Attributes:
        ranks: its ranks.
        ratio: its time for the same work, divided by the median of the other copies.
        seconds: what it computes longer than they would, in all.
    """

    ranks: tuple[int, ...]
    ratio: float
    seconds: float


def slowest(places: Sequence[tuple[int, int]], seconds: Sequence[float], loads: Sequence[float]) -> Slowest | None:
    """Returns the copy with the largest ratio; None where no two copies computed.

    Args:
        places: (pipeline stage, data-parallel rank) of each rank.
        seconds: of the passes of each rank.
        loads: estimated work of each data-parallel rank.
    """
    # of a copy at a stage the longest time: its ranks wait for each other
    longest: dict[tuple[int, int], float] = {}
    for place, taken in zip(places, seconds, strict=True):
        if loads[place[1]] > 0:
            longest[place] = max(taken, longest.get(place, 0.0))
    worst: Slowest | None = None
    for (stage, copy), taken in longest.items():
        others = [t / loads[other] for (s, other), t in longest.items() if s == stage and other != copy]
        if not others or not (usual := median(others) * loads[copy]):
            continue
        if worst is None or taken / usual > worst.ratio:
            ranks = tuple(rank for rank, place in enumerate(places) if place == (stage, copy))
            worst = Slowest(ranks, taken / usual, taken - usual)
    return worst


class RankTimes:
    """Adds up the time of this rank's passes; megatron-core's schedule calls it as its ``config.timers``.

    On CUDA the time is that between events on the computing stream, which are read after the step's one read of the
    device. Create it after `profiling.name_phases`, whose timers it calls.

    Args:
        engine: its first chunk's config is the one that the schedule reads.
    """

    def __init__(self, engine: Engine) -> None:
        settings = engine.chunks[0].config
        self._named: Any = settings.timers
        settings.timers = self  # pyright: ignore[reportAttributeAccessIssue]  # annotated as a plain function
        self._device = engine.platform.device
        self._counts = False
        self._passes: list[tuple[Any, Any]] = []
        self._begun: Any = None
        here = parallel_state.get_pipeline_model_parallel_rank(), data_parallel()[0]
        of_ranks = from_all_ranks(here)
        self._places = [place for _, place in of_ranks]
        self._hosts = [host for host, _ in of_ranks]
        self._loads = [0.0] * data_parallel()[1]
        self._steps = 0

    @property
    def hosts(self) -> str:
        """The machines of the run with their ranks: ``node0 (ranks 0-7), node1 (ranks 8-15)``."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self._hosts):
            ranks.setdefault(host, []).append(rank)
        return ", ".join(f"{host} ({in_words(of_host)})" for host, of_host in ranks.items())

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self if name in PASSES else None, self._named and self._named(name, log_level))

    def mark(self, begins: bool) -> None:
        """Begins or ends a pass."""
        if not self._counts:
            return
        if self._device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if begins:
            self._begun = now
        else:
            self._passes.append((self._begun, now))

    @contextmanager
    def counted(self, loads: Sequence[float]) -> Iterator[None]:
        """Counts the passes in the block, which are those of a step with these estimated loads of the data-parallel
        ranks."""
        self._counts = True
        self._steps += 1
        self._loads = [before + load for before, load in zip(self._loads, loads, strict=True)]
        try:
            yield
        finally:
            self._counts = False

    def compared(self) -> dict[str, Any]:
        """Returns fields of metrics.jsonl about the steps since the last call, {} where there is nothing to compare;
        collective: an all-gather of one number. The passes must have ended on the device."""
        if self._device.type == "cuda":
            own = sum(begun.elapsed_time(ended) for begun, ended in self._passes) / 1e3
        else:
            own = sum(ended - begun for begun, ended in self._passes)
        worst, steps = None, self._steps
        if len(self._loads) > 1:
            of_ranks = torch.empty(len(self._places), dtype=torch.float64, device=self._device)
            dist.all_gather_into_tensor(of_ranks, torch.tensor([own], dtype=torch.float64, device=self._device))
            worst = slowest(self._places, of_ranks.tolist(), self._loads)
        self._passes, self._steps, self._loads = [], 0, [0.0] * len(self._loads)
        if worst is None:
            return {}
        return {
            "slowest_ranks": in_words(worst.ranks),
            "slowest_hosts": ", ".join(dict.fromkeys(self._hosts[rank] for rank in worst.ranks)),
            "slowest_ratio": round(worst.ratio, 4),
            "slowest_seconds": round(worst.seconds / steps, 4),
        }


class _Timer:
    """One of megatron-core's timers."""

    def __init__(self, clock: RankTimes | None, named: Any) -> None:
        self._clock, self._named = clock, named

    def start(self, barrier: bool = False) -> None:
        if self._named is not None:
            self._named.start()
        if self._clock is not None:
            self._clock.mark(begins=True)

    def stop(self, barrier: bool = False) -> None:
        if self._clock is not None:
            self._clock.mark(begins=False)
        if self._named is not None:
            self._named.stop()


def in_words(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 4-7``, ``ranks 1, 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    adjacent = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return "ranks " + (f"{ranks[0]}-{ranks[-1]}" if adjacent else ", ".join(map(str, ranks)))
