"""gpt-oss: attention sinks, windows on every second layer, biases on all matrices but the vocabulary's, and experts of
a clamped activation, which Hugging Face holds in one tensor a layer with gate and up in alternating columns."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import AlternatingGateUp, Entry, InterleaveQKV, Rename, Transpose

LIMIT = 7.0
"""Of gate and up; transformers does not read it from config.json."""


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    attention, mlp = MEGATRON_LAYER + "self_attention.", MEGATRON_LAYER + "mlp."
    experts, hf_experts = mlp + "experts.local_experts.{expert}.", HF_LAYER + "mlp.experts."
    qkv = InterleaveQKV(*llama.head_sizes(hf_config))
    return (
        *llama.table_without_mlp(hf_config, padded_vocab_size),
        Entry(attention + "linear_qkv.bias", llama.qkv_names(HF_LAYER, "bias"), qkv),
        Entry(attention + "linear_proj.bias", (HF_LAYER + "self_attn.o_proj.bias",), Rename()),
        Entry(attention + "core_attention.softmax_offset", (HF_LAYER + "self_attn.sinks",), Rename()),
        Entry(mlp + "router.weight", (HF_LAYER + "mlp.router.weight",), Rename()),
        Entry(mlp + "router.bias", (HF_LAYER + "mlp.router.bias",), Rename()),
        Entry(experts + "linear_fc1.weight", (hf_experts + "gate_up_proj[{expert}]",), AlternatingGateUp()),
        Entry(experts + "linear_fc1.bias", (hf_experts + "gate_up_proj_bias[{expert}]",), AlternatingGateUp()),
        Entry(experts + "linear_fc2.weight", (hf_experts + "down_proj[{expert}]",), Transpose()),
        Entry(experts + "linear_fc2.bias", (hf_experts + "down_proj_bias[{expert}]",), Rename()),
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=True, swiglu_limit=LIMIT, experts_per_token=hf_config.num_experts_per_tok)
    moe.check_experts(hf_config, renormalize=True)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return moe.expert_options(hf_config, hf_config.intermediate_size, renormalize=True) | {
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "activation_func_clamp_value": LIMIT,
        "glu_linear_offset": 1.0,
    }


# initial_context_length: what RoPE's original_max_position_embeddings says
FIELDS = moe.FIELDS | {"attention_bias", "swiglu_limit", "experts_per_token", "initial_context_length"}

GPT_OSS = Family("gpt_oss", _table, _check, _options, FIELDS)
