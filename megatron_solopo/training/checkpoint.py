"""Checkpoints in megatron-core's distributed format: written aside, marked complete, renamed, named as latest."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_solopo.atomic import rename
from megatron_solopo.config import Config
from megatron_solopo.conversion.manifest import Files, checkpoint_folder, describe_files, write_latest, write_manifest
from megatron_solopo.conversion.megatron_folder import METADATA, load_models, model_states, reason_of
from megatron_solopo.conversion.sharded_write import ShardedWrite
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.parallel.platform import first_error, run_on_rank0
from megatron_solopo.progress import reporting
from megatron_solopo.training import retention
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.run_identity import Progress


def _state(
    engine: Engine, optimizer: MegatronOptimizer, source: Path | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, None]]]:
    """Returns a checkpoint's state of model and optimizer, and what `model_states` left out.

    Args:
        source: the checkpoint to load from, or None when saving.
    """
    engine.gather_parameters()
    models, left_out = model_states(engine.models, source)
    metadata = dict(METADATA)  # megatron-core writes its process groups into it
    optimizer_state = optimizer.sharded_state_dict(models, is_loading=source is not None, metadata=metadata)
    return models | {"optimizer": optimizer_state}, left_out


@dataclass
class _Writing:
    """A checkpoint that is being written."""

    iteration: int
    aside: Path
    write: ShardedWrite
    caller: TemporalAsyncCaller = field(default_factory=TemporalAsyncCaller)


class Checkpoints:
    """Saves the checkpoints of a run; every method is collective.

    A run killed at any moment leaves the previous checkpoint as the latest. So does a save that fails; `unsaved` says
    so until a later one succeeds.

    Args:
        latest: iteration of the run folder's checkpoint that the run resumes from, or 0.
        progress: the run's identity, see `run_identity.progress_of`.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        latest: int,
        progress: Progress,
    ) -> None:
        self._folder, self._output, self._parallel = Path(config.output.save), config.output, config.parallel
        self._engine, self._optimizer, self._scheduler = engine, optimizer, scheduler
        self._progress, self._latest = progress, latest
        self._writing: _Writing | None = None
        # A run's checkpoints all have the same tensors, so the ranks share them out once.
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy(), _copies(), do_cache_distribution=True
        )
        self.unsaved: str | None = None
        """Why the newest save failed, or None."""
        self.best = 0
        """Iteration of --save-best, whose checkpoint is kept; 0: none."""
        if dist.get_rank() == 0:
            retention.delete_unfinished(self._folder)
        dist.barrier()

    def save_last(self, iteration: int) -> None:
        """Saves and waits until it is complete."""
        self.save(iteration)
        self.finish()

    def has(self, iteration: int) -> bool:
        """Whether this is the latest complete checkpoint; waits for an asynchronous save."""
        self.finish()
        return iteration == self._latest

    def save(self, iteration: int) -> None:
        """Saves, or with --async-save starts to save; does nothing when the iteration is saved already."""
        if self.has(iteration):
            return
        target = checkpoint_folder(self._folder, iteration)
        # A new name each time: a writer that outlived its killed run may still write to the old one.
        names = [f"{target.name}.partial-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(names, src=0)
        aside = self._folder / names[0]
        error = first_error(run_on_rank0(lambda: aside.mkdir(parents=True)))
        if error:
            self._failed(iteration, aside, error)
            return
        state, _ = _state(self._engine, self._optimizer)
        state |= {"iteration": iteration, "scheduler": self._scheduler.state_dict(), "progress": self._progress}
        write = ShardedWrite(state, aside, self._engine.platform.device, self._strategy)
        writing = _Writing(iteration, aside, write)
        if self._output.async_save:
            writing.caller.schedule_async_call(writing.write.request)
            self._writing = writing
        else:
            writing.write.run()
            self._complete(writing)

    def poll(self) -> None:
        """Completes an asynchronous save whose writers are done; does not wait."""
        if self._writing is not None and self._writing.caller.is_current_async_call_done(blocking=False):
            self._complete(self._writing)

    def finish(self) -> None:
        """Waits for an asynchronous save and completes it."""
        if self._writing is not None:
            self._writing.caller.is_current_async_call_done(blocking=True)
            dist.barrier()
            self._complete(self._writing)

    def _complete(self, writing: _Writing) -> None:
        """Publishes a written checkpoint: metadata, manifest, final name, latest file, deletion of older ones."""
        self._writing = None
        error = writing.write.finish()
        files, error = _described(writing.aside, error)
        error = first_error(error or run_on_rank0(lambda: self._publish(writing, files)))
        if error:
            self._failed(writing.iteration, writing.aside, error)
        else:
            self._latest, self.unsaved = writing.iteration, None

    def _publish(self, writing: _Writing, files: Files) -> None:
        parallel = self._parallel
        layout = {
            "processes": dist.get_world_size(),
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "virtual": parallel.num_virtual_stages_per_pipeline_rank,
            "context": parallel.context_parallel_size,
            "expert": parallel.expert_model_parallel_size,
        }
        write_manifest(writing.aside, writing.iteration, layout, self._progress, files)
        target = checkpoint_folder(self._folder, writing.iteration)
        retention.delete([target])
        rename(writing.aside, target)
        write_latest(self._folder, writing.iteration)
        output = self._output
        kept = output.keep_last, output.save_retain_interval, self.best
        retention.delete(retention.surplus(self._folder, writing.iteration, *kept))

    def _failed(self, iteration: int, aside: Path, error: str) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        last = f"the last complete one is iteration {self._latest}" if self._latest else "there is no earlier one"
        self.unsaved = (
            f"the checkpoint of step {iteration} was not saved in {self._folder} "
            f"({error}; {_free_space(self._folder)}); {last}"
        )


def _copies() -> dist.ProcessGroup:
    """The group of ranks that hold the same weights: each writes and reads some of them."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))


def _described(folder: Path, error: str | None) -> tuple[Files, str | None]:
    """Returns sizes and digests of all files, of which each process reads its own, and the first error of any process;
    collective."""
    rank, world, files = dist.get_rank(), dist.get_world_size(), {}
    try:
        files = {} if error else describe_files(folder, rank, world)
    except OSError as failure:
        error = system_reason(failure)
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, (files, error))
    errors = [error for _, error in of_all if error]
    return {name: file for files, _ in of_all for name, file in files.items()}, errors[0] if errors else None


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free there"
    except OSError as error:
        return f"free space unknown: {error.strerror}"


def load_checkpoint(
    source: Path,
    engine: Engine,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    rates: tuple[float, float] | None = None,
) -> None:
    """Loads a complete checkpoint into model, optimizer and scheduler; collective.

    Args:
        rates: peak and last learning rate to use from now on (--override-opt-param-scheduler), or None for the
            checkpoint's.

    Raises:
        UserError: it belongs to another model, or see `model_states`.
    """
    state, left_out = _state(engine, optimizer, source)
    state |= {"iteration": 0, "scheduler": {}, "progress": {}}
    try:
        with reporting(f"loading {source}"):
            strategy: Any = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _copies())
            loaded: Any = dist_checkpointing.load(state, str(source), strategy)  # a tuple only with other options
    except (Exception, CheckpointException) as error:  # the latter is no Exception; shapes differ in many ways
        raise UserError(
            "checkpoint-other-model",
            f"--load: {source} cannot be read ({reason_of(error)}); its files are complete, so it is another model's: "
            "use the --hf-path of its run, or start a new run in another folder",
        ) from None
    load_models(engine.models, loaded, left_out)
    if rates is not None:
        _set_rates(loaded["optimizer"], *rates)
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])


def _set_rates(state: dict[Any, Any], lr: float, min_lr: float) -> None:
    """Writes other rates into the state of one optimizer or several (experts have their own).

    megatron-core 0.19.2 keeps both rates in every parameter group and identifies a group by them
    (distrib_optimizer.py:939); its scheduler uses the group's (optimizer_param_scheduler.py, `get_lr`), not its own
    overridden ones.
    """
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                group.update(max_lr=lr, min_lr=min_lr)
        elif isinstance(value, dict):
            _set_rates(value, lr, min_lr)
