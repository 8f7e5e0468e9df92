"""Inputs of recomputed layers, and kept attention, in host memory between forward and backward (--activation-offload).

A recomputed layer is megatron-core's checkpoint, which saves its input as autograd does, so hooks of saved tensors
catch it whatever the kind of checkpoint (torch's `save_on_cpu` does the same, and waits for each copy). A stream of
their own copies the tensors while the layers compute: to the host during the next layer's forward pass, back during
the backward pass of the layer before. On the CPU the same code copies within host memory, which saves nothing and is
for tests.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

BLOCK = 16 * 2**20
"""Bytes of a block of pinned memory; torch's allocator of it rounds every request up to a power of two."""

SMALLEST = 2**20
"""Bytes; a smaller tensor stays on the device."""


class HostBlocks:
    """Pinned blocks of one size, reused by layers, packs and steps.

    Attributes:
        count: blocks made; they are never freed.
    """

    def __init__(self) -> None:
        self.count = 0
        self._free: list[Tensor] = []

    def take(self, size: int) -> list[Tensor]:
        """Returns blocks for ``size`` bytes."""
        blocks = []
        for _ in range(math.ceil(size / BLOCK)):
            if not self._free:
                self._free.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True))
                self.count += 1
            blocks.append(self._free.pop())
        return blocks

    def give_back(self, blocks: list[Tensor]) -> None:
        self._free += blocks


@dataclass
class Moved:
    """A tensor on the host.

    Attributes:
        order: its dimensions by falling stride; shape: sizes in this order.
        blocks: its bytes in this order; empty when it is on the way back.
        tensor: it, from when its copy to the device begins until it is read.
        arrived: the event of the end of that copy.
    """

    checkpoint: Checkpoint
    order: list[int]
    shape: list[int]
    dtype: torch.dtype
    device: torch.device
    blocks: list[Tensor]
    tensor: Tensor | None = None
    arrived: Any = None


@dataclass
class Checkpoint:
    """What one checkpoint, of a layer or several, keeps on the host.

    Attributes:
        before: the checkpoint before it in the same forward pass, whose backward pass is the next.
    """

    before: Checkpoint | None
    parts: list[Moved] = field(default_factory=list)


class Offload:
    """The tensors on the host of all model chunks of a process.

    Attributes:
        moved: bytes that were moved to the host until now.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._blocks = HostBlocks()
        self._stream = torch.cuda.Stream()
        self._hooks = contextlib.ExitStack()
        self._checkpoint = Checkpoint(None)
        self._leaving: tuple[Tensor, Any] | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it holds."""
        return self._blocks.count * BLOCK

    def attach(self, decoder: nn.Module) -> None:
        """Moves the inputs of a decoder's recomputed layers; the final norm's input is needed first and stays."""
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end, always_call=True)
        if (norm := getattr(decoder, "final_layernorm", None)) is not None:
            norm.register_forward_pre_hook(self._end)

    def _begin(self, decoder: nn.Module, args: Any) -> None:
        self._checkpoint = Checkpoint(None)
        if decoder.training and torch.is_grad_enabled():
            self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, self.get))

    def _end(self, *ignored: Any) -> None:
        self._hooks.close()

    def _save(self, tensor: Tensor) -> Tensor | Moved:
        """What autograd saves; a layer's input is the last that its checkpoint keeps."""
        saved = self.put(tensor)
        if isinstance(saved, Moved):
            self._checkpoint = Checkpoint(self._checkpoint)
        return saved

    def put(self, tensor: Tensor) -> Tensor | Moved:
        """Begins to move a tensor to the host, if it is large and no parameter."""
        size = tensor.nbytes
        if size < SMALLEST or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        self._let_go()
        order = sorted(range(tensor.dim()), key=lambda place: -tensor.stride(place))
        ordered = tensor.detach().permute(order)
        flat, blocks = ordered.reshape(-1), self._blocks.take(size)
        moved = Moved(self._checkpoint, order, [*ordered.shape], tensor.dtype, tensor.device, blocks)
        self._checkpoint.parts.append(moved)
        computed = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            for block, part in zip(blocks, flat.view(torch.uint8).split(BLOCK), strict=True):
                block[: len(part)].copy_(part, non_blocking=True)
            self._leaving = flat, self._stream.record_event()
        self.moved += size
        return moved

    def _let_go(self) -> None:
        """Lets the device reuse the memory of the tensor that was moved last, once its copy is done."""
        if self._leaving is not None:
            torch.cuda.current_stream().wait_event(self._leaving[1])
            self._leaving = None

    def get(self, saved: Tensor | Moved) -> Tensor:
        """Returns a tensor that `put` got, and begins to move those of the checkpoint before it to the device."""
        if not isinstance(saved, Moved):
            return saved
        self._let_go()
        self._load(saved.checkpoint)
        assert saved.tensor is not None and saved.arrived is not None
        torch.cuda.current_stream().wait_event(saved.arrived)
        tensor, saved.tensor = saved.tensor, None
        if saved.checkpoint.before is not None:
            self._load(saved.checkpoint.before)
        return tensor

    def put_all(self, results: list[Any]) -> list[Any]:
        """`put` for every tensor in lists and tuples."""
        return tree_map_only(Tensor, self.put, results)

    def get_all(self, results: list[Any]) -> list[Any]:
        """`get` for every tensor in lists and tuples."""
        return tree_map_only((Tensor, Moved), self.get, results)

    def _load(self, checkpoint: Checkpoint) -> None:
        for moved in checkpoint.parts:
            if not moved.blocks:
                continue
            flat = torch.empty(math.prod(moved.shape), dtype=moved.dtype, device=moved.device)
            allocated = torch.cuda.current_stream().record_event()  # what had this memory before is done
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(allocated)
                for block, part in zip(moved.blocks, flat.view(torch.uint8).split(BLOCK), strict=True):
                    part.copy_(block[: len(part)], non_blocking=True)
                moved.arrived = self._stream.record_event()
            # The same stream writes into them next, after these copies.
            self._blocks.give_back(moved.blocks)
            moved.blocks = []
            moved.tensor = flat.view(moved.shape).permute([moved.order.index(n) for n in range(len(moved.order))])
