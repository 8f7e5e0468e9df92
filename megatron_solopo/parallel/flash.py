"""torch's flash kernel over packed sequences: one call on CUDA, one for each sequence on the CPU.

Functions take the layout of the sequences (`sequences.SequenceLayout`). Where a sequence has more keys than queries,
the queries are its last positions (bottom right).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

if TYPE_CHECKING:
    from megatron_solopo.parallel.sequences import SequenceLayout

FA3 = "flash_attn_interface"
"""The module of FlashAttention 3's wheel."""


def use_fastest() -> str | None:
    """Makes torch's flash kernel FlashAttention 3's where its wheel is installed and the device is Hopper.

    `torch.nn.attention.restore_flash_attention_impl` undoes it.

    Returns:
        Why the installed wheel cannot be used, or None.
    """
    if find_spec(FA3) is None or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # a library is missing, or of another build
        return f"FlashAttention 3 is installed, but its import fails: {type(error).__name__}: {error}"
    return None


def forward(query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output in the shape of query, [Q, heads, head_dim], and [heads, Q] log-sum-exps in float32 or
    float64; keys and values are [K, kv_heads, head_dim] of all sequences."""
    if query.device.type == "cpu":
        outputs, log_sums = [], []
        for q, k, v, mask in _each(layout, keys, values, query):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _by_kv_head(q, k), *_expanded(q, k, v), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            outputs.append(out.movedim(2, 0).reshape(q.shape))
            log_sums.append(lse.flatten(0, 1))
        return torch.cat(outputs), torch.cat(log_sums, dim=1)
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv,
        0.0, True, False, scale=scale,
    )[:2]  # fmt: skip


def backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    log_sums: Tensor,
    layout: SequenceLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, keys and values, from that of the output; see `forward`."""
    if query.device.type == "cpu":
        parts: list[list[Tensor]] = [[], [], []]
        sums = log_sums.split(layout.query_lengths, dim=1)
        each = _each(layout, keys, values, query, grad, output)
        for (q, k, v, mask, g, o), lse in zip(each, sums, strict=True):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _by_kv_head(g, k), _by_kv_head(q, k), *_expanded(q, k, v), _by_kv_head(o, k),
                lse.unflatten(0, (k.shape[1], -1)), 0.0, mask is None, attn_mask=mask, scale=scale,
            )  # fmt: skip
            parts[0].append(grads[0].movedim(2, 0).reshape(q.shape))
            for part, of_heads in zip(parts[1:], grads[1:], strict=True):
                part.append(of_heads.sum(1).transpose(0, 1))
        of_query, of_keys, of_values = map(torch.cat, parts)
        return of_query, of_keys, of_values
    dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # state of its generator: there is none
    return torch.ops.aten._flash_attention_backward(
        grad, query, keys, values, output, log_sums, layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q,
        layout.max_seqlen_kv, 0.0, True, dropout, dropout[:0], scale=scale,
    )  # fmt: skip


def _each(layout: SequenceLayout, keys: Tensor, values: Tensor, query: Tensor, *more: Tensor) -> Iterator[tuple]:
    """Yields query, key, value, mask, and the rows of ``more``, of each sequence; a mask of None is causal."""
    of_queries = zip(*(x.split(layout.query_lengths) for x in (query, *more)), strict=True)
    of_keys = (x.split(layout.key_lengths) for x in (keys, values))
    for (q, *rest), k, v in zip(of_queries, *of_keys, strict=True):
        queries, seen = len(q), len(k)
        hidden = None if queries == seen else q.new_full((queries, seen), float("-inf")).triu(seen - queries + 1)
        yield (q, k, v, hidden, *rest)


def _by_kv_head(x: Tensor, key: Tensor) -> Tensor:
    """Returns [L, heads, head_dim] as [kv_heads, heads of each, L, head_dim]: grouped queries as a batch."""
    return x.unflatten(1, (key.shape[1], -1)).movedim(0, 2)


def _expanded(query: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """Yields [L, kv_heads, head_dim] tensors as [kv_heads, heads of each, L, head_dim], without a copy."""
    for x in tensors:
        yield x.transpose(0, 1)[:, None].expand(-1, query.shape[1] // x.shape[1], -1, -1)
