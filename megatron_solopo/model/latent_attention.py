"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a pack, for layer specs.

Keys and values of a token come from one latent, and a key's rotated channels, which all heads share, from the token
itself; queries may have a latent too. The attention is that of all models (`attention.PackedAttention`), so what
responses share of their prompt is its latent, and the keys and values that are made of it once.

megatron-core's `MLASelfAttention` rotates by positions that begin anew in every sequence, and cuts the first matrices,
though each rank needs all of their outputs (multi_latent_attention.py:736, version 0.19.2); a rank's gradient of the
shared channels would be that of its own heads. Here each rank has these matrices whole, as in its layers of Transformer
Engine.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_solopo.model.attention import PackedAttention, PackLayout
from megatron_solopo.model.norm import RMSNorm
from megatron_solopo.model.repeated import ColumnParallel, Replicated

EPSILON = 1e-6
"""Of the norms of latents in transformers, whatever ``rms_norm_eps`` is (deepseek_v3/modeling_deepseek_v3.py, 5.17)."""


class LatentAttention(MultiLatentAttention):
    """A layer's attention; parameters have megatron-core's names and arguments are its own.

    The parts of ``submodules`` that it uses are core_attention, which gets values as wide as keys
    (`_prepare_mla_core_attention_value`), and linear_proj.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, layer_number: int, **settings: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, attention_type="self", **settings)
        del self.rotary_pos_emb
        cast(PackedAttention, self.core_attention).rotates = False
        heads, width = config.num_attention_heads, config.hidden_size
        matrix: dict[str, Any] = dict(config=config, init_method=config.init_method, tp_group=self.tp_group)
        matrix |= dict(gather_output=False, bias=False, skip_bias_add=False, is_expert=False)
        rank = cast(int | None, config.q_lora_rank)
        if rank is None:
            self.linear_q_proj = ColumnParallel(width, heads * self.q_head_dim, **matrix)
        else:
            self.linear_q_down_proj = Replicated(config, width, rank, self.tp_group)
            self.q_layernorm = RMSNorm(config, rank, EPSILON)
            self.linear_q_up_proj = ColumnParallel(rank, heads * self.q_head_dim, **matrix)
        latents = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = Replicated(config, width, latents, self.tp_group)
        self.kv_layernorm = RMSNorm(config, config.kv_lora_rank, EPSILON)
        expanded = heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = ColumnParallel(config.kv_lora_rank, expanded, **matrix)

    def get_query_key_value_tensors(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called with a layout)
        self,
        hidden_states: Tensor,
        key_value_states: None,
        position_ids: None,
        packed_seq_params: PackLayout,
        **ignored: object,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Computes rotated queries and keys, and values.

        Args:
            hidden_states: [S / cp, 1, hidden], of sequence parallelism this rank's part.

        Returns:
            [S / cp, heads, dk], [S / cp, heads, dk], [S / cp, heads, dv] of this rank's heads; megatron-core's latents
            are for attention that selects keys.
        """
        config, layout = self.config, packed_seq_params
        if config.q_lora_rank is None:
            query = self.linear_q_proj(hidden_states)[0]
        else:
            query = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))[0]
        widths = (config.kv_lora_rank, config.qk_pos_emb_head_dim)
        latent, shared = self.linear_kv_down_proj(hidden_states).split(widths, -1)
        expanded = self.linear_kv_up_proj(self.kv_layernorm(latent))[0]
        # Each rank has other heads, and its gradient of what they share is a part of the sum. Models have experts, so
        # there is no tensor parallelism without sequence parallelism (`topology.check_layout`).
        shared = gather_from_sequence_parallel_region(shared, group=self.tp_group)
        heads = self.num_attention_heads_per_partition
        query, expanded = (x[:, 0].unflatten(-1, (heads, -1)) for x in (query, expanded))
        query, turned = query.split((config.qk_head_dim, config.qk_pos_emb_head_dim), -1)
        key, value = expanded.split((config.qk_head_dim, config.v_head_dim), -1)
        turned, shared = layout.rotate(_in_halves(turned)), layout.rotate(_in_halves(shared))
        return torch.cat((query, turned), -1), torch.cat((key, shared.expand(-1, heads, -1)), -1), value, None, None


def _in_halves(x: Tensor) -> Tensor:
    """Orders channels [..., R] whose adjacent pairs RoPE turns, as DeepSeek has them, as halves whose channels are
    pairs; scores are the same, since queries and keys are ordered alike."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)
