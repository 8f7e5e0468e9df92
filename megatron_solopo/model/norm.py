"""RMSNorm in pure PyTorch, for megatron-core's layer specs."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_solopo.model.repeated import Repeatable


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight in float32 (float64 stays float64), on the CPU as Hugging Face models do, and keeps
    its input and 1 / rms(x) alone.

    On CUDA it is torch's fused kernel, which rounds once, after the product with the weight; Hugging Face rounds before
    it too.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its weight, so that its
    gradient is summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden], same dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps)


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
        mean = (of_normed * normed).mean(-1, keepdim=True)
        return torch.addcmul(of_normed, normed, mean, value=-1).mul_(inverse).to(x.dtype), of_weight, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
