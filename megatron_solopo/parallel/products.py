"""Products with weights outside megatron-core's matrices, whose gradients are added to DDP's sums in float32."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b, [M, K] and [K, N], to ``total``, [M, N].

    A product of 16 bits is added to a float32 sum without rounding it: by one kernel on CUDA, elsewhere in float32.
    """
    if total.dtype == a.dtype:
        total += a @ b
    elif total.device.type == "cuda" and total.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class WeightGradients:
    """What megatron-core calls of Apex's ``fused_weight_gradient_mlp_cuda`` (tensor_parallel/layers.py:680)."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """Adds the gradient of a [out, in] weight, from [S, in] inputs and the [S, out] gradient of its outputs."""
        add_product(main_grad, grad.t(), inputs)


def added_gradient(weight: Tensor) -> Tensor:
    """Returns what autograd gets for a weight whose gradient was added to its ``main_grad``: a placeholder.

    megatron-core's matrices do the same (tensor_parallel/layers.py:692): DDP's hook needs a gradient, which it drops.
    So it may lie in the memory of ``main_grad``, unless autograd adds another gradient to it.
    """
    setattr(weight, "grad_added_to_main_grad", True)
    if getattr(weight, "zero_out_wgrad", False):  # the embedding's gradient is added to this one
        return torch.zeros_like(weight)
    main_grad: Tensor = vars(weight)["main_grad"]
    return main_grad.view(weight.dtype).view(-1)[: weight.numel()].view(weight.shape)


def wait_for(layer: nn.Module) -> None:
    """Waits for the overlapped gather of the parameters of a layer whose forward does not run."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())


def weight_of(layer: nn.Module) -> Tensor:
    """Returns the weight of a layer whose forward does not run, once its overlapped parameter gather is done."""
    wait_for(layer)
    return cast(Tensor, layer.weight)
