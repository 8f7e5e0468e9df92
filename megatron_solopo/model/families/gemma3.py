"""Gemma 3's text models: windows on five of six layers, which have another RoPE base; norms around zero on both sides
of attention and MLP and over each head of queries and keys; scaled embeddings, GeGLU."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family, Norms, refuse
from megatron_solopo.model.families.fields import check_number
from megatron_solopo.model.families.operators import Entry

NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (*llama.table(hf_config, padded_vocab_size, NORMS), *llama.head_norms())


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=False, use_bidirectional_attention=False)
    check_number("query_pre_attn_scalar", hf_config.query_pre_attn_scalar)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": hf_config.query_pre_attn_scalar**-0.5,
    }


# sliding_window_pattern: transformers makes layer_types of it
FIELDS = frozenset({"hidden_activation", "query_pre_attn_scalar", "sliding_window_pattern"})

GEMMA3 = Family(
    "gemma3_text",
    _table,
    _check,
    _options,
    FIELDS,
    activation="gelu_pytorch_tanh",
    norms=Norms.BOTH,
    embedding_scale=lambda hf_config: hf_config.hidden_size**0.5,
)
