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
    gelu's tanh form in the place of silu, where that is the model's ``activation_func``.

    megatron-core 0.19.2's own (mlp.py:323) adds 0 to up, which is a copy, keeps silu(gate) and that copy for backward,
    and copies the gradients of its halves into one tensor.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gelu = config.activation_func is F.gelu

    def forward(self, x: Tensor) -> Tensor:
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
