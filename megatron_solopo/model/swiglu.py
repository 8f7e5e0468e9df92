"""Gated activations in pure PyTorch, for megatron-core's layer specs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_solopo.model.repeated import Repeatable


def gelu_tanh(x: Tensor) -> Tensor:
    """Computes gelu in its tanh form."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": F.gelu}
"""transformers' name -> the ``activation_func`` of megatron-core's TransformerConfig, which allows functions of
`torch.nn.functional` alone; F.gelu means its tanh form."""


class SwiGLU(nn.Module):
    """Computes silu(gate) * up of [..., 2 x inner] (gate, up) to [..., inner], and keeps its input alone; GeGLU, with
    gelu's tanh form in the place of silu, where that is the model's ``activation_func``; `ClampedGLU` where the model
    has an ``activation_func_clamp_value``.

    megatron-core 0.19.2's own (mlp.py:323) adds 0 to up, which is a copy, keeps silu(gate) and that copy for backward,
    and copies the gradients of its halves into one tensor.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gelu = config.activation_func is F.gelu
        self.limit, self.offset = config.activation_func_clamp_value, config.glu_linear_offset

    def forward(self, x: Tensor) -> Tensor:
        if self.limit is not None:
            return ClampedGLU.apply(x, self.limit, self.offset)
        return _SwiGLU.apply(x, self.gelu)


class _SwiGLU(Repeatable):
    @staticmethod
    def forward(ctx, x: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gelu = gelu
        return _product(x, gelu)

    @staticmethod
    def repeat(ctx) -> Tensor:
        (x,) = ctx.saved_tensors
        return _product(x, ctx.gelu)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grads = torch.empty_like(x)
        of_gate, of_up = grads.chunk(2, dim=-1)
        torch.mul(grad, _activated(gate, ctx.gelu), out=of_up)
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(grad * up, gate, approximate="tanh", grad_input=of_gate)
        else:
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return grads, None


def _activated(gate: Tensor, gelu: bool) -> Tensor:
    return gelu_tanh(gate) if gelu else F.silu(gate)


def _product(x: Tensor, gelu: bool) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _activated(gate, gelu).mul_(up)


class ClampedGLU(Repeatable):
    """Computes q(min(gate, limit)) * (clamp(up, -limit, limit) + offset) with q(x) = x sigmoid(1.702 x).

    It is gpt-oss's (openai/gpt-oss, gpt_oss/torch/model.py, ``swiglu``), and megatron-core's quick_gelu with
    ``activation_func_clamp_value`` and ``glu_linear_offset``; q(x) is silu(1.702 x) / 1.702.
    """

    SLOPE = 1.702

    @staticmethod
    def forward(ctx, x: Tensor, limit: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit, ctx.offset = limit, offset
        return ClampedGLU._product(ctx, x)

    @staticmethod
    def repeat(ctx) -> Tensor:
        (x,) = ctx.saved_tensors
        return ClampedGLU._product(ctx, x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        (x,) = ctx.saved_tensors
        steep, up = ClampedGLU._clamped(ctx, x)
        grads = torch.empty_like(x)
        of_gate, of_up = grads.chunk(2, dim=-1)
        torch.mul(grad, F.silu(steep).div_(ClampedGLU.SLOPE), out=of_up)
        torch.ops.aten.silu_backward.grad_input(up.mul_(grad), steep, grad_input=of_gate)
        gate, up = x.chunk(2, dim=-1)
        of_gate.masked_fill_(gate > ctx.limit, 0)
        of_up.masked_fill_(up.abs() > ctx.limit, 0)
        return grads, None, None

    @staticmethod
    def _product(ctx, x: Tensor) -> Tensor:
        steep, up = ClampedGLU._clamped(ctx, x)
        return F.silu(steep).mul_(up).div_(ClampedGLU.SLOPE)

    @staticmethod
    def _clamped(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1.702 x gate and up + offset."""
        gate, up = x.chunk(2, dim=-1)
        steep = gate.clamp(max=ctx.limit).mul_(ClampedGLU.SLOPE)
        return steep, up.clamp(-ctx.limit, ctx.limit).add_(ctx.offset)
