"""Matrices that keep for backward how their input was computed, and not the input.

The result of a norm or of SwiGLU follows from what that function keeps for backward itself; computing it again costs
reading and writing it once.

torch's hooks of saved tensors could do it, but they save weights anew too, without the attributes by which DDP and
megatron-core agree on a gradient that is in `main_grad` already.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn


class Repeatable(torch.autograd.Function):
    """A function whose result can be computed again from what it saves for backward."""

    @staticmethod
    def repeat(ctx: Any) -> Tensor:
        """Returns the result of the forward pass again."""
        raise NotImplementedError


def save_input(ctx: Any, x: Tensor, *others: Tensor) -> None:
    """Saves the input of a function, and other tensors, for its backward; of the result of a `Repeatable` its node."""
    node = x.grad_fn
    function = getattr(type(node), "_forward_cls", None)
    ctx.source = node if function is not None and issubclass(function, Repeatable) else None
    ctx.save_for_backward(*(others if ctx.source is not None else (x, *others)))


def saved_input(ctx: Any) -> tuple[Tensor, ...]:
    """Returns what `save_input` saved; once, in backward."""
    if ctx.source is None:
        return ctx.saved_tensors
    return (type(ctx.source)._forward_cls.repeat(ctx.source), *ctx.saved_tensors)


_MEGATRONS: Any = LinearWithGradAccumulationAndAsyncCommunication


class _Linear(torch.autograd.Function):
    """megatron-core's product, which keeps its input by `save_input`."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        result = _MEGATRONS.forward(ctx, input, weight, *settings)
        save_input(ctx, input, weight)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        of_theirs = SimpleNamespace(**vars(ctx), saved_tensors=saved_input(ctx))
        return _MEGATRONS.backward(of_theirs, grad)


class _RepeatedInput:
    """A matrix whose input is computed again where that is a `Repeatable`'s result; a frozen one keeps no input."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        if not weight.requires_grad:
            theirs: Any = super()
            return theirs._forward_impl(input=input, weight=weight, **settings)
        return _product(input, weight, **settings)


def _product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = None,
    tp_group: Any = None,
    gtp_remat_size: int = 1,
) -> Any:
    """megatron-core's ``linear_with_grad_accumulation_and_async_allreduce`` (tensor_parallel/layers.py:775)."""
    group = get_tensor_model_parallel_group_if_none(tp_group)
    fused, buffers = gradient_accumulation_fusion, (grad_output_buffer, wgrad_deferral_limit)
    return _Linear.apply(
        input, weight, bias, fused, allreduce_dgrad, sequence_parallel, *buffers, group, gtp_remat_size
    )


class ColumnParallel(_RepeatedInput, ColumnParallelLinear):
    """megatron-core's matrix cut by its outputs."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        group: Any = self.tp_group  # mcore annotates None, which its constructor replaces
        if group.size() == 1:
            self.disable_grad_reduce = True  # else its input is another function's result, though nothing is reduced


class RowParallel(_RepeatedInput, RowParallelLinear):
    """megatron-core's matrix cut by its inputs."""


class Replicated(nn.Module):
    """A matrix that each tensor-parallel rank has whole, for the tokens that it has.

    With sequence parallelism these are a part of them, so the weight's gradient is summed over ranks as that of a norm.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int, group: Any) -> None:
        super().__init__()
        self.fused, self.group = config.gradient_accumulation_fusion, group
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return _product(x, self.weight, None, self.fused, False, sequence_parallel=False, tp_group=self.group)
