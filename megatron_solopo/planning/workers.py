"""Rehearsals in processes of their own.

A rehearsal makes the process that it runs in a rank of something else, with megatron-core imported beside a hidden
Transformer Engine; and several at once use several cores. The imports, which take longer than most rehearsals, happen
once, in a fork server (`preloaded`).
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_solopo.config import Config, load_loss
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.planning.fewer_layers import with_fewer_layers
from megatron_solopo.planning.rehearse import Outcome, rehearse

PRELOADED = "megatron_solopo.planning.preloaded"
"""The module that the fork server imports."""


@dataclass(frozen=True)
class Task:
    """The arguments of `rehearse`."""

    config: Config
    hf_config: PretrainedConfig
    groups: Sequence[TokenGroup]
    packs: int = 1
    rank: int = 0
    world: int = 1
    device: str = "cuda"


class Rehearsals:
    """Processes that rehearse; ends them on exit.

    Args:
        processes: how many at once; default: the cores of this process.
    """

    def __init__(self, processes: int | None = None) -> None:
        count = processes or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context("forkserver")  # of a process with threads of torch, forks may hang
        context.set_forkserver_preload([PRELOADED])
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=begin)

    def run(self, work: Callable[[Task], Outcome], task: Task) -> Future[Outcome]:
        """Starts `outcome_of`, or a function that calls it, in one of the processes."""
        return self._pool.submit(work, task)

    def each(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Yields the outcomes in the order of the tasks; raises what a rehearsal raised."""
        for future in [self.run(outcome_of, task) for task in tasks]:
            yield future.result()

    def __enter__(self) -> Rehearsals:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def outcome_of(task: Task) -> Outcome:
    """Calls `rehearse` in this process, for a model of many experts with fewer layers (`fewer_layers`)."""
    load_loss(task.config.method.preference_loss, "--preference-loss")  # a user's loss is in no registry here
    gc.freeze()  # modules and their caches, which every collection of garbage would go through

    def of(config: Config, hf_config: PretrainedConfig) -> Outcome:
        return rehearse(config, hf_config, task.groups, task.packs, task.rank, task.world, task.device)

    return with_fewer_layers(task.config, task.hf_config, of) or of(task.config, task.hf_config)


def begin() -> None:
    """Prepares a process that rehearses: no warnings of imports, one thread."""
    import torch

    from megatron_solopo.cli import quiet

    quiet()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # nothing is computed
