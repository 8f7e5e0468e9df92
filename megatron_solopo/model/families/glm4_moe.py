"""GLM-4.5, 4.6 and their Air: experts behind a sigmoid router with a bias, one expert for every token, and first layers
without experts; RoPE on half the channels of a head. Layers of multi-token prediction are carried through."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family
from megatron_solopo.model.families.fields import check_number, check_sizes
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, InterleaveQKV
from megatron_solopo.model.families.phi3 import PARTIAL


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    first = hf_config.first_k_dense_replace
    qkv, with_experts = InterleaveQKV(*llama.head_sizes(hf_config)), range(first, hf_config.num_hidden_layers)
    return (
        *llama.table_without_qkv(hf_config, padded_vocab_size),
        *(
            Entry(f"{MEGATRON_LAYER}self_attention.linear_qkv.{kind}", llama.qkv_names(HF_LAYER, kind), qkv)
            for kind in (("weight", "bias") if hf_config.attention_bias else ("weight",))
        ),
        *(llama.head_norms() if hf_config.use_qk_norm else ()),
        *llama.mlp_entries(layers=range(first)),
        *moe.expert_entries("mlp", gate="gate_proj", up="up_proj", down="down_proj", layers=with_experts),
        moe.router_bias_entry("mlp", with_experts),
        *llama.mlp_entries("mlp.shared_experts", with_experts),
    )


def _check(hf_config: PretrainedConfig) -> None:
    check_sizes(hf_config, "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group")
    check_number("routed_scaling_factor", hf_config.routed_scaling_factor)
    moe.check_experts(hf_config, renormalize=False)
    moe.check_groups(hf_config)
    moe.check_first_layers(hf_config)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts = moe.expert_options(hf_config, hf_config.moe_intermediate_size, hf_config.norm_topk_prob)
    first = hf_config.first_k_dense_replace
    return experts | {
        "moe_layer_freq": [int(layer >= first) for layer in range(hf_config.num_hidden_layers)],
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
        "moe_router_num_groups": hf_config.n_group,
        "moe_router_group_topk": hf_config.topk_group,
        "moe_shared_expert_intermediate_size": hf_config.moe_intermediate_size * hf_config.n_shared_experts,
        "qk_layernorm": hf_config.use_qk_norm,
        "add_qkv_bias": hf_config.attention_bias,
    }


def _carried(hf_config: PretrainedConfig) -> tuple[str, ...]:
    first = hf_config.num_hidden_layers
    return tuple(f"model.layers.{first + number}." for number in range(hf_config.num_nextn_predict_layers or 0))


FIELDS = moe.FIELDS | {
    *("attention_bias", "use_qk_norm", "moe_intermediate_size", "norm_topk_prob", "first_k_dense_replace"),
    *("n_routed_experts", "n_shared_experts", "routed_scaling_factor", "n_group", "topk_group"),
    *("num_nextn_predict_layers", "num_mtp_layers"),
}

GLM4_MOE = Family("glm4_moe", _table, _check, _options, FIELDS, rope_fields=PARTIAL, carried=_carried)
