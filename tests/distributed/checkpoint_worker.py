"""Saves and loads checkpoints under layouts, without training; see test_checkpoint_shards.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.conversion import manifest
from megatron_solopo.conversion.manifest import checkpoint_folder
from megatron_solopo.parallel import platform
from megatron_solopo.parallel.layouts import parse_layout


def engine_of(here: platform.Platform, config: Config) -> tuple[Any, Any, Any]:
    """Engine, optimizer and scheduler of a layout."""
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine, build_optimizer, initialize_parallel

    initialize_parallel(config)
    engine = build_engine(here, read_hf_config(config.model.hf_path, config.model.rope_scaling), config)
    return engine, *build_optimizer(engine, config.training, 10)


def draw_state(optimizer: Any, seed: int) -> None:
    """Other numbers in each value of the optimizer's state, of weights too."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.state_dict()  # makes the moments
        for values in part.optimizer.state.values():
            for name in [name for name in ("exp_avg", "exp_avg_sq", "master_param") if name in values]:
                drawn = torch.rand(values[name].shape, generator=generator)
                values[name].copy_(drawn if values[name].is_floating_point() else 2**15 * drawn)


def files_of(folder: Path) -> dict[int, int]:
    """rank -> bytes of the files that it wrote."""
    written = {rank: 0 for rank in range(dist.get_world_size())}
    for path in folder.glob("*.distcp"):
        written[int(path.name.removeprefix("__").split("_")[0])] += path.stat().st_size
    return written


def growth(here: platform.Platform, work: Callable[[], None]) -> float:
    """By how many bytes the peak memory of this process is above what it has before ``work``."""
    here.reset_peak_memory()
    before = here.peak_memory_gib()
    work()
    return (here.peak_memory_gib() - before) * 2**30


def save_and_load(
    here: platform.Platform, argv: list[str], layout: str, seed: int, source: Path | None
) -> dict[str, Any]:
    """Loads a checkpoint under a layout and saves one; ``seed`` makes what loading replaces."""
    from megatron_solopo.training.checkpoint import Checkpoints, load_checkpoint

    config, _ = config_load.load([*argv, "--seed", str(seed)])
    config.parallel = parse_layout(layout).applied(config.parallel)
    engine, optimizer, scheduler = engine_of(here, config)
    draw_state(optimizer, 10 * seed)
    peaks: dict[str, float] = {}
    if source is not None:
        peaks["load"] = growth(here, lambda: load_checkpoint(source, engine, optimizer, scheduler))
    checkpoints = Checkpoints(config, engine, optimizer, scheduler, 0, {})
    digest, read = manifest._digest, []
    with mock.patch.object(manifest, "_digest", lambda path: read.append(path.name) or digest(path)):
        peaks["save"] = growth(here, lambda: checkpoints.save_last(1))
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (peaks, read))
    engine.close()
    peaks_of_ranks, read_by_ranks = zip(*of_ranks, strict=True)
    return {"peaks": peaks_of_ranks, "read": read_by_ranks, "unsaved": checkpoints.unsaved}


def main(argv: list[str]) -> int:
    """Under each layout: loads the checkpoint of the layout before, and saves. Writes ``results.json``."""
    job = json.loads(Path(argv[0]).read_text())
    here = platform.start("cpu", timeout_minutes=2)
    results: dict[str, Any] = {}
    source: Path | None = None
    for seed, layout in enumerate(job["layouts"]):
        folder = Path(job["out"]) / str(seed)
        results[layout] = save_and_load(here, [*job["argv"], "--save", str(folder)], layout, seed, source)
        source = checkpoint_folder(folder, 1)
        results[layout]["files"] = files_of(source)
        platform.end_model_parallel()
    if dist.get_rank() == 0:
        (Path(job["out"]) / "results.json").write_text(json.dumps(results))
    platform.stop(here)
    return 0
