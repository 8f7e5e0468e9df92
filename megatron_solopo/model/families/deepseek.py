"""DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash (``glm4_moe_lite``): multi-head latent attention; experts of a token from
the best groups, experts of every token, and first layers without experts. Layers of multi-token prediction are carried
through."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.fields import check_sizes
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, Rename
from megatron_solopo.model.rope import rope_of

GREEDY, BY_GROUP = "greedy", "group_limited_greedy"
"""Values of DeepSeek-V2's topk_method: a token's experts are the best of all, or of the best groups."""

LATENTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    ours, theirs = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    names = {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    if hf_config.q_lora_rank is None:
        names |= {"linear_q_proj": "q_proj"}
    else:
        names |= {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm", "linear_q_up_proj": "q_b_proj"}
    attention = (Entry(f"{ours}{a}.weight", (f"{theirs}{b}.weight",), Rename()) for a, b in names.items())
    return (
        *llama.table_without_attention(hf_config, padded_vocab_size),
        *attention,
        *moe.entries_behind_first_layers(hf_config),
    )


def _table_with_bias(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (*_table(hf_config, padded_vocab_size), moe.router_bias_entry(hf_config))


def _check(hf_config: PretrainedConfig) -> None:
    check_sizes(hf_config, *LATENTS, *(() if hf_config.q_lora_rank is None else ("q_lora_rank",)))
    rotated, heads = hf_config.qk_rope_head_dim, hf_config.num_attention_heads
    if rotated % 2:
        raise UserError("model-field-value", f"config.json: qk_rope_head_dim = {rotated} must be even for RoPE")
    refuse(hf_config, attention_bias=False, mlp_bias=False, moe_layer_freq=1, rope_interleave=True)
    # what transformers makes of other fields
    refuse(hf_config, num_key_value_heads=heads, head_dim=rotated, qk_head_dim=rotated + hf_config.qk_nope_head_dim)
    moe.check_behind_first_layers(hf_config)


def _check_softmax(hf_config: PretrainedConfig) -> None:
    _check(hf_config)
    refuse(hf_config, scoring_func="softmax", norm_topk_prob=False)  # transformers reads neither
    if hf_config.topk_method != GREEDY:
        refuse(hf_config, topk_method=BY_GROUP)
        moe.check_groups(hf_config, compared=1)


def _check_sigmoid(hf_config: PretrainedConfig) -> None:
    _check(hf_config)
    refuse(hf_config, scoring_func="sigmoid", topk_method="noaux_tc")
    moe.check_groups(hf_config)


def _latents(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns the fields of megatron-core's `MLATransformerConfig`, of which YaRN's are for its scale of the scores."""
    rope = rope_of(hf_config)
    return {
        "multi_latent_attention": True,
        "q_lora_rank": hf_config.q_lora_rank,
        "kv_lora_rank": hf_config.kv_lora_rank,
        "qk_head_dim": hf_config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf_config.qk_rope_head_dim,
        "v_head_dim": hf_config.v_head_dim,
        "rope_type": "rope",  # with yarn megatron-core tabulates the cosines of all positions, in every layer
        "rotary_scaling_factor": rope.get("factor") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def _softmax_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    options = _latents(hf_config) | moe.options_behind_first_layers(hf_config, renormalize=False)
    if hf_config.topk_method == BY_GROUP:
        options |= {"moe_router_num_groups": hf_config.n_group, "moe_router_group_topk": hf_config.topk_group}
    return options


def _sigmoid_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return _latents(hf_config) | moe.sigmoid_options(hf_config)


FIELDS = moe.BEHIND_FIRST_LAYERS | {
    *(*LATENTS, "q_lora_rank", "qk_head_dim", "rope_interleave", "attention_bias", "mlp_bias", "mlp_layer_types"),
    *("moe_layer_freq", "topk_method", "scoring_func"),
    *("aux_loss_alpha", "seq_aux", "ep_size"),  # not read: options of training
}


def _family(model_type: str, softmax: bool = False) -> Family:
    return Family(
        model_type,
        _table if softmax else _table_with_bias,
        _check_softmax if softmax else _check_sigmoid,
        _softmax_options if softmax else _sigmoid_options,
        FIELDS,
        carried=moe.carried_layers,
    )


DEEPSEEK_V2 = _family("deepseek_v2", softmax=True)
DEEPSEEK_V3 = _family("deepseek_v3")
GLM4_MOE_LITE = _family("glm4_moe_lite")
