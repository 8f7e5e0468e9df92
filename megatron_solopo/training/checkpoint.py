"""Checkpoints in megatron-core's distributed format: written aside, then renamed, then named as the latest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_solopo.errors import UserError
from megatron_solopo.training.engine import Engine

LATEST = "latest_checkpointed_iteration.txt"
"""Megatron's name for the file that holds the number of the last complete checkpoint."""

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The optimizer's state by parameter, so that another layout can read it."""


def latest_iteration(folder: str | Path) -> int | None:
    """The last complete checkpoint of a run folder, or None."""
    path = Path(folder) / LATEST
    if not path.is_file():
        return None
    text = path.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{path}: must hold the number of an iteration, found {text!r}")
    return int(text)


def checkpoint_folder(folder: str | Path, iteration: int) -> Path:
    """``iter_0000100``, as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


def _state(engine: Engine, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    model = engine.gpt.sharded_state_dict(metadata=METADATA)
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)}


def save_checkpoint(
    folder: str | Path,
    iteration: int,
    engine: Engine,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: dict[str, Any],
) -> Path:
    """Saves a checkpoint; collective. A run killed here leaves the previous checkpoint as the latest.

    Args:
        progress: plain values that say where the run stands.
    """
    target = checkpoint_folder(folder, iteration)
    aside = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    state = _state(engine, optimizer, is_loading=False)
    state |= {"iteration": iteration, "scheduler": scheduler.state_dict(), "progress": progress}
    # Asynchronous writing needs NVIDIA's resiliency extension; this save is synchronous.
    dist_checkpointing.save(state, str(aside))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        latest = Path(folder) / LATEST
        latest.with_name(LATEST + ".partial").write_text(f"{iteration}\n")
        latest.with_name(LATEST + ".partial").replace(latest)
    dist.barrier()
    return target


def read_progress(folder: str | Path) -> dict[str, Any]:
    """``progress`` and ``iteration`` of a run folder's latest checkpoint; no tensor is read.

    Raises:
        UserError: no complete checkpoint, or one that cannot be read.
    """
    source = _latest_checkpoint(folder)
    try:
        common = dist_checkpointing.load_common_state_dict(str(source))
        return dict(common["progress"]) | {"iteration": common["iteration"]}
    except (Exception, CheckpointException) as error:  # the latter is no Exception; a torn file fails in many ways
        raise _unreadable(source, error) from None


def _latest_checkpoint(folder: str | Path) -> Path:
    iteration = latest_iteration(folder)
    if iteration is None:
        raise UserError(
            f"--load {folder}: no complete checkpoint there ({LATEST} is missing); leave --load out to start anew"
        )
    source = checkpoint_folder(folder, iteration)
    if not source.is_dir():
        raise UserError(
            f"--load {folder}: {LATEST} names iteration {iteration}, but {source.name} is missing; put an earlier iteration's number into {LATEST}"
        )
    return source


def _unreadable(source: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[-1]
    return UserError(
        f"--load: {source} cannot be read ({type(error).__name__}: {reason}); "
        f"it is damaged or another model's: put an earlier iteration's number into {LATEST}, or start anew"
    )


def load_checkpoint(
    folder: str | Path,
    engine: Engine,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Loads the latest checkpoint of a run folder into model, optimizer and scheduler; returns its ``progress``.

    Raises:
        UserError: no complete checkpoint, or one that cannot be read.
    """
    source = _latest_checkpoint(folder)
    state = _state(engine, optimizer, is_loading=True)
    state |= {"iteration": 0, "scheduler": {}, "progress": {}}
    try:
        loaded = dist_checkpointing.load(state, str(source))
    except (
        Exception,
        CheckpointException,
    ) as error:  # the latter is no Exception; a torn file or another model's shapes fail in many ways
        raise _unreadable(source, error) from None
    engine.gpt.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return dict(loaded["progress"]) | {"iteration": loaded["iteration"]}
