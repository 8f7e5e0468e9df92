"""torch's flash kernel over packed sequences on CUDA, in one call.

Functions take the layout of the sequences (`sequences.SequenceLayout`). Where a sequence has more keys than queries,
the queries are its last positions (bottom right). A window counts the keys before a query's own.
"""

from __future__ import annotations

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
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv,
        0.0, True, False, scale=scale, **_window(layout),
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
    dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # state of its generator: there is none
    return torch.ops.aten._flash_attention_backward(
        grad, query, keys, values, output, log_sums, layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q,
        layout.max_seqlen_kv, 0.0, True, dropout, dropout[:0], scale=scale, **_window(layout),
    )  # fmt: skip


def _window(layout: SequenceLayout) -> dict[str, int]:
    return {} if layout.window is None else {"window_size_left": layout.window - 1, "window_size_right": 0}
