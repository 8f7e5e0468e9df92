"""Mixtral: Llama's layout with experts; the weights of a token's experts sum to 1."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.operators import Entry


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (
        *llama.table_without_mlp(hf_config, padded_vocab_size),
        *moe.expert_entries("block_sparse_moe", gate="w1", up="w3", down="w2"),
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, router_jitter_noise=0.0)
    moe.check_experts(hf_config, renormalize=True)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return moe.expert_options(hf_config, hf_config.intermediate_size, renormalize=True)


MIXTRAL = Family("mixtral", _table, _check, _options, moe.FIELDS)
