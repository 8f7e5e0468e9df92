"""Products of 16-bit matrices that are added to sums in float32, as gradients of weights are."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b, [M, K] and [K, N], to ``total``, [M, N].

    On CUDA it is one kernel that adds without rounding the product; elsewhere a product in 16 bits is rounded first.
    """
    if total.device.type == "cuda" and total.dtype == torch.float32 and a.dtype.itemsize == 2:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += (a @ b).to(total.dtype)


class WeightGradients:
    """What megatron-core calls of Apex's ``fused_weight_gradient_mlp_cuda`` (tensor_parallel/layers.py:680)."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """Adds the gradient of a [out, in] weight, from [S, in] inputs and the [S, out] gradient of its outputs."""
        add_product(main_grad, grad.t(), inputs)
