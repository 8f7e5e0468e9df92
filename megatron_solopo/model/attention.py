"""The core attention of a layer over a pack: RoPE by explicit positions, then the attention of the pack's layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_solopo.model import transformer_engine
from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.parallel.kernels import Kernels, kernels_for
from megatron_solopo.parallel.layout import RankLayout


@dataclass
class PackLayout(PackedSeqParams):
    """The layout of a pack as every layer reads it; passed through megatron-core as its packed sequence parameters.

    Attributes:
        attention: layout of the rows that this rank computes.
        cos, sin: [S / cp, 1, head_dim] of each token's position.
    """

    attention: RankLayout = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)


def pack_layout(
    attention: RankLayout, positions: Tensor, frequencies: RotaryFrequencies, dtype: torch.dtype
) -> PackLayout:
    """Makes the layout of a pack's rows, [S / cp] ``positions``, on their device."""
    cos, sin = frequencies(positions, dtype)
    return PackLayout(qkv_format="thd", attention=attention, cos=cos, sin=sin)


def attention_kernels(settings: TransformerConfig, device: torch.device) -> Kernels:
    """Returns the kernels of a model's attention without context parallelism."""
    engine, sixteen_bits = settings.transformer_impl == transformer_engine.NAME, settings.params_dtype.itemsize == 2
    return kernels_for(engine, device.type == "cuda", sixteen_bits, settings.attention_backend.name)


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackLayout,
    ) -> Tensor:
        """query [S, heads, head_dim], key and value [S, kv_heads, head_dim] before RoPE -> [S, heads x head_dim]."""
        layout = packed_seq_params
        query, key = rotate(query, layout.cos, layout.sin), rotate(key, layout.cos, layout.sin)
        return layout.attention.attend(query, key, value, self.softmax_scale).flatten(1)
