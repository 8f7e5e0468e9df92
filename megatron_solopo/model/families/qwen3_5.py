"""Qwen3.5's text models: Gated DeltaNet in three of four layers, attention with an output gate in the others, RoPE on a
quarter of a head's channels; an MLP (``qwen3_5_text``), or experts and one more that each token has
(``qwen3_5_moe_text``)."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families import delta_net, llama
from megatron_solopo.model.families.family import Family
from megatron_solopo.model.families.operators import Entry
from megatron_solopo.model.families.phi3 import PARTIAL


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (
        *llama.table_without_attention(hf_config, padded_vocab_size),
        *delta_net.attention_entries(hf_config, fused=False),
        *llama.mlp_entries(),
    )


QWEN3_5 = Family("qwen3_5_text", _table, delta_net.check, delta_net.options, delta_net.FIELDS, PARTIAL)
