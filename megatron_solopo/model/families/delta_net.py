"""Common parts of the families whose layers are Gated DeltaNet but for every fourth, which has gated attention."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import refuse
from megatron_solopo.model.families.fields import LINEAR_SIZES, check_sizes, linear_layers
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, GatedQKV, Grouped, Rename

CARRIED = ("mtp.",)
"""How names begin of layers of multi-token prediction, which are beside the model."""

FIELDS = frozenset(
    {
        *(f"linear_{name}" for name in LINEAR_SIZES),
        "full_attention_interval",  # of which transformers makes layer_types
        "attn_output_gate",
        *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),  # of `CARRIED`
        "mamba_ssm_dtype",  # of A_log and the state: float32 here for every dtype of the model
    }
)
"""Fields of config.json that these families read or check."""


def attention_entries(hf_config: PretrainedConfig, fused: bool) -> tuple[Entry, ...]:
    """Returns the entries of the layers' attention, of both kinds.

    Args:
        fused: Hugging Face holds query, key, values and gates of a key head in one matrix, beta and alpha in another.
    """
    ours, theirs = MEGATRON_LAYER + "self_attention.", HF_LAYER + "linear_attn."
    linear = linear_layers(hf_config)
    recurrent = frozenset(number for number, is_linear in enumerate(linear) if is_linear)
    full = frozenset(range(len(linear))) - recurrent
    keys, repeats = hf_config.linear_num_key_heads, hf_config.linear_num_value_heads // hf_config.linear_num_key_heads
    width, values = hf_config.linear_key_head_dim, repeats * hf_config.linear_value_head_dim
    channels = (width, width, values)
    names = ("in_proj_qkvz", "in_proj_ba") if fused else ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    sections = ((sum(channels) + values,), (2 * repeats,)) if fused else (channels, (values,), (repeats,), (repeats,))
    renamed = {
        "dt_bias": "dt_bias",
        "A_log": "A_log",
        "norm_weight": "norm.weight",
        "out_proj.weight": "out_proj.weight",
    }
    qkv = GatedQKV(*llama.head_sizes(hf_config))
    of_full = (
        Entry(f"{ours}linear_qkv.weight", llama.qkv_names(HF_LAYER, "weight"), qkv),
        Entry(f"{ours}linear_proj.weight", (f"{HF_LAYER}self_attn.o_proj.weight",), Rename()),
        *llama.head_norms(),
    )
    of_recurrent = (
        Entry(f"{ours}in_proj.weight", tuple(f"{theirs}{name}.weight" for name in names), Grouped(keys, sections)),
        Entry(f"{ours}conv_weight", (f"{theirs}conv1d.weight",), Grouped(keys, (channels,))),
        *(Entry(ours + here, (theirs + there,), Rename()) for here, there in renamed.items()),
    )
    entries = [(entry, full) for entry in of_full] + [(entry, recurrent) for entry in of_recurrent]
    return tuple(Entry(entry.megatron, entry.hf, entry.operator, layers) for entry, layers in entries)


def check(hf_config: PretrainedConfig) -> None:
    """Refuses fields that these families do not support.

    Raises:
        UserError: a field has an invalid or unsupported value.
    """
    refuse(hf_config, attention_bias=False, attn_output_gate=True, mamba_ssm_dtype="float32")
    check_sizes(hf_config, *(f"linear_{name}" for name in LINEAR_SIZES))
    keys, values = hf_config.linear_num_key_heads, hf_config.linear_num_value_heads
    if values % keys:
        raise UserError(
            "model-field-value",
            f"config.json: linear_num_value_heads = {values} is no multiple of linear_num_key_heads = {keys}",
        )


def options(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns the TransformerConfig fields of both kinds of layers."""
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(linear) for linear in linear_layers(hf_config)],
        **{f"linear_{name}": getattr(hf_config, f"linear_{name}") for name in LINEAR_SIZES},
    }
