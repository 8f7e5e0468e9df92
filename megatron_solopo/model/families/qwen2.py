"""Qwen2 and Qwen2.5: Llama's layout with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import Family, head_dim, llama, refuse
from megatron_solopo.model.families.operators import Entry, InterleaveQKV


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    qkv = InterleaveQKV(hf_config.num_attention_heads, hf_config.num_key_value_heads, head_dim(hf_config))
    bias = Entry(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias", llama.qkv_names("model.layers.{layer}.", "bias"), qkv
    )
    return (*llama.table(hf_config, padded_vocab_size), bias)


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, hidden_act="silu", use_sliding_window=False, attention_dropout=0.0)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"add_qkv_bias": True}


QWEN2 = Family("qwen2", _check, _options, _table)
