"""The experts of a layer, for megatron-core's layer specs: on CUDA one product for all experts of a process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_solopo.model.lora import Adapter, adapter_of
from megatron_solopo.parallel.device_pack import on_device
from megatron_solopo.parallel.products import add_product, added_gradient, wait_for, weight_of

ALIGNED = 8
"""`F.grouped_mm` takes matrices whose rows begin at multiples of 16 bytes, of which an expert may have any number."""


def grouped(settings: TransformerConfig, device: torch.device, rank: int = ALIGNED) -> bool:
    """Whether a layer's experts are computed together: on CUDA in bfloat16, where torch 2.11 has a kernel for it.

    Args:
        rank: of the experts' adapters.
    """
    if device.type != "cuda" or settings.params_dtype != torch.bfloat16:
        return False
    inner = settings.moe_ffn_hidden_size or settings.ffn_hidden_size or 0
    widths = settings.hidden_size, inner // (settings.expert_tensor_parallel_size or 1)
    return not any(width % ALIGNED for width in (*widths, rank))


def describe_experts(settings: TransformerConfig, device: torch.device, rank: int = ALIGNED) -> str:
    """Describes in words, for the log, how portable layers compute experts on a CUDA device.

    Args:
        rank: see `grouped`.
    """
    if grouped(settings, device, rank):
        return "experts: one product for all experts of a process"
    return (
        f"experts: one after another; together they need --bf16, and widths and ranks of adapters that are multiples "
        f"of {ALIGNED}"
    )


class Experts(SequentialMLP):
    """megatron-core's experts with all their parameters and names, which it computes one after another.

    That is 7 kernels an expert and layer forward, of which a GPU waits for the host's launches. Where `grouped` allows
    it, they are 2 products and an activation for all experts; backward likewise, besides a product for each weight,
    which adds it to DDP's sum in float32.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.config.add_bias_linear:  # where expert tensor parallelism is 1
            for expert in self.local_experts:
                # Without the sum over one rank, whose result is a view that mcore may not add the bias to (mlp.py:354).
                cast(Any, expert).linear_fc2.explicit_expert_comm = True

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Any, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the experts' outputs times their weights.

        Args:
            permuted_local_hidden_states: [S, H], rows ordered by expert.
            tokens_per_expert: rows of each expert, on the host.
            permuted_probs: [S], the weight of each row.

        Returns:
            [S, H], and no bias.
        """
        x, counts = permuted_local_hidden_states, tokens_per_expert.tolist()
        adapter = next((one for one in self.modules() if isinstance(one, Adapter)), None)
        rank = ALIGNED if adapter is None else adapter.rank
        if len(counts) == 1 or not x.shape[0] or not grouped(self.config, x.device, rank):
            return super().forward(x, tokens_per_expert, permuted_probs)
        return self.together(x, counts, permuted_probs), None

    def together(self, x: Tensor, counts: Sequence[int], probs: Tensor) -> Tensor:
        """`forward` in one call for all experts, on any device and in any dtype of `F.grouped_mm`."""
        experts = [cast(MLP, expert) for expert in self.local_experts]
        ends = on_device(torch.tensor([*accumulate(counts)], dtype=torch.int32), x.device)
        fused = self.config.gradient_accumulation_fusion

        biased = self.config.add_bias_linear
        # [S, experts]: its product with the biases is each row's, and backward's the sum over an expert's rows
        chosen = _choices(ends, x) if biased else None

        def product(rows: Tensor, matrices: Sequence[Any], scale: Tensor | None = None) -> Tensor:
            weights = [weight_of(matrix) for matrix in matrices]
            result = cast(Tensor, GroupedProduct.apply(rows, ends, counts, fused, *weights))
            if chosen is not None:
                added = chosen @ torch.stack([matrix.bias for matrix in matrices])
                result = result + (added if scale is None else (added * scale[:, None]).to(added.dtype))
            adapters = [adapter for matrix in matrices if (adapter := adapter_of(matrix)) is not None]
            return _adapted(adapters, rows, result, ends, counts)

        inner = cast(Any, experts[0].activation_func)(product(x, [expert.linear_fc1 for expert in experts]))
        inner = (inner * probs[:, None]).to(x.dtype)
        return product(inner, [expert.linear_fc2 for expert in experts], probs)


def _choices(ends: Tensor, x: Tensor) -> Tensor:
    """Returns [S, experts] in the dtype of ``x``, 1 for the expert of each row; its rows end at [experts] ``ends``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return ((rows < ends) & (rows >= F.pad(ends[:-1], (1, 0)))).to(x.dtype)


def _adapted(adapters: Sequence[Adapter], x: Tensor, output: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the ``output`` of a matrix of all experts with what its adapters add, see `Adapter.forward`."""
    if not adapters or not adapters[0].enabled:
        return output
    for adapter in adapters:
        wait_for(adapter)
    down = [torch.cat(adapter.matrices("a")) for adapter in adapters]
    inner = cast(Tensor, GroupedProduct.apply(x, ends, counts, False, *down))
    up = zip(*(adapter.matrices("b") for adapter in adapters), strict=True)  # of each projection all experts' B
    parts = [
        cast(Tensor, GroupedProduct.apply(z.contiguous(), ends, counts, False, *each))
        for z, each in zip(inner.split(adapters[0].rank, -1), up, strict=True)
    ]
    added = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return torch.add(output, added, alpha=adapters[0].scale)


class GroupedProduct(torch.autograd.Function):
    """Computes x @ weight^T of each expert's rows, and keeps x alone: weights are put together again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, counts: Sequence[int], fused: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        ctx.counts, ctx.fused = counts, weights if fused else None
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch annotates any number
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = F.grouped_mm(grad, torch.stack(weights), offs=ends)
        if not any(ctx.needs_input_grad[4:]):  # with LoRA
            return of_x, *(None,) * (len(weights) + 3)
        parts = zip(grad.split(ctx.counts), x.split(ctx.counts), strict=True)
        if ctx.fused is None:
            return of_x, None, None, None, *(of_rows.t() @ rows for of_rows, rows in parts)
        for weight, (of_rows, rows) in zip(ctx.fused, parts, strict=True):
            if rows.shape[0]:
                add_product(weight.main_grad, of_rows.t(), rows)
        return of_x, None, None, None, *map(added_gradient, ctx.fused)
