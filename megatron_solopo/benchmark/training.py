"""The package's side: a real run of `solopo train`, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_solopo import config_load
from megatron_solopo.benchmark.flops import flops_of_packs
from megatron_solopo.benchmark.jobs import Job, ceiling, options_of, write_inputs
from megatron_solopo.parallel.platform import Platform
from megatron_solopo.training.run import started

COSTS = 3
"""Operators of a profile that are named."""


def measure(job: Job) -> dict[str, Any]:
    """Trains a case and returns its figures: see `result`."""
    write_inputs(job)
    torch.set_num_threads(job.setting.threads)
    config, _ = config_load.load(options_of(job))
    with started(config) as platform:
        from megatron_solopo.benchmark.phases import CPU, WALL, Clock
        from megatron_solopo.training.exits import StopRequests
        from megatron_solopo.training.preflight import preflight
        from megatron_solopo.training.trainer import Trainer

        at_start = resident_gib()
        trainer = Trainer(platform, config, preflight(config), StopRequests(False, None))
        trainer.score_reference()
        trainer.start()
        clock = Clock(platform.name)
        with trainer.work:
            platform.reset_peak_memory()
            for _ in range(job.warm):
                trainer.train_step()
            packs = packs_of(trainer)
            with clock.following(trainer):
                for _ in range(job.steps):
                    clock.step(trainer.train_step)
            peak = platform.peak_allocated_gib() or platform.peak_memory_gib() - at_start
            costs = profiled(trainer.train_step, platform) if job.profile else []
        trainer.log.close()
        trainer.engine.close()
        flops = flops_of_packs(trainer.plan.inputs.hf_config, packs)
        return result(
            job, clock.of_each(WALL), clock.of_each(CPU), peak, ceiling(job.setting.bf16, platform.name),
            tokens=sum(len(pack.tokens) - pack.padding for pack in packs),
            flops=[flops.products, flops.attention],
            parameters=sum(p.numel() for model in trainer.engine.models for p in model.parameters()),
            phases={kind: clock.of_a_step(kind) for kind in (WALL, CPU)},
            costs=costs,
            options=shown(options_of(job)),
        )  # fmt: skip


def result(
    job: Job, seconds: list[float], cpu: list[float], peak: float, rate: dict[str, float], **more: Any
) -> dict[str, Any]:
    """Returns the figures of a process.

    Args:
        seconds, cpu: of each timed step, by the clock and of the process.
        peak: GiB of its tensors on CUDA; on a CPU resident memory above that before the model was built.
        rate: see `ceiling`.
    """
    return {"seconds": seconds, "cpu": cpu, "peak_gib": peak, "ceiling": rate, "pairs": job.setting.pairs, **more}


def shown(options: Sequence[str]) -> str:
    """Returns a command line without the paths of its model, data and run."""
    return " ".join(options[options.index("--seq-length") :])


def packs_of(trainer: Any) -> list[Any]:
    """Returns the packs of a step; all steps have the same examples."""
    from megatron_solopo.training.step_work import make_packs

    examples = range(len(trainer.data.train.groups))
    return [pack.pack for pack in make_packs(trainer.engine, trainer.data.train, examples, trainer.config)]


def resident_gib() -> float:
    """Returns the resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def profiled(step: Any, platform: Platform) -> list[list[Any]]:
    """Returns name and share of the time of the `COSTS` operators that a step spends most of its time in."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = platform.name == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as trace:
        step()
    of_each = {
        event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total
        for event in trace.key_averages()
    }
    total = sum(of_each.values()) or 1
    largest = sorted(of_each, key=of_each.__getitem__, reverse=True)[:COSTS]
    return [[name, of_each[name] / total] for name in largest]
