"""Gemma 4's dense text models (``gemma4_unified``'s are the same): Gemma 3's layers with plain norms, a norm of values
and a factor on each layer's result; layers without a window have heads of their own size and number, values that are
their keys, and RoPE on a part of the channels; capped logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import refuse
from megatron_solopo.model.families.fields import check_number, keys_are_values, logit_cap, of_layers, windowed_layers
from megatron_solopo.model.families.gemma3 import GEMMA3, NORMS
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, Grouped, InterleaveQKV, Rename


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    return (
        *llama.table_without_qkv(hf_config, padded_vocab_size, NORMS),
        *(_qkv_entry(hf_config, windowed) for windowed in sorted({*windowed_layers(hf_config)})),
        *llama.head_norms(),
        *llama.mlp_entries(),
        Entry(f"{MEGATRON_LAYER}layer_scalar", (f"{HF_LAYER}layer_scalar",), Rename()),
    )


def _qkv_entry(hf_config: PretrainedConfig, windowed: bool) -> Entry:
    """Returns the entry of queries, keys and values of the layers with a window, or of those without."""
    names = llama.qkv_names(HF_LAYER, "weight")
    heads, groups, size = llama.head_sizes(of_layers(hf_config, windowed))
    operator = InterleaveQKV(heads, groups, size)
    if keys_are_values(hf_config, windowed):
        names, operator = names[:2], Grouped(groups, ((heads // groups * size,), (size,)))
    layers = tuple(number for number, kind in enumerate(windowed_layers(hf_config)) if kind is windowed)
    return Entry(f"{MEGATRON_LAYER}self_attention.linear_qkv.weight", names, operator, layers)


OTHERS = {
    "hidden_size_per_layer_input": "embeddings for each layer (E2B, E4B)",
    "num_kv_shared_layers": "layers that have another layer's keys and values",
    "enable_moe_block": "experts beside the MLP (26B-A4B)",
}
"""Fields of Gemma 4's other models, and what they have."""


def _check(hf_config: PretrainedConfig) -> None:
    for name, part in OTHERS.items():
        if value := getattr(hf_config, name, None):
            raise UserError(
                "model-field-unsupported",
                f"config.json: {name} = {value!r} is not supported for {hf_config.model_type}: {part}",
            )
    refuse(hf_config, attention_bias=False)
    if hf_config.use_bidirectional_attention != "vision":  # which is of images
        refuse(hf_config, use_bidirectional_attention=None)
    if (cap := logit_cap(hf_config)) is not None:
        check_number("final_logit_softcapping", cap)


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "softmax_scale": 1.0,
        "hetereogenous_dist_checkpoint": True,  # tensors of layers have several shapes
    }


# vocab_size_per_layer_input, use_double_wide_mlp: of what `OTHERS` refuses
FIELDS = frozenset(
    {
        *("hidden_activation", "use_bidirectional_attention", "attention_k_eq_v", "final_logit_softcapping"),
        *("per_layer_config", *OTHERS, "vocab_size_per_layer_input", "use_double_wide_mlp"),
    }
)

GEMMA4, GEMMA4_UNIFIED = (
    replace(
        GEMMA3,
        model_type=name,
        table=_table,
        check=_check,
        transformer_options=_options,
        fields=FIELDS,
        value_norms=True,
    )
    for name in ("gemma4_text", "gemma4_unified_text")
)
