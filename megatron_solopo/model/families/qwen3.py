"""Qwen3: Llama's layout, and a norm over each head of queries and keys."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.operators import Entry


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (*llama.table(hf_config, padded_vocab_size), *llama.head_norms())


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=False)


QWEN3 = Family("qwen3", _table, _check, lambda hf_config: {"qk_layernorm": True})
