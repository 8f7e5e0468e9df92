"""Checkpoints in megatron-core's distributed format: written aside, marked, renamed, then named as the latest."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_solopo.config import Config
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.model.transformer_engine import UNSAFE_PICKLES
from megatron_solopo.parallel.cpu_shim import results_queue
from megatron_solopo.parallel.platform import first_error
from megatron_solopo.training import retention
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.manifest import checkpoint_folder, write_latest, write_manifest

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The optimizer's state by parameter, so that another layout can read it."""


FP8_SCALES = "._extra_state"
"""In the keys of what Transformer Engine's layers know of earlier batches. Only delayed scaling knows anything; other
layers, and megatron-core's own, have empty entries, which would only tie a checkpoint to the implementation."""


def _state(
    engine: Engine, optimizer: MegatronOptimizer, source: Path | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, None]]]:
    """What a checkpoint holds of model and optimizer, and the entries of `FP8_SCALES` left out, by model chunk.

    Args:
        source: the checkpoint that it is to be loaded from, or None when saving.

    Raises:
        UserError: the checkpoint holds scales that only an environment variable allows to load.
    """
    engine.gather_parameters()
    chunks = dict(zip(_chunk_names(engine), engine.models, strict=True))
    metadata = dict(METADATA)  # megatron-core writes its process groups into it
    models = {name: model.sharded_state_dict(metadata=metadata) for name, model in chunks.items()}
    keep = engine.models[0].config.fp8 is not None and engine.models[0].config.fp8_recipe == "delayed"
    stored = load_sharded_metadata(str(source)).keys() if keep and source is not None else None
    left_out: dict[str, dict[str, None]] = {}
    for name, state in models.items():
        scales = [key for key in state if FP8_SCALES in key]
        missing = [key for key in scales if stored is not None and state[key].unique_key not in stored]
        left_out[name] = dict.fromkeys(missing if keep else scales)
        for key in left_out[name]:
            del state[key]
        if stored is not None and len(left_out[name]) < len(scales) and os.environ.get(UNSAFE_PICKLES) != "1":
            raise UserError(
                f"--fp8-recipe delayed: {source} holds FP8 scales that Transformer Engine keeps as Python pickles, "
                f"which could run any code; if the checkpoint is your own, set {UNSAFE_PICKLES}=1 in the environment"
            )
    optimizer_state = optimizer.sharded_state_dict(models, is_loading=source is not None, metadata=metadata)
    return models | {"optimizer": optimizer_state}, left_out


def _chunk_names(engine: Engine) -> list[str]:
    """Megatron's keys of the model chunks. The files know a tensor by its place in the whole model."""
    count = len(engine.models)
    return ["model"] if count == 1 else [f"model{number}" for number in range(count)]


