"""RMSNorm in pure PyTorch, for megatron-core's layer specs, and a layer with norms of what its parts add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_solopo.model.repeated import Repeatable


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight in float32 (float64 stays float64), on the CPU as Hugging Face models do, and keeps
    its input and 1 / rms(x) alone.

    On CUDA it is torch's fused kernel, which rounds once, after the product with the weight; Hugging Face rounds before
    it too. With ``layernorm_zero_centered_gamma`` the factor is 1 + weight, in float32, and the product is rounded
    alone, as in Gemma.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its weight, so that its
    gradient is summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: object) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden], same dtype."""
        return (_ZeroCentered if self.zero_centered else _RMSNorm).apply(x, self.weight, self.eps)


class _RMSNorm(Repeatable):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if x.device.type == "cuda":
            result, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
        else:
            inverse = torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + eps)
            result = weight * (x * inverse).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    def repeat(ctx) -> Tensor:
        x, weight, inverse = ctx.saved_tensors
        if x.device.type == "cuda":
            return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, ctx.eps)[0]
        return weight * (x * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        x, weight, inverse = ctx.saved_tensors
        if x.device.type == "cuda":
            both = [True, True]
            return *torch.ops.aten._fused_rms_norm_backward(grad, x, x.shape[-1:], inverse, weight, both), None
        normed = x * inverse  # in float32 at least, as `inverse` is
        of_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
        of_normed = _wide(grad * weight)
        return _of_input(of_normed, normed, inverse).to(x.dtype), of_weight, None


class _ZeroCentered(Repeatable):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return _ZeroCentered.repeat(ctx, x, weight, inverse)

    @staticmethod
    def repeat(ctx, *saved: Tensor) -> Tensor:
        x, weight, inverse = saved or ctx.saved_tensors
        return (x * inverse * (1 + _wide(weight))).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x * inverse, _wide(grad)
        of_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        of_normed = grad * (1 + _wide(weight))
        return _of_input(of_normed, normed, inverse).to(x.dtype), of_weight, None


def _of_input(of_normed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Returns the gradient of x from that of x / rms(x)."""
    mean = (of_normed * normed).mean(-1, keepdim=True)
    return torch.addcmul(of_normed, normed, mean, value=-1).mul_(inverse)


class WidthNorm(nn.Module):
    """RMSNorm of queries or keys over all heads, of which each tensor-parallel rank has some.

    Args:
        heads: of all ranks.
    """

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__()
        self.eps, self.width = config.layernorm_epsilon, heads * cast(int, config.kv_channels)
        rows = self.width // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.ones(rows, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[S, heads of this rank, head_dim] -> the same shape and dtype; a sum over the ranks, forward and backward."""
        squares = _wide(x).pow(2).sum((1, 2), keepdim=True)
        group = cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())
        if group.size() > 1:
            squares = _Summed.apply(squares, group)
        normed = x * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight.view(x.shape[1:]) * normed).to(x.dtype)


class _Summed(torch.autograd.Function):
    """The sum over ranks, which all of them use."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SandwichLayer(TransformerLayer):
    """megatron-core's layer with two norms more: of what attention and MLP add to the residual stream."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attn_bda = _behind(self.post_attention_layernorm, self.self_attn_bda)
        self.mlp_bda = _behind(self.post_mlp_layernorm, self.mlp_bda)


def _behind(norm: RMSNorm, add: Callable[..., Any]) -> Callable[..., Any]:
    """Returns megatron-core's addition to the residual stream behind a norm of what is added."""

    def adding(training: bool, fused: bool) -> Callable[..., Any]:
        def normed(result: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = result
            return add(training, fused)((norm(output), bias), residual, dropout)

        return normed

    return adding


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
