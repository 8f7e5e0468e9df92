"""Training steps of the package on generated groups: its options, engine, optimizer, `train_step` and profiler.

The cells that measure whole steps share this file. `models.py` has the shapes, and steps without an optimizer.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PretrainedConfig

from gpu.models import groups_of, hf_config_of, report
from gpu.record import Recorder, host_milliseconds, memory, reset_memory
from megatron_solopo import config_load
from megatron_solopo.config import Config

SOLO = ("--preference-loss", "simpo")
LONG = ("--preference-loss", "simpo", "--context-mode", "long")
LONG_DPO = ("--preference-loss", "dpo", "--context-mode", "long", "--beta", "0.1")
"""SoLoPO, and preference optimization on the long context alone (long-PO)."""

STEPS = 1000
"""Steps of the learning-rate schedule; more than any cell takes."""


def flags_of_recompute(recompute: bool) -> tuple[str, ...]:
    return ("--recompute-granularity", "full") if recompute else ()


def options(out: Recorder, key: str, shape: dict[str, Any], lengths: Sequence[int], groups: int, *flags: Any) -> Config:
    """The configuration of a run by its command line, which becomes a figure.

    Args:
        lengths: tokens of the short prompt, the long one and each response.
        groups: of a step, each a pack.
    """
    folder = out.work / "model"
    hf_config_of(shape).save_pretrained(folder)
    argv = [
        "--hf-path", folder, "--random-init", "--train-data", "generated", "--save", out.work / "run", "--bf16",
        "--seq-length", lengths[1] + lengths[2], "--train-iters", STEPS, "--device", out.device,
        "--global-batch-size", groups, "--micro-batch-size", 1, *flags,
    ]  # fmt: skip
    out.value(f"{key}/model", ", ".join(f"{name} {value}" for name, value in shape.items()))
    out.value(f"{key}/lengths", ", ".join(map(str, lengths)), "tokens of short and long prompt and of a response")
    shown = argv[argv.index("--bf16") :]
    out.value(f"{key}/options", " ".join(str(word) for word in shown))
    config, _ = config_load.load([str(word) for word in argv])
    return config


class Training:
    """A run on generated groups; see `training`.

    Attributes:
        trace: what the profiler wrote.
    """

    def __init__(self, out: Recorder, platform: Any, config: Config, groups: Sequence[Any]) -> None:
        from megatron_solopo.losses.solopo import needs_reference
        from megatron_solopo.model.hf_config import read_hf_config
        from megatron_solopo.training import engine as engines
        from megatron_solopo.training import profiling
        from megatron_solopo.training.memory import PeakMemory

        self.out, self.platform, self.config = out, platform, config
        self.hf_config: PretrainedConfig = read_hf_config(config.model.hf_path)
        self.engine = engines.build_engine(platform, self.hf_config, config)
        self.dataset = _dataset(groups)
        self.reference = self._reference() if needs_reference(config.method) else None
        self.optimizer, self.scheduler = engines.build_optimizer(self.engine, config.training, STEPS)
        self.profiler = profiling.Profiler(config.output, platform.name == "cuda")
        if config.output.nvtx:
            profiling.name_phases(self.engine)
        self.engine.train()
        self.memory = PeakMemory(platform)
        self.done, self.trace, self.lines = 0, list[Path](), list[dict[str, Any]]()

    def _reference(self) -> Any:
        """Log-probs of the initial weights, as the pass before step 1 computes them."""
        from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
        from megatron_solopo.training.step import segment_table

        self.engine.eval()
        places = SegmentPlaces.of_dataset(self.dataset)
        return ReferenceLogProbs(places, segment_table(self.engine, places, self.packs()))

    def packs(self) -> list[Any]:
        """The packs of a step."""
        from megatron_solopo.training.step_work import make_packs

        return make_packs(self.engine, self.dataset, range(len(self.dataset.groups)), self.config)

    def steps(self, count: int, groups: Sequence[Any] | None = None) -> list[float]:
        """Takes steps, each on all groups; returns the seconds of each until the device is done.

        Args:
            groups: instead of those of the run; the reference has no log-probs of them.
        """
        from megatron_solopo.data.tokenized.batches import make_schedule
        from megatron_solopo.training.step import train_step
        from megatron_solopo.training.step_work import training_work

        if groups is not None:
            self.dataset = _dataset(groups)
        examples = len(self.dataset.groups)
        schedule = make_schedule(examples, examples, count, None, 0, False)
        times = []
        with training_work(self.engine, self.dataset, schedule, self.config, self.reference) as work:
            for number in range(count):
                self.profiler.before_step(self.done)

                def step(number: int = number) -> None:
                    line, _ = train_step(
                        self.engine, self.optimizer, self.scheduler, self.dataset, schedule, work, number,
                        self.config, self.memory, phase=self.profiler.phase,
                    )  # fmt: skip
                    self.lines.append(line)

                times.append(host_milliseconds(step, self.out.device) / 1000)
                self.done += 1
                if written := self.profiler.after_step(self.done):
                    self.trace.append(written)
        return times

    def close(self) -> None:
        """Lets all of it go, though the frames of an error may refer to this object."""
        self.engine.close()
        vars(self).clear()

    def measure(self, key: str, warm: int, repeats: int) -> float:
        """Seconds of a step, their median, with the figures that follow from it."""
        self.steps(warm)
        reset_memory(self.out)
        times = sorted(self.steps(repeats))
        took = times[len(times) // 2]
        report(self.out, key, self.engine, self.packs(), took)
        memory(self.out, key)
        return took


def _dataset(groups: Sequence[Any]) -> Any:
    from megatron_solopo.data.tokenized.tokens import TokenDataset

    return TokenDataset(groups, [], "")


@contextmanager
def training(out: Recorder, platform: Any, config: Config, groups: Sequence[Any]) -> Iterator[Training]:
    """A run, which is gone at the end of the block, also where it failed."""
    from megatron.core import parallel_state

    from megatron_solopo.training.engine import initialize_parallel

    if not parallel_state.model_parallel_is_initialized():
        initialize_parallel(config)
    gc.collect()  # of the case before, which may have failed
    reset_memory(out)
    run = Training(out, platform, config, groups)
    try:
        yield run
    finally:
        run.close()
        gc.collect()


def generated(config: Config, shape: dict[str, Any], lengths: Sequence[int], groups: int) -> list[Any]:
    """Groups of what the run's method scores."""
    return groups_of(config.method, shape["vocab_size"], *lengths, groups)


