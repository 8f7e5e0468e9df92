"""Notices what makes the host wait for the device: reading a value, or a shape that depends on values."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in INDEXING:  # its tags do not distinguish indices from masks
            reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            reads = bool(BY_VALUE & set(func.tags))
        if reads:
            self.seen.append(f"{func} from {_caller()}")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Reads that reach no operator."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.seen.append(f"{func.__name__} from {_caller()}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line that is neither torch's, the shim's nor this file's."""
    ours = ("/torch/", "cpu_shim.py", "host_reads.py")
    frames = [frame for frame in traceback.extract_stack() if not any(name in frame.filename for name in ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}"


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Records the reads of tensors inside, each with the line that reads; of this thread alone."""
    seen: list[str] = []
    with _Operators(seen), _Methods(seen):
        yield seen
