"""SwiGLU in pure PyTorch, for megatron-core's layer specs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_solopo.model.repeated import Repeatable


class SwiGLU(nn.Module):
    """Computes silu(gate) * up of [..., 2 x inner] (gate, up) to [..., inner], and keeps its input alone.

    megatron-core 0.19.2's own (mlp.py:323) adds 0 to up, which is a copy, keeps silu(gate) and that copy for backward,
    and copies the gradients of its halves into one tensor.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)


class _SwiGLU(Repeatable):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def repeat(ctx) -> Tensor:
        return _swiglu(*ctx.saved_tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grads = torch.empty_like(x)
        of_gate, of_up = grads.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return grads


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
