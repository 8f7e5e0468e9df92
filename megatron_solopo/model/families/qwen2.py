"""Qwen2 and Qwen2.5: Llama's layout with biases on query, key and value."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family
from megatron_solopo.model.families.operators import Entry, InterleaveQKV


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    qkv = InterleaveQKV(*llama.head_sizes(hf_config))
    bias = Entry(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias", llama.qkv_names("model.layers.{layer}.", "bias"), qkv
    )
    return (*llama.table(hf_config, padded_vocab_size), bias)


QWEN2 = Family("qwen2", _table, transformer_options=lambda hf_config: {"add_qkv_bias": True})
