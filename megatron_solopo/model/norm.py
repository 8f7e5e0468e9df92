"""RMSNorm in pure PyTorch, for megatron-core's layer specs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight in float32 (float64 stays float64), on the CPU as Hugging Face models do.

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
        if x.device.type == "cuda":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        high = x if x.dtype == torch.float64 else x.float()
        normed = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
