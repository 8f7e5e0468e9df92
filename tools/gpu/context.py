"""The longest context whose training step fits: the planner's length first, then strides that double, then halves."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu import models, steps
from gpu.machine import start_platform
from gpu.models import MFU, QWEN_3B, QWEN_7B, TINY
from gpu.record import Recorder, reset_memory
from gpu.speed import lengths_of
from gpu.steps import flags_of_recompute

SECONDS = 80.0
"""After which no length is tried that is expected to take longer than the rest."""

DRY_TOKENS = 700
"""Longest prompt that fits in the dry run."""


@dataclass
class Clock:
    """Forecasts the time of a length: attention, and so a step, grows with its square at most."""

    end: float
    tokens: int = 0
    seconds: float = 0.0

    def has_time(self, tokens: int) -> bool:
        expected = self.seconds * (tokens / self.tokens) ** 2 if self.tokens else 0.0
        return time.monotonic() + expected < self.end

    def took(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = tokens, seconds


def longest(out: Recorder) -> None:
    """Training steps of 7B and 3B parameters with all layers recomputed and AdamW on the device."""
    out.value("mfu_is", MFU)
    out.value("oom_is", f"more than {DRY_TOKENS} tokens, in the dry run" if out.dry else "torch.OutOfMemoryError")
    platform, clock = start_platform(out), Clock(time.monotonic() + (math.inf if out.dry else SECONDS))
    with steps.Planner(out.device) as planner:
        for size, shape in {"tiny": TINY}.items() if out.dry else (("7b", QWEN_7B), ("3b", QWEN_3B)):
            with out.part(size):
                longest_of(out, platform, planner, size, shape, clock)


def longest_of(
    out: Recorder, platform: Any, planner: steps.Planner, key: str, shape: dict[str, Any], clock: Clock
) -> None:
    short, start, response = lengths_of(out)
    unit, most = (64, 4096) if out.dry else (1024, 2**19)
    flags = (*steps.SOLO, *flags_of_recompute(True))
    config = steps.options(out, key, shape, (short, most, response), 1, *flags)

    def groups(tokens: int) -> list[Any]:
        return steps.generated(config, shape, (short, tokens, response), 1)

    guess = planned(config, shape, (short, response), unit, most, capacity(out))
    out.value(f"{key}/guess", guess, "tokens, by the planner's estimate")
    clock.tokens = 0  # of another model
    peaks: dict[int, float] = {}
    with steps.training(out, platform, config, groups(start)) as run:
        run.steps(1)  # Adam makes its moments

        def fits(tokens: int) -> bool:
            taken = attempt(out, run, groups(tokens), tokens)
            out.value(f"{key}/tried/{tokens}", f"fits, {taken[0]:.2f} s" if taken else "out of memory")
            if taken is None:
                return False
            clock.took(tokens, taken[0])
            peaks[tokens] = taken[1]
            out.value(f"{key}/longest", max(peaks), "tokens")  # as yet: a kill keeps it
            models.report(out, f"{key}/{tokens}", run.engine, run.packs(), taken[0])
            return True

        found = search(fits, guess, unit, most, clock.has_time)
    if not found:
        return
    out.value(f"{key}/longest_over_guess", found / guess)
    with out.part(f"{key}/peak"):
        out.need_size()
        steps.compare_peak(out, key, peaks[found], planner.rehearse(config, shape, groups(found)).result())


def capacity(out: Recorder) -> float:
    """Bytes of the device that tensors may take; in the dry run those of the model and of about `DRY_TOKENS`."""
    from megatron_solopo.planning.table import ALLOWANCE_GIB, UNITS

    if out.dry:
        return 6 * UNITS["MiB"]
    _, total = torch.cuda.mem_get_info()
    return total - ALLOWANCE_GIB * UNITS["GiB"]


def planned(config: Any, shape: dict[str, Any], others: tuple[int, int], unit: int, most: int, size: float) -> int:
    """The longest context that fits by the planner's closed form; at least one unit.

    Args:
        others: tokens of the short prompt and of each response; size: bytes.
    """
    from megatron_solopo.data.tokenized.batches import pieces_multiple_of, prompts_multiple_of
    from megatron_solopo.planning.estimate import peak
    from megatron_solopo.planning.process import Process, Shape, Work
    from megatron_solopo.planning.rehearse import example

    short, response = others
    model = Shape.of(models.hf_config_of(shape), config.model.make_vocab_size_divisible_by)
    share, multiples = config.data.share_prompts, (pieces_multiple_of(config), prompts_multiple_of(config, "cuda"))

    def fits(tokens: int) -> bool:
        work = Work.of(example(config.method, short, tokens, response), 1, 1, share, *multiples)
        return peak(Process(model, config, work, 1), 0).total <= size

    return search(fits, unit, unit, most, lambda tokens: True, finest=0) or unit


def attempt(out: Recorder, run: steps.Training, groups: list[Any], tokens: int) -> tuple[float, float] | None:
    """(Seconds, bytes at the peak) of a step, or None where the device has too little memory."""
    reset_memory(out)
    try:
        (took,) = run.steps(1, groups)
        if out.dry and tokens > DRY_TOKENS:
            raise torch.OutOfMemoryError("the dry run's device is full")
        return took, 0.0 if out.dry else steps.peak_on_cuda()
    except torch.OutOfMemoryError as error:
        print(str(error)[:300], flush=True)
    gc.collect()  # outside of the handler, which holds the frames of the step
    return None


def search(
    fits: Callable[[int], bool],
    guess: int,
    unit: int,
    most: int,
    may_try: Callable[[int], bool],
    finest: float = 1 / 16,
) -> int:
    """The largest length that was seen to fit, a multiple of ``unit`` up to ``most``; 0 if none.

    From the guess it goes up or down by strides that double, the first an eighth of the guess, until one length fits
    and another does not; then it halves what is between them.

    Args:
        may_try: whether there is time for a length; the search ends where there is not.
        finest: share of the length below which a difference is not halved any more; a unit at least.
    """

    def rounded(tokens: float) -> int:
        return max(unit, min(most, int(tokens) // unit * unit))

    low, high, stride, tokens = 0, most + unit, max(unit, guess // 8), rounded(guess)
    while may_try(tokens):
        if fits(tokens):
            low = tokens
        else:
            high = tokens
        if high - low <= max(unit, finest * low):
            break
        if high > most:
            tokens, stride = rounded(low + stride), 2 * stride
        elif low == 0:
            tokens, stride = rounded(high - stride), 2 * stride
        else:
            tokens = rounded((low + high) / 2)
    return low
