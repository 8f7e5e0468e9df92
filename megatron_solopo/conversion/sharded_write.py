"""Writing a sharded state in megatron-core's distributed format: what its own way of writing lacks."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_solopo.conversion.pieces import write_in_pieces
from megatron_solopo.errors import system_reason
from megatron_solopo.parallel.cpu_shim import results_queue

WriteItem = tuple[Any, torch.Tensor]
"""What torch's planner says of a tensor of a file, and the tensor."""


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

    def put(self, value: object) -> None:
        if isinstance(value, Exception):
            value = RuntimeError(self._reason or str(value))
        pickle.dump(value, self._memory)
        self._memory.flush()

    def get_nowait(self) -> object:
        self._memory.seek(0)
        written = self._memory.read()
        return pickle.loads(written) if written else RuntimeError("the writing process was killed")


class _Pieces(io.RawIOBase):
    """A stream for torch.save that hands on what it is given in pieces."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        try:
            write_in_pieces(self._stream, data)
        except OSError as error:  # torch's archive raises its own error about a wrong position in the place of this one
            logging.getLogger(filesystem_async.__name__).error(error)
            raise
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


class _InPieces(_StorageWriterTransforms):
    """Where torch's writer of a checkpoint lets a stream be changed."""

    def transform_save_stream(self, write_item: Any, raw_stream: BinaryIO) -> Any:
        return super().transform_save_stream(write_item, _Pieces(raw_stream))


class ShardedWrite:
    """The writing of a sharded state into a folder, from its plan (when made) to its metadata (`finish`).

    Args:
        device: of this process's collectives.
    """

    def __init__(self, state: dict[str, Any], folder: Path, device: torch.device) -> None:
        self._device, results = device, _Results()
        # A manifest holds digests of the files; torch's checksum of every tensor, which it does not read, takes longer
        # than writing.
        torch.serialization.set_crc32_options(False)
        with results_queue(results):
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        assert request is not None  # an asynchronous save gives one
        self.request = request
        _log_to(results)
        if self.request.async_fn is not None:  # None: this process holds nothing that another does not write
            transforms, *_ = self.request.async_fn.args  # of write_preloaded_data_multithread, filesystem_async.py:220
            transforms[:] = [_InPieces()]

    def run(self, prepare: Callable[[Sequence[WriteItem]], Iterable[WriteItem]] = iter) -> None:
        """Writes this process's part, here and now; collective. Not with a caller that runs `request` elsewhere.

        dist_checkpointing's own synchronous way starts an interpreter for each writer.

        Args:
            prepare: makes of the items of a file those that are written, each when its turn comes.
        """
        request = self.request
        if request.async_fn is not None:
            arguments = list(request.async_fn_args)
            arguments[1] = [
                (file, key, (data, prepare(tensors))) for file, key, (data, tensors) in request.preload_fn()
            ]
            request.async_fn(*arguments, **request.async_fn_kwargs)
        dist.barrier()

    def finish(self) -> str | None:
        """megatron-core's collective end of a save; returns what failed here or, after a failed write, anywhere."""
        try:
            return self._finalize()
        finally:
            _log_to(None)

    def _finalize(self) -> str | None:
        def tell_failure() -> None:
            # state_dict_saver.py:263: the others wait for this flag when the first process could not write .metadata
            failed = torch.ones(1, dtype=torch.int, device=self._device)
            dist.broadcast(failed, src=0)

        for function, release_others in zip(self.request.finalize_fns, (tell_failure, dist.barrier), strict=True):
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


def _log_to(results: _Results | None) -> None:
    """Sends the writer's log to ``results`` instead of the terminal, or back."""
    logger = logging.getLogger(filesystem_async.__name__)
    logger.handlers[:] = [] if results is None else [results]
    logger.propagate = results is None
