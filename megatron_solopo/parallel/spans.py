"""Attention of a pack whose tokens are spread over context-parallel ranks (`parallel.zigzag`).

Keys and values of all ranks are gathered for one layer at a time, in forward and again in backward; queries, outputs
and what is saved for backward are this rank's alone. torch's flash kernel computes each span of queries and returns
its log-sum-exps, by which the spans of a query are merged:

    lse = log(sum_i exp(lse_i)),  out = sum_i exp(lse_i - lse) out_i.

With the merged lse and out, the kernel's backward of one span is that span's part of the total gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Piece
from megatron_solopo.parallel.layout import RankLayout
from megatron_solopo.parallel.zigzag import Span, rows_of, spans_of


@dataclass(frozen=True)
class SpanLayout(RankLayout):
    """The attention layout of one rank.

    Attributes:
        spans: the keys that the queries of this rank attend to.
        gathered: [S] order of the ranks' rows once gathered: ``gathered[i]`` is a row of the pack.
        in_pack: [S] its inverse: the index of each row of the pack among the gathered ones.
        group: the group of the context-parallel ranks; None where this rank holds the complete pack.
    """

    spans: tuple[Span, ...]
    gathered: Tensor
    in_pack: Tensor
    group: dist.ProcessGroup | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Collective over ``group``."""
        return span_attention(query, key, value, self, scale)


def span_layout(pieces: Sequence[Piece], rank: int, size: int, group: dist.ProcessGroup | None) -> SpanLayout:
    """Makes the layout of a rank's part of a pack."""
    gathered = np.concatenate([rows_of(pieces, other, size) for other in range(size)])
    in_pack = torch.from_numpy(np.argsort(gathered))
    return SpanLayout(spans_of(pieces, rank, size), torch.from_numpy(gathered), in_pack, group)


def span_attention(query: Tensor, key: Tensor, value: Tensor, layout: SpanLayout, scale: float | None) -> Tensor:
    """Computes attention of query [S / cp, heads, head_dim] over key and value [S / cp, kv_heads, head_dim], all
    rotated; the result has the shape of query.

    Collective over ``layout.group``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _SpanAttention.apply(query, key, value, layout, scale)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: SpanLayout, scale: float) -> Tensor:
        keys, values = _gather(key, layout), _gather(value, layout)
        total = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = torch.zeros(query.shape, dtype=total, device=query.device)
        log_sums = torch.full(query.shape[:2], float("-inf"), dtype=total, device=query.device)
        for span in layout.spans:
            rows, seen = _parts(span)
            out, lse = _flash(query[rows], keys[seen], values[seen], span.causal, scale)
            merged = torch.logaddexp(log_sums[rows], lse)
            before, now = (log_sums[rows] - merged).exp_(), (lse - merged).exp_()
            output[rows] = output[rows] * before[..., None] + out * now[..., None]
            log_sums[rows] = merged
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.settings = layout, scale, total
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        query, key, value, output, log_sums = ctx.saved_tensors
        layout, scale, total = ctx.settings
        keys, values = _gather(key, layout), _gather(value, layout)
        grad_query = torch.zeros(query.shape, dtype=total, device=query.device)
        grad_keys = torch.zeros(keys.shape, dtype=total, device=query.device)
        grad_values = torch.zeros_like(grad_keys)
        for span in layout.spans:
            rows, seen = _parts(span)
            parts = _flash_backward(
                grad[rows], query[rows], keys[seen], values[seen], output[rows], log_sums[rows], span.causal, scale
            )
            grad_query[rows] += parts[0]
            grad_keys[seen] += parts[1]
            grad_values[seen] += parts[2]
        return (
            grad_query.to(query.dtype),
            _scatter_sum(grad_keys.to(key.dtype), layout),
            _scatter_sum(grad_values.to(value.dtype), layout),
            None,
            None,
        )


def _parts(span: Span) -> tuple[slice, slice]:
    return slice(span.query, span.query + span.queries), slice(span.key, span.key + span.keys)


def _gather(x: Tensor, layout: SpanLayout) -> Tensor:
    """Gathers the rows of all ranks, in the pack's order."""
    if layout.group is None:
        return x
    rows = torch.empty(layout.in_pack.numel(), *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(rows, x.contiguous(), group=layout.group)
    return rows.index_select(0, layout.in_pack)


def _scatter_sum(x: Tensor, layout: SpanLayout) -> Tensor:
    """Returns this rank's rows of the sum over ranks; the adjoint of `_gather`."""
    if layout.group is None:
        return x
    rows = torch.empty(x.shape[0] // dist.get_world_size(layout.group), *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(rows, x.index_select(0, layout.gathered), group=layout.group)
    return rows


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Returns [L, heads, ...] as [kv_heads, heads of each, L, ...]: grouped queries as a batch, keys not copied."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).movedim(0, 2)


def _expanded(x: Tensor, heads: int) -> Tensor:
    """Returns [L, kv_heads, head_dim] as [kv_heads, heads of each, L, head_dim]."""
    return x.transpose(0, 1)[:, None].expand(-1, heads // x.shape[1], -1, -1)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output in the shape of query, and [L, heads] log-sum-exps."""
    kv_heads, heads = key.shape[1], query.shape[1]
    q, k, v = _by_kv_head(query, kv_heads), _expanded(key, heads), _expanded(value, heads)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out.movedim(2, 0).reshape(query.shape), lse.movedim(2, 0).reshape(query.shape[:2])


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, from the output and log-sum-exps over all spans."""
    kv_heads, heads = key.shape[1], query.shape[1]
    q, k, v = _by_kv_head(query, kv_heads), _expanded(key, heads), _expanded(value, heads)
    g, o, s = (_by_kv_head(x, kv_heads) for x in (grad, output, lse))
    if query.device.type == "cpu":
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, s, 0.0, causal, scale=scale
        )
    else:
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is off
        parts = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, o, s.contiguous(), None, None, query.shape[0], key.shape[0], 0.0, causal, state, state[:0],
            scale=scale,
        )  # fmt: skip
    of_query, of_key, of_value = parts
    return of_query.movedim(2, 0).reshape(query.shape), of_key.sum(1).transpose(0, 1), of_value.sum(1).transpose(0, 1)
