"""Qwen3-MoE: Llama's layout with experts, and a norm over each head of queries and keys."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import Family, llama, moe, refuse
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, Rename


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    head_norms = (
        Entry(
            f"{MEGATRON_LAYER}self_attention.{x}_layernorm.weight", (f"{HF_LAYER}self_attn.{x}_norm.weight",), Rename()
        )
        for x in "qk"
    )
    return (
        *llama.table_without_mlp(hf_config, padded_vocab_size),
        *head_norms,
        *moe.expert_entries("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(
        hf_config,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        use_sliding_window=False,
        # Layers without experts, which no released model of the family has.
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    moe.check_experts(hf_config, hf_config.norm_topk_prob)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts = moe.expert_options(hf_config, hf_config.moe_intermediate_size, hf_config.norm_topk_prob)
    return experts | {"qk_layernorm": True}


QWEN3_MOE = Family("qwen3_moe", _check, _options, _table)
