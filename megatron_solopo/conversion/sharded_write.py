"""Writes a sharded state in megatron-core's distributed format, with features that its writer lacks."""

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
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_solopo.conversion.pieces import write_in_pieces
from megatron_solopo.conversion.stored import sharded_tensors
from megatron_solopo.errors import system_reason
from megatron_solopo.parallel.cpu_shim import results_queue

WriteItem = tuple[Any, torch.Tensor]
"""(torch's write item of a tensor, the tensor)."""


def in_own_storage(part: torch.Tensor) -> torch.Tensor:
    """The same CPU memory as a tensor with a storage of its own; megatron-core's writer copies parts of a storage."""
    part = part.detach()
    if part.device.type != "cpu" or not part.is_contiguous() or part.dim() == 0:
        return part
    begin = part.storage_offset() * part.itemsize
    storage = part.untyped_storage()[begin : begin + part.numel() * part.itemsize]
    return torch.empty(0, dtype=part.dtype).set_(storage, 0, part.shape, part.stride())


class _Results(logging.Handler):
    """The channel from a writer to its training process: megatron-core's queue, with the reason of a failed write.

    It is memory that a forked writer shares, instead of megatron-core's manager process, which survives a killed run.
    The writer only logs the reason of a failure, so this class is a handler of its log.
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
    """A stream for torch.save that writes in pieces."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        try:
            write_in_pieces(self._stream, data)
        except OSError as error:  # torch's archive would raise an error about a wrong position instead
            logging.getLogger(filesystem_async.__name__).error(error)
            raise
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


class _InPieces(_StorageWriterTransforms):
    """The hook of torch's checkpoint writer that replaces its stream."""

    def transform_save_stream(self, write_item: Any, raw_stream: BinaryIO) -> Any:
        return super().transform_save_stream(write_item, _Pieces(raw_stream))


class ShardedWrite:
    """Writes a sharded state into a folder, from its plan (in the constructor) to its metadata (`finish`).

    On the CPU the tensors are written from where they are, without copies.

    Args:
        device: of this process's collectives.
        strategy: shares out the tensors that several processes hold; None: the first of them writes a tensor.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        device: torch.device,
        strategy: FullyParallelSaveStrategyWrapper | None = None,
    ) -> None:
        self._device, results = device, _Results()
        apply_factories(state)
        for part in sharded_tensors(state):
            part.data = in_own_storage(part.data)
        # The manifest holds digests of the files. torch's checksum of every tensor, which nothing reads, takes longer
        # than writing.
        torch.serialization.set_crc32_options(False)
        with results_queue(results):
            request = dist_checkpointing.save(
                state, str(folder), strategy, async_sharded_save=True, async_strategy="mcore"
            )
        assert request is not None  # an asynchronous save returns one
        self.request = request
        _log_to(results)
        if self.request.async_fn is not None:  # None: other processes write everything that this one holds
            transforms, *_ = self.request.async_fn.args  # of write_preloaded_data_multithread, filesystem_async.py:220
            transforms[:] = [_InPieces()]

    def run(self, prepare: Callable[[Sequence[WriteItem]], Iterable[WriteItem]] = iter) -> None:
        """Writes this process's part synchronously; collective. Not for callers that run `request` elsewhere.

        dist_checkpointing's own synchronous save starts an interpreter for each writer.

        Args:
            prepare: returns the items to write for the items of a file; called when they are written.
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
        """Runs megatron-core's collective end of a save. Returns the reason of a failure here or, after a failed write,
        of any process; None after success."""
        try:
            return self._finalize()
        finally:
            _log_to(None)

    def _finalize(self) -> str | None:
        def broadcast_failure() -> None:
            # state_dict_saver.py:263: other ranks wait for this flag when rank 0 could not write .metadata
            failed = torch.ones(1, dtype=torch.int, device=self._device)
            dist.broadcast(failed, src=0)

        for function, release_others in zip(self.request.finalize_fns, (broadcast_failure, dist.barrier), strict=True):
            try:
                function()
            except CheckpointException as error:  # raised on all processes; rank 0 has the reasons
                causes = [cause for cause, _ in error.failures.values()]
                return system_reason(causes[0]) if causes else "another process could not write"
            except Exception as error:
                if dist.get_rank() == 0:
                    release_others()
                return system_reason(error)
        return None


def _log_to(results: _Results | None) -> None:
    """Redirects the writer's log to ``results``; None: to the terminal."""
    logger = logging.getLogger(filesystem_async.__name__)
    logger.handlers[:] = [] if results is None else [results]
    logger.propagate = results is None