class Planner:
    """Rehearsals of the planner, in a process of its own that sees no GPU, as on the machine where a run is planned."""

    def __init__(self, device: str) -> None:
        from megatron_solopo.planning.workers import Rehearsals

        self._device, self._rehearsals = device, Rehearsals(1)

    def rehearse(self, config: Config, shape: dict[str, Any], groups: Sequence[Any]) -> Future[Any]:
        """The outcome of a process with these packs, each of one group."""
        from megatron_solopo.planning.table import packs_that_matter
        from megatron_solopo.planning.workers import Task, outcome_of

        packs = packs_that_matter(len(groups), config.parallel)
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # the process starts with its first task
            task = Task(config, hf_config_of(shape), groups[:1], packs, device=self._device)
            return self._rehearsals.run(outcome_of, task)

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *error: object) -> None:
        self._rehearsals.__exit__(*error)


def compare_peak(out: Recorder, key: str, measured: float, outcome: Any) -> None:
    """Bytes of tensors at the peak of a step, against the planner's."""
    planned = outcome.peak.total
    out.value(f"{key}/peak", measured / 2**30, "GiB")
    out.value(f"{key}/peak_planned", planned / 2**30, "GiB")
    out.value(f"{key}/peak_planned_at", f"{outcome.peak.phase}: {outcome.peak.operation}")
    out.target(f"{key}/peak_off", abs(planned / measured - 1), at_most=0.05, timed=False)


def peak_on_cpu(platform: Any, config: Config, shape: dict[str, Any], groups: Sequence[Any]) -> float:
    """Bytes at the peak of a second step by the CPU allocator's events, see examples/benchmarks/rehearsal.py."""
    from rehearsal import measured_step

    from megatron_solopo.parallel.platform import end_model_parallel

    end_model_parallel()
    return measured_step(config, hf_config_of(shape), groups, platform)["peak"]


def peak_on_cuda() -> float:
    """Bytes at the peak since `reset_memory`."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
