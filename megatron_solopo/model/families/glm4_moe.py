"""GLM-4.5, 4.6 and their Air: experts behind a sigmoid router with a bias, one expert for every token, and first layers
without experts; RoPE on half the channels of a head. Layers of multi-token prediction are carried through."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama, moe
from megatron_solopo.model.families.family import Family
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, InterleaveQKV
from megatron_solopo.model.families.phi3 import PARTIAL


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    qkv = InterleaveQKV(*llama.head_sizes(hf_config))
    return (
        *llama.table_without_qkv(hf_config, padded_vocab_size),
        *(
            Entry(f"{MEGATRON_LAYER}self_attention.linear_qkv.{kind}", llama.qkv_names(HF_LAYER, kind), qkv)
            for kind in (("weight", "bias") if hf_config.attention_bias else ("weight",))
        ),
        *(llama.head_norms() if hf_config.use_qk_norm else ()),
        *moe.entries_behind_first_layers(hf_config),
        moe.router_bias_entry(hf_config),
    )


def _check(hf_config: PretrainedConfig) -> None:
    moe.check_behind_first_layers(hf_config)
    moe.check_groups(hf_config)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    attention = {"qk_layernorm": hf_config.use_qk_norm, "add_qkv_bias": hf_config.attention_bias}
    return moe.sigmoid_options(hf_config) | attention


FIELDS = moe.BEHIND_FIRST_LAYERS | {"attention_bias", "use_qk_norm"}

GLM4_MOE = Family("glm4_moe", _table, _check, _options, FIELDS, rope_fields=PARTIAL, carried=moe.carried_layers)
