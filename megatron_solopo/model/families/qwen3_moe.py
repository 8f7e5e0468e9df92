"""Qwen3-MoE: Llama's layout with experts, and a norm over each head of queries and keys."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.fields import check_sizes
from megatron_solopo.model.families.operators import Entry


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (
        *llama.table_without_mlp(hf_config, padded_vocab_size),
        *llama.head_norms(),
        *moe.expert_entries("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(
        hf_config,
        attention_bias=False,
        # Layers without experts, which no released model of the family has.
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    check_sizes(hf_config, "moe_intermediate_size")
    moe.check_experts(hf_config, hf_config.norm_topk_prob)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts = moe.expert_options(hf_config, hf_config.moe_intermediate_size, hf_config.norm_topk_prob)
    return experts | {"qk_layernorm": True}


FIELDS = moe.FIELDS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}

QWEN3_MOE = Family("qwen3_moe", _table, _check, _options, FIELDS)