class _Results(logging.Handler):
    """What a writer tells its training process: megatron-core's queue, and why a write failed.

    Memory that a forked writer shares, instead of megatron-core's manager process, which lives on for ever when a run
    is killed. The writer only logs the reason of a failure, so that is caught here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory, self._reason = os.fdopen(os.memfd_create("results"), "w+b"), ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not self._reason:
            self._reason = record.getMessage()

    def put(self, value: Any) -> None:
        if isinstance(value, Exception):
            value = RuntimeError(self._reason or str(value))
        pickle.dump(value, self._memory)
        self._memory.flush()

    def get_nowait(self) -> Any:
        self._memory.seek(0)
        written = self._memory.read()
        return pickle.loads(written) if written else RuntimeError("the writing process was killed")


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    iteration: int
    aside: Path
    request: AsyncRequest
    results: _Results
    caller: TemporalAsyncCaller | None = None


class Checkpoints:
    """Saves the checkpoints of a run; every method is collective.

    A run killed at any moment leaves the previous checkpoint as the latest. A save that fails leaves it too, and
    stands in `unsaved` until a later one succeeds.

    Args:
        latest: iteration of the run folder's checkpoint that the run goes on from, or 0.
        progress: plain values that say which run this is.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        latest: int,
        progress: dict[str, Any],
    ) -> None:
        self._folder, self._output, self._parallel = Path(config.output.save), config.output, config.parallel
        self._engine, self._optimizer, self._scheduler = engine, optimizer, scheduler
        self._progress, self._latest, self._writing = progress, latest, None
        self.unsaved: str | None = None
        """Why the newest save failed, or None."""
        if dist.get_rank() == 0:
            retention.delete_unfinished(self._folder)
        dist.barrier()

    def save(self, iteration: int) -> None:
        """Saves, or with --async-save starts to; nothing happens when the iteration is saved already."""
        self.finish()
        if iteration == self._latest:
            return
        target = checkpoint_folder(self._folder, iteration)
        # A new name each time: a writer that outlived its killed run may still be busy in the old one.
        names = [f"{target.name}.partial-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(names, src=0)
        aside = self._folder / names[0]
        error = first_error(_on_first(lambda: aside.mkdir(parents=True)))
        if error:
            self._failed(iteration, aside, error)
            return
        state, _ = _state(self._engine, self._optimizer)
        state |= {"iteration": iteration, "scheduler": self._scheduler.state_dict(), "progress": self._progress}
        results = _Results()
        with results_queue(results):
            request = dist_checkpointing.save(state, str(aside), async_sharded_save=True, async_strategy="mcore")
        self._writing = _Writing(iteration, aside, request, results)
        self._log_to(results)
        if self._output.async_save:
            self._writing.caller = TemporalAsyncCaller()
            self._writing.caller.schedule_async_call(request)
            return
        if request.async_fn is not None:  # None: this process holds nothing that another does not write
            arguments = list(request.async_fn_args)
            arguments[1] = request.preload_fn()
            request.async_fn(*arguments, **request.async_fn_kwargs)
        dist.barrier()
        self._complete()

    def poll(self) -> None:
        """Completes an asynchronous save whose writers are done; does not wait."""
        if self._writing is not None and self._writing.caller.is_current_async_call_done(blocking=False):
            self._complete()

    def finish(self) -> None:
        """Waits for an asynchronous save and completes it."""
        if self._writing is not None:
            self._writing.caller.is_current_async_call_done(blocking=True)
            dist.barrier()
            self._complete()

    def _complete(self) -> None:
        """Everything is written: metadata, mark, the final name, the latest file, and older checkpoints' end."""
        writing, self._writing = self._writing, None
        error = self._finalize(writing.request)
        self._log_to(None)
        error = first_error(error or _on_first(lambda: self._publish(writing)))
        if error:
            self._failed(writing.iteration, writing.aside, error)
        else:
            self._latest, self.unsaved = writing.iteration, None

    def _finalize(self, request: AsyncRequest) -> str | None:
        """megatron-core's collective end of a save; returns what failed here or, after a failed write, anywhere."""

        def tell_failure() -> None:
            # state_dict_saver.py:263: the others wait for this flag when the first process could not write .metadata
            failed = torch.ones(1, dtype=torch.int, device=self._engine.platform.device)
            dist.broadcast(failed, src=0)

        for function, release_others in zip(request.finalize_fns, (tell_failure, dist.barrier), strict=True):
            try:
                function()
            except CheckpointException as error:  # raised on all processes; the first knows the reasons
                causes = [cause for cause, _ in error.failures.values()]
                return system_reason(causes[0]) if causes else "another process could not write"
            except Exception as error:
                if dist.get_rank() == 0:
                    release_others()
                return system_reason(error)
        return None

    def _publish(self, writing: _Writing) -> None:
        parallel = self._parallel
        layout = {
            "processes": dist.get_world_size(),
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "virtual": parallel.num_virtual_stages_per_pipeline_rank,
            "context": parallel.context_parallel_size,
            "expert": parallel.expert_model_parallel_size,
        }
        write_manifest(writing.aside, writing.iteration, layout, self._progress)
        target = checkpoint_folder(self._folder, writing.iteration)
        retention.delete([target])
        writing.aside.rename(target)
        write_latest(self._folder, writing.iteration)
        output = self._output
        retention.delete(
            retention.surplus(self._folder, writing.iteration, output.keep_last, output.save_retain_interval)
        )

    def _failed(self, iteration: int, aside: Path, error: str) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        last = f"the last complete one is iteration {self._latest}" if self._latest else "there is no earlier one"
        self.unsaved = (
            f"the checkpoint of step {iteration} was not saved in {self._folder} "
            f"({error}; {_free_space(self._folder)}); {last}"
        )

    @staticmethod
    def _log_to(results: _Results | None) -> None:
        """Sends the writer's log to ``results`` instead of the terminal, or back."""
        logger = logging.getLogger(filesystem_async.__name__)
        logger.handlers[:] = [] if results is None else [results]
        logger.propagate = results is None


def _on_first(work: Callable[[], Any]) -> str | None:
    """Runs file work on the first process; returns what went wrong there."""
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            return system_reason(error)
    return None


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
) -> None:
    """Loads a complete checkpoint into model, optimizer and scheduler; collective.

    Raises:
        UserError: it belongs to another model, or see `_state`.
    """
    state, left_out = _state(engine, optimizer, source)
    state |= {"iteration": 0, "scheduler": {}, "progress": {}}
    try:
        loaded = dist_checkpointing.load(state, str(source))
    except (Exception, CheckpointException) as error:  # the latter is no Exception; shapes differ in many ways
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise UserError(
            f"--load: {source} cannot be read ({type(error).__name__}: {reason}); its files are complete, so it is "
            "another model's: give the --hf-path of its run, or start anew in another folder"
        ) from None
    for name, model in zip(_chunk_names(engine), engine.models, strict=True):
        model.load_state_dict(loaded[name] | left_out[name])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
