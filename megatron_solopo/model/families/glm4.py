"""GLM-4 (``glm``: GLM-4-9B of 2024, ``glm4``: GLM-4-0414): RoPE on adjacent pairs of half the channels of a head,
biases on query, key and value, gate and up in one matrix, and in ``glm4`` norms on both sides of attention and MLP."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family, Norms
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, InterleaveQKV
from megatron_solopo.model.families.phi3 import PARTIAL, gate_up_entry
from megatron_solopo.model.rope import rotated_channels

NORMS = llama.NORMS | {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "post_mlp_layernorm": "post_mlp_layernorm",
}


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    norms = NORMS if hf_config.model_type == "glm4" else llama.NORMS
    qkv = InterleaveQKV(*llama.head_sizes(hf_config), paired=rotated_channels(hf_config))
    return (
        *llama.table_without_qkv(hf_config, padded_vocab_size, norms),
        *(
            Entry(f"{MEGATRON_LAYER}self_attention.linear_qkv.{kind}", llama.qkv_names(HF_LAYER, kind), qkv)
            for kind in (("weight", "bias") if hf_config.attention_bias else ("weight",))
        ),
        gate_up_entry(),
        llama.down_entry(),
    )


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"add_qkv_bias": hf_config.attention_bias}


FIELDS = frozenset({"attention_bias"})

GLM = Family("glm", _table, transformer_options=_options, fields=FIELDS, rope_fields=PARTIAL)
GLM4 = Family("glm4", _table, transformer_options=_options, fields=FIELDS, rope_fields=PARTIAL, norms=Norms.BOTH)
