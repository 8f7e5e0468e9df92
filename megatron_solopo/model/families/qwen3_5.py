"""Qwen3-Next and Qwen3.5's text models: Gated DeltaNet in three of four layers, attention with an output gate in the
others, RoPE on a quarter of a head's channels; an MLP (``qwen3_5_text``), or experts and one more for every token."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import delta_net, llama, moe
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.fields import check_sizes
from megatron_solopo.model.families.operators import Entry
from megatron_solopo.model.families.phi3 import PARTIAL


def _without_mlp(hf_config: PretrainedConfig, padded_vocab_size: int, fused: bool) -> tuple[Entry, ...]:
    return (
        *llama.table_without_attention(hf_config, padded_vocab_size),
        *delta_net.attention_entries(hf_config, fused),
    )


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (*_without_mlp(hf_config, padded_vocab_size, fused=False), *llama.mlp_entries())


def _table_with_experts(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (
        *_without_mlp(hf_config, padded_vocab_size, fused=hf_config.model_type == "qwen3_next"),
        *moe.expert_entries("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *moe.shared_expert_entries("mlp"),
    )


def _renormalized(hf_config: PretrainedConfig) -> bool:
    return getattr(hf_config, "norm_topk_prob", True)  # Qwen3.5 always does


def _check_with_experts(hf_config: PretrainedConfig) -> None:
    delta_net.check(hf_config)
    refuse(hf_config, decoder_sparse_step=1, mlp_only_layers=[])  # layers without experts
    check_sizes(hf_config, "moe_intermediate_size", "shared_expert_intermediate_size")
    moe.check_experts(hf_config, _renormalized(hf_config))


def _options_with_experts(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts = moe.expert_options(hf_config, hf_config.moe_intermediate_size, _renormalized(hf_config))
    shared = hf_config.shared_expert_intermediate_size
    shared_expert = {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": True}
    return delta_net.options(hf_config) | experts | shared_expert


EXPERT_FIELDS = (
    delta_net.FIELDS
    | moe.FIELDS
    | {"moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}
)


def _family(model_type: str, with_experts: bool) -> Family:
    return Family(
        model_type,
        _table_with_experts if with_experts else _table,
        _check_with_experts if with_experts else delta_net.check,
        _options_with_experts if with_experts else delta_net.options,
        EXPERT_FIELDS if with_experts else delta_net.FIELDS,
        PARTIAL,
        carried=lambda hf_config: delta_net.CARRIED,
    )


QWEN3_5 = _family("qwen3_5_text", with_experts=False)
QWEN3_5_MOE = _family("qwen3_5_moe_text", with_experts=True)
QWEN3_NEXT = _family("qwen3_next", with_experts=True)
