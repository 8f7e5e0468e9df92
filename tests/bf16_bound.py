"""The bound of law 7 for bfloat16: a fused path is at most 1.1 times as far from float64 as the plain bfloat16 path.

Distances are norms of whole tensors, of results and of gradients. A plain path is what a model in bfloat16 computes
without this package's kernels: each operator rounds its result. The same table runs on the CPU (tests/unit), whose
kernels differ where its module says so, and on CUDA (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from drawn_packs import draw_pack, visible
from torch import Tensor

SEEDS = (1, 2, 3)
BOUND = 1.1

Path = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A fused path and its plain one.

    Attributes:
        inputs: draws the inputs in float64 from a generator; those that are floating-point get gradients.
        plain: in the dtype of its inputs, bfloat16 or float64; returns the result and tensors besides.
        fused: the product's, in bfloat16.
    """

    inputs: Callable[[torch.Generator], list[Tensor]]
    plain: Path
    fused: Path


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


# norm


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Hugging Face's, rounded before the product with the weight."""
    high = x if x.dtype == torch.float64 else x.float()
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def fused_norm(x: Tensor, weight: Tensor) -> Tensor:
    """What model/norm.py computes on CUDA; the CPU has a kernel too, which it does not use."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


# SwiGLU


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def fused_swiglu(x: Tensor) -> Tensor:
    from megatron_solopo.model.swiglu import SwiGLU

    settings: Any = SimpleNamespace(activation_func=F.silu, activation_func_clamp_value=None, glu_linear_offset=0.0)
    return SwiGLU(settings)(x)


# the log-prob head

ROWS, STATES = 700, 48


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def head_inputs(generator: torch.Generator) -> list[Tensor]:
    return [
        normal(generator, 90, STATES),
        normal(generator, ROWS, STATES, scale=0.5),
        torch.randint(0, ROWS, (90,), generator=generator),
    ]


def fused_head(chunk: int) -> Path:
    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from megatron_solopo.model.log_probs import response_log_probs

        return response_log_probs(hidden, weight, targets, ROWS, chunk)

    return head


# gradients of matrices, summed over packs


def plain_sums(grads: Tensor, inputs: Tensor) -> Tensor:
    """As DDP adds them: each product is rounded, the sum is in float32."""
    products = (grad.t() @ x for grad, x in zip(grads, inputs, strict=True))
    wide = torch.promote_types(grads.dtype, torch.float32)
    return torch.stack([product.to(wide) for product in products]).sum(0)


def fused_sums(grads: Tensor, inputs: Tensor) -> Tensor:
    from megatron_solopo.parallel.products import WeightGradients

    total = torch.zeros(grads.shape[-1], inputs.shape[-1], device=grads.device)
    with torch.no_grad():
        for grad, x in zip(grads, inputs, strict=True):
            WeightGradients.wgrad_gemm_accum_fp32(x, grad, total)
    return total


# experts

COUNTS = (37, 0, 5, 64)


def plain_experts(x: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(COUNTS), weights, strict=True)])


def fused_experts(x: Tensor, weights: Tensor) -> Tensor:
    from megatron_solopo.model.experts import GroupedProduct

    ends = torch.tensor(COUNTS).cumsum(0).to(x.device, torch.int32)
    result = GroupedProduct.apply(x, ends, COUNTS, False, *weights)
    assert isinstance(result, Tensor)
    return result


# attention of a pack, of 4 heads and 2 of keys

PACK = draw_pack(11, 1)
SCALE = 0.25


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax in float32, everything else rounded, as Hugging Face's "eager" attention."""
    seen = torch.from_numpy(visible(PACK)).to(query.device)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = torch.einsum("shd,thd->hst", query, key) * SCALE
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(query.dtype)
    return torch.einsum("hst,thd->shd", weights, value)


def fused_attention(kernels: str) -> Path:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from megatron_solopo.parallel.context import method_of
        from megatron_solopo.parallel.device_pack import cut, on_device
        from megatron_solopo.parallel.kernels import Kernels

        layout = on_device(cut(PACK, method_of(1, "allgather"), Kernels[kernels]).layout, query.device)
        return layout.attend(query, key, value, SCALE)

    return attend


def attention_inputs(generator: torch.Generator) -> list[Tensor]:
    return [normal(generator, len(PACK.tokens), heads, 64) for heads in (4, 2, 2)]


CASES: dict[str, Case] = {
    "norm": Case(lambda g: [normal(g, 64, 256, scale=3), 1 + normal(g, 256, scale=0.1)], plain_norm, fused_norm),
    "swiglu": Case(lambda g: [normal(g, 64, 256, scale=2)], plain_swiglu, fused_swiglu),
    "head": Case(head_inputs, plain_head, fused_head(16)),
    "head that keeps products": Case(head_inputs, plain_head, fused_head(96)),
    "gradients of matrices": Case(lambda g: [normal(g, 5, 32, 24), normal(g, 5, 32, 40)], plain_sums, fused_sums),
    "experts": Case(
        lambda g: [normal(g, sum(COUNTS), 64), normal(g, 4, 96, 64, scale=0.1)], plain_experts, fused_experts
    ),
}
"""Paths that run on both devices."""

CPU_CASES: dict[str, Case] = {"attention, cpu": Case(attention_inputs, plain_attention, fused_attention("CPU"))}
"""Kernels that the CPU alone has."""

CUDA_CASES: dict[str, Case] = {
    f"attention, {kernels.lower()}": Case(attention_inputs, plain_attention, fused_attention(kernels))
    for kernels in ("BLOCKS", "PROMPTS", "FLASH")
}
"""Kernels that CUDA alone has in 16 bits."""


def tensors(path: Path, inputs: Sequence[Tensor], dtype: torch.dtype, differentiable: bool) -> list[Tensor]:
    """The result of a path and the gradients of its inputs, in float64."""
    given = [x.to(dtype).requires_grad_(differentiable) if x.is_floating_point() else x for x in inputs]
    result = path(*given)
    assert isinstance(result, Tensor)
    if not differentiable:
        return [result.double()]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).bfloat16().to(result.device)
    gradients = torch.autograd.grad(result, [x for x in given if x.requires_grad], weight.to(result.dtype))
    return [x.double() for x in (result, *gradients)]


def distances(case: Case, seed: int, device: str) -> list[tuple[float, float]]:
    """(fused, plain) distance from float64 of each tensor, as parts of its norm."""
    drawn = case.inputs(torch.Generator().manual_seed(seed))
    inputs = [(x.bfloat16().double() if x.is_floating_point() else x).to(device) for x in drawn]
    differentiable = case.plain is not plain_sums
    exact = tensors(case.plain, inputs, torch.float64, differentiable)
    plain, fused = (tensors(path, inputs, torch.bfloat16, differentiable) for path in (case.plain, case.fused))
    return [
        (((ours - truth).norm() / truth.norm()).item(), ((theirs - truth).norm() / truth.norm()).item())
        for ours, theirs, truth in zip(fused, plain, exact, strict=True)
    ]


def check_bound(case: Case, seed: int, device: str) -> None:
    for number, (fused, plain) in enumerate(distances(case, seed, device)):
        assert plain > 0, number
        print(f"{'gradient' if number else 'result'} {fused / plain:.2f}", end=" ")
        assert fused <= BOUND * plain, f"tensor {number}: {fused:.3g} from float64, the plain path {plain:.3g}"
