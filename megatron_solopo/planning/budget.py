"""--max-tokens-per-rank auto: the most tokens of a process's pack that fit into its memory, by rehearsals.

Memory is a maximum of functions that are linear in the tokens, hence convex: between two rehearsed packs it is at most
the straight line through them. The two are the largest example alone and the largest pack that --micro-batch-size
allows.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist

from megatron_solopo import environment
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import pieces_multiple_of, prompts_multiple_of
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.platform import from_all_ranks
from megatron_solopo.parallel.topology import data_parallel_size, world_size
from megatron_solopo.planning.table import ALLOWANCE_GIB, UNITS, not_rehearsed, outcomes_of, tasks_of
from megatron_solopo.training.preflight import RunInputs
from megatron_solopo.training.reference import shared

GIB = UNITS["GiB"]

ON_CUDA, ON_CPU = 0.95, 0.8
"""Shares of the memory that a pack may take. On the CPU the rest is what the C library keeps of freed memory, and what
other programs may need."""


def token_budget(config: Config, inputs: RunInputs, device: str) -> tuple[int, str]:
    """Returns the number of tokens, the same on every rank, and a line that says why; collective, where there are
    processes.

    Args:
        device: ``cuda`` or ``cpu``, where the run computes.

    Raises:
        UserError: the run cannot be rehearsed, its device is not here, or not even the largest example fits.
    """
    room = _room(device)
    if dist.is_initialized():  # not in a dry run
        room = min(room for _, room in from_all_ranks(room))
    return shared(lambda: _budget(config, inputs, device, room), "--max-tokens-per-rank auto")


def _room(device: str) -> int:
    """Returns the bytes that a process may hold on its device; on the CPU its part of what is available now."""
    if device == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(ON_CPU * environment.memory_gib()["available"] * GIB / here)
    if not torch.cuda.is_available():
        raise UserError(
            "option-conflict",
            "--max-tokens-per-rank auto: torch sees no GPU here whose memory could be divided; set a number",
        )
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(ON_CUDA * (total - ALLOWANCE_GIB * GIB))


def _budget(config: Config, inputs: RunInputs, device: str, room: int) -> tuple[int, str]:
    if (why := not_rehearsed(config)) is not None:
        raise UserError("option-conflict", f"--max-tokens-per-rank auto: cannot be rehearsed, {why}; set a number")
    groups, context = _largest_groups(config, inputs, device), config.parallel.context_parallel_size
    packs = [groups[:1], groups] if len(groups) > 1 else [groups]
    (tokens, least), (most, peak) = _rehearsed(config, inputs, packs, device)
    described = f"of {room / GIB:.1f} GiB for a process"
    if least > room:
        raise UserError(
            "memory-too-small",
            f"--max-tokens-per-rank auto: the largest example alone, {tokens:,} tokens of a process, needs "
            f"{least / GIB:.1f} {described}; recompute activations, divide the model over more processes, or lower "
            "--seq-length",
        )
    if peak <= room:
        return most, (
            f"--max-tokens-per-rank auto: {most:,}, the largest pack of --micro-batch-size "
            f"{config.training.micro_batch_size}, which needs {peak / GIB:.1f} {described}"
        )
    chosen = tokens + int((most - tokens) * (room - least) / (peak - least))
    if chosen * context < config.data.seq_length:
        raise UserError(
            "memory-too-small",
            f"--max-tokens-per-rank auto: {chosen:,} tokens of a process fit, {described}, fewer than --seq-length "
            f"{config.data.seq_length:,} needs; lower it, recompute activations or use more processes",
        )
    return chosen, (
        f"--max-tokens-per-rank auto: {chosen:,}, {described}: {tokens:,} tokens need {least / GIB:.1f} and {most:,} "
        f"need {peak / GIB:.1f}"
    )


def _largest_groups(config: Config, inputs: RunInputs, device: str) -> list[TokenGroup]:
    """Returns as many of the largest examples as a pack may have, the largest first."""
    multiples = pieces_multiple_of(config), prompts_multiple_of(config, device)
    sets = (inputs.data.train, *([inputs.data.valid] if inputs.data.valid is not None else []))
    groups = chain.from_iterable(data.groups for data in sets)
    count = min(config.training.micro_batch_size, config.training.global_batch_size)
    ordered = sorted(groups, key=lambda group: -group.tokens(config.data.share_prompts, *multiples))
    return ordered[:count]


def _rehearsed(
    config: Config, inputs: RunInputs, packs: Sequence[Sequence[TokenGroup]], device: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns (tokens of a process, bytes at its peak) of the first and of the last pack.

    Raises:
        UserError: a rehearsal failed.
    """
    training = dataclasses.replace(config.training, max_tokens_per_rank=None)
    config, world = dataclasses.replace(config, training=training), world_size()
    in_step = math.ceil(training.global_batch_size / data_parallel_size(config.parallel, world))
    tasks = [tasks_of(config, inputs.hf_config, pack, in_step, world, device) for pack in packs]
    outcomes = outcomes_of(list(chain.from_iterable(tasks)))
    if isinstance(outcomes, str):
        raise UserError("option-conflict", f"--max-tokens-per-rank auto: {outcomes}; set a number")
    of_packs = (outcomes[: len(tasks[0])], outcomes[-len(tasks[0]) :])
    first, last = (
        (math.ceil(stages[0].tokens / config.parallel.context_parallel_size), max(each.peak.total for each in stages))
        for stages in of_packs
    )
    return first, last
