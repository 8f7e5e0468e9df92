"""The core attention of a layer over a pack: RoPE by explicit positions, then the attention of the pack's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.parallel.layout import RankLayout


@dataclass
class PackLayout(PackedSeqParams):
    """What every layer needs to know of a pack; travels through megatron-core as its packed sequence parameters.

    Attributes:
        attention: of the rows that this rank computes.
        cos, sin: [S / cp, 1, head_dim] of each token's position.
    """

    attention: RankLayout = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)


def pack_layout(
    attention: RankLayout, positions: Tensor, frequencies: RotaryFrequencies, dtype: torch.dtype
) -> PackLayout:
    """The layout of a pack's rows, [S / cp] ``positions``, on their device."""
    cos, sin = frequencies(positions, dtype)
    return PackLayout(qkv_format="thd", attention=attention, cos=cos, sin=sin)


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackLayout,
    ) -> Tensor:
        """query [S, heads, head_dim], key and value [S, kv_heads, head_dim] before RoPE -> [S, heads x head_dim]."""
        layout = packed_seq_params
        query, key = rotate(query, layout.cos, layout.sin), rotate(key, layout.cos, layout.sin)
        return layout.attention.attend(query, key, value, self.softmax_scale).flatten(1)
