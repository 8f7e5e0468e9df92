"""Device memory of a rehearsed step: what is held at each moment, by kind, and where the peak is.

torch's own tracker (`torch.distributed._tools.mem_tracker`, 2.11) has the same principle: a dispatch mode sees every
new storage, and a weak reference its end. It does not serve here, see docs/planning.md.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, WORKING, LOG_PROBS, COMMUNICATION, INPUTS = (
    "activations",
    "working set",
    "log-probs",
    "communication",
    "inputs",
)
KINDS = {
    WEIGHTS: "the parameters of this process",
    GRADIENTS: "the buffers that their gradients are summed in",
    OPTIMIZER: "main parameters and moments, the share of this process",
    INPUTS: "packs, their attention layouts, what the loss reads",
    ACTIVATIONS: "what layers keep between forward and backward: their inputs alone with recomputation",
    WORKING: "of the layer, loss or update at hand",
    LOG_PROBS: "logits of a chunk of response tokens and what their gradient needs",
    COMMUNICATION: "what collectives write into or send from",
}
"""Kinds of device memory and what each is."""

BUILD, SCORE, FORWARD, BACKWARD, UPDATE = "build", "score", "forward", "backward", "update"
"""The start of a run, then the phases of a step; `SCORE` is a resident reference's forward pass. What happens in
`FORWARD` while autograd's engine is at work counts as `BACKWARD`."""

CUDA_BLOCK = 512
"""torch's allocator rounds every request up to this many bytes (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)."""


@dataclass
class Moment:
    """What is held at one moment.

    Attributes:
        held: bytes by kind.
        phase: what the step was doing.
        operation: the operator whose result came last, and the line of code that asked for it.
        blocks: how many blocks had been made until then.
    """

    held: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    operation: str = ""
    blocks: int = 0

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclass(slots=True)
class _Block:
    size: int
    kind: str
    number: int


class Ledger(TorchDispatchMode):
    """Follows the storages of fake tensors on one device.

    Attributes:
        held: bytes now, by kind.
        peaks: phase -> its largest moment.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.held = dict.fromkeys(KINDS, 0)
        self.peaks: dict[str, Moment] = {}
        self._blocks: dict[int, _Block] = {}
        self._total = self._made = 0
        self._highest: dict[str, int] = {}
        self._phase, self._kind = "", WORKING

    @property
    def total(self) -> int:
        """Bytes held now."""
        return self._total

    @property
    def peak(self) -> Moment:
        """The largest moment of all phases."""
        return max(self.peaks.values(), key=lambda moment: moment.total)

    def enter(self, phase: str, kind: str = WORKING) -> None:
        """Begins another part of the rehearsal, with its own peak, which makes memory of ``kind``."""
        self._phase, self._kind = phase, kind
        self._note(None)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Counts what is made inside as ``kind``."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts these tensors' storages as ``kind`` since they were made; those that were not seen yet from now on."""
        peak = self.peaks.get(self._phase, Moment())
        for tensor in tensors:
            self._see(tensor, None)
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                if block.number < peak.blocks:
                    peak.held[block.kind] -= block.size
                    peak.held[kind] += block.size
                self._change(block, kind)

    def keep(self, of: Container[str], kind: str, but: Iterable[Tensor] = ()) -> None:
        """Counts all that is held of some kinds, ``but`` these tensors, as another from now on."""
        spared = {tensor.untyped_storage()._cdata for tensor in but}
        for key, block in self._blocks.items():
            if block.kind in of and key not in spared:
                self._change(block, kind)

    def _change(self, block: _Block, kind: str) -> None:
        self.held[block.kind] -= block.size
        self.held[kind] += block.size
        block.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            for tensor in _tensors(args):
                block = self._blocks.get(tensor.untyped_storage()._cdata)
                if block is not None and block.kind == WORKING:
                    self._change(block, COMMUNICATION)
            return result
        for tensor in _tensors((result,)):
            self._see(tensor, func)
        return result

    def _see(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._rounded(storage.nbytes())
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(0, self._kind, self._made)
            self._made += 1
            weakref.finalize(storage, self._free, key).atexit = False
        if size != block.size:  # new, or resized
            self.held[block.kind] += size - block.size
            self._total += size - block.size
            block.size = size
            self._note(func)

    def _rounded(self, size: int) -> int:
        return -(-size // CUDA_BLOCK) * CUDA_BLOCK if self.device.type == "cuda" else size

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.held[block.kind] -= block.size
        self._total -= block.size

    def _note(self, func: Any) -> None:
        phase = BACKWARD if self._phase == FORWARD and in_backward() else self._phase
        if self._total > self._highest.get(phase, -1):
            self._highest[phase] = self._total
            operation = f"{func} from {_caller()}" if func is not None else ""
            self.peaks[phase] = Moment(dict(self.held), phase, operation, self._made)


def _tensors(values: Any) -> Iterator[FakeTensor]:
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _caller() -> str:
    """Returns the innermost line that is neither torch's nor of this folder; where none asks, the node of autograd."""
    node = torch._C._current_autograd_node()
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "/planning/" not in name and "cpu_shim" not in name and not name.startswith("<"):
            break
        frame = frame.f_back
    where = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else "?"
    return f"{node.name()} ({where})" if node is not None else where


def _short(path: str) -> str:
    for root in ("site-packages/", "megatron_solopo/"):
        if root in path:
            return (root if root == "megatron_solopo/" else "") + path.rpartition(root)[2]
    return path


@contextmanager
def followed(ledger: Ledger, models: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, what is held when a layer's forward pass ends is `ACTIVATIONS`, no longer `WORKING` or
    `COMMUNICATION`, and what the log-prob head makes is `LOG_PROBS`.

    A recomputation runs within backward and leaves nothing for later. The buffer that sequence parallelism gathers
    into is one for all layers.
    """
    from megatron.core.parallel_state import get_global_memory_buffer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_solopo.model import log_probs

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if module.training and not in_backward():
            ledger.keep((WORKING, COMMUNICATION), ACTIVATIONS, but=get_global_memory_buffer().buffer.values())

    layers = [module for model in models for module in model.modules() if isinstance(module, TransformerLayer)]
    hooks = [module.register_forward_hook(keep) for module in layers]
    head, log_probs._ChunkedLogProbs = log_probs._ChunkedLogProbs, _counted(ledger, log_probs._ChunkedLogProbs)
    try:
        yield
    finally:
        log_probs._ChunkedLogProbs = head
        for hook in hooks:
            hook.remove()


def _counted(ledger: Ledger, function: type[torch.autograd.Function]) -> Any:
    def forward(*args: Any) -> Any:
        with ledger.making(LOG_PROBS):
            return function.forward(*args)

    def backward(*args: Any) -> Any:
        with ledger.making(LOG_PROBS):
            return function.backward(*args)

    return type(function.__name__, (function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def in_backward() -> bool:
    """Returns whether autograd's engine is at work."""
    return torch._C._current_graph_task_id() != -1
