"""Which fields of config.json are supported, and what some of them mean together.

A field that no list has must be switched off in the file.

The lists hold what is read or checked, not what transformers supports: a field that a later transformers acts upon is
refused until a family reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from megatron_solopo.errors import UserError

READ = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "partial_rotary_factor",  # is in rope_parameters too, where model/rope.py checks it
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "max_window_layers",  # of which transformers makes layer_types
    }
)
"""Read or checked for every family: by model/build.py, model/rope.py, the tables and `windowed_layers`."""

HARMLESS = frozenset(
    {
        "use_cache",
        "pretraining_tp",  # the same products, summed in slices
        "attn_implementation",
        "gradient_checkpointing",
        "auto_map",
        "model_max_length",
        "max_sequence_length",
        "tokenizer_class",
        "pad_token",
        "bos_token",
        "eos_token",
        "unk_token",
        "is_llama_config",
        "unsloth_fixed",
        "transformers.js_config",
    }
)
"""Fields that do not affect a token's logits: how the model is run, saved, tokenised or named."""

HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_version")

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)

HEADS = "head_dim", "num_key_value_heads"
"""Fields that ``per_layer_config`` may give another value in layers without a window (Gemma 4)."""

LINEAR = "linear_attention"
"""The entry of ``layer_types`` for a layer with a recurrent state in the place of attention."""

LINEAR_SIZES = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
"""Fields of such a layer, behind ``linear_``."""

OFF = (None, False, 0, "", [], {})


def refuse_unknown(hf_config: PretrainedConfig, family_fields: frozenset[str]) -> None:
    """Refuses a field that is neither supported nor switched off.

    Args:
        family_fields: fields that the family reads or checks beside `READ`.

    Raises:
        UserError: a field is unknown, or the weights are quantized.
    """
    for name, value in unknown_fields(vars(hf_config), family_fields).items():
        if name == "quantization_config":
            kind = value.get("quant_method") if isinstance(value, Mapping) else None
            raise UserError(
                "model-quantized",
                f"config.json: quantization_config has quant_method {kind!r}; gpt-oss's mxfp4 and fp8 in blocks of "
                "128 x 128 are dequantised, nothing else is; use the folder of the unquantized weights",
            )
        raise UserError(
            "model-field-unknown",
            f"config.json: {name} = {value!r} is not known for {hf_config.model_type} and might change its "
            "mathematics; remove the field if it does not",
        )


def unknown_fields(values: Mapping[str, object], family_fields: frozenset[str]) -> dict[str, object]:
    """Returns the fields that are neither supported nor switched off, with their values."""
    supported = READ | HARMLESS | family_fields | GenerationConfig().to_dict().keys()
    return {
        name: value
        for name, value in values.items()
        # transformers keeps private fields on the object; the base class's fields do not affect a decoder.
        if name not in supported
        and not name.startswith("_")
        and not name.endswith(HARMLESS_ENDINGS)
        and not hasattr(PretrainedConfig, name)
        and not _is_off(value)
    }


def mathematics(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns the fields of a config that change what a layer computes but not necessarily a parameter's shape."""
    hf_config, windowed = of_layers(hf_config, False), of_layers(hf_config, True)
    names = ("model_type", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    others = ("attention_k_eq_v", "final_logit_softcapping")
    others += ("num_experts_per_tok", "norm_topk_prob", "no_rope_layers", "query_pre_attn_scalar")
    others += ("routed_scaling_factor", "n_group", "topk_group", "topk_method")
    others += ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if any(linear_layers(hf_config)):
        others += ("layer_types", *(f"linear_{name}" for name in LINEAR_SIZES))
    rope = {f"rope_parameters.{name}": value for name, value in hf_config.rope_parameters.items() if name != "type"}
    windows = {}
    if (window := attention_window(hf_config)) is not None:
        windows = {"sliding_window": window, "layer_types": windowed_layers(hf_config)}
    if windowed is not hf_config:
        windows |= {f"{name} of layers with a window": getattr(windowed, name) for name in HEADS}
    return {name: getattr(hf_config, name) for name in (*names, *others) if hasattr(hf_config, name)} | rope | windows


def check_shape(hf_config: PretrainedConfig, heads_by_layer: bool = False) -> None:
    """Refuses a decoder that cannot be built.

    Args:
        heads_by_layer: whether `HEADS` of layers without a window may be others than those of layers with one.

    Raises:
        UserError: layers differ otherwise, or a field has an invalid value.
    """
    check_sizes(hf_config, "num_hidden_layers")
    if getattr(hf_config, "is_heterogeneous", False):
        _check_layers(hf_config, HEADS if heads_by_layer else ())
    for windowed in (False, True):
        _check_shape(of_layers(hf_config, windowed))


def _check_layers(hf_config: Any, fields: tuple[str, ...]) -> None:
    """Refuses layers that differ in more than ``fields``, or among those with a window or among those without."""
    kinds, layers = windowed_layers(hf_config), list(hf_config.per_layer_config)
    differing = set(hf_config.per_layer_attributes) - {*fields}
    differing |= {"skip" for layer in layers if layer.skip}
    for name in {*fields} - differing:
        if len({(kind, getattr(layer, name)) for kind, layer in zip(kinds, layers, strict=True)}) > len({*kinds}):
            differing.add(name)
    if differing or not fields:
        raise UserError(
            "model-field-unsupported",
            f"config.json: per_layer_config is set ({', '.join(sorted(differing))}); layers that differ are not "
            "supported" + (f", but in {' and '.join(fields)} between those with a window and others" if fields else ""),
        )


def _check_shape(hf_config: PretrainedConfig) -> None:
    sizes = (name for name in SIZES if name != "intermediate_size" or hasattr(hf_config, name))
    check_sizes(hf_config, *sizes, *(("head_dim",) if getattr(hf_config, "head_dim", None) is not None else ()))
    check_number("rms_norm_eps", hf_config.rms_norm_eps)
    if hf_config.initializer_range is not None:
        check_number("initializer_range", hf_config.initializer_range, zero=True)
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % groups:
        raise UserError(
            "model-field-value",
            f"config.json: num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}",
        )


def check_sizes(hf_config: PretrainedConfig, *names: str) -> None:
    """Refuses fields that are not whole numbers of at least 1.

    Raises:
        UserError: a field has an invalid value.
    """
    for name in names:
        value = getattr(hf_config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                "model-field-value", f"config.json: {name} = {value!r} must be a whole number of at least 1"
            )


def check_number(name: str, value: object, zero: bool = False) -> None:
    """Refuses a field that is no finite number above 0, or with ``zero`` of at least 0.

    Python reads NaN and Infinity from JSON; they pass comparisons silently and make every result NaN.

    Raises:
        UserError: the field has an invalid value.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        least = "of at least 0" if zero else "above 0"
        raise UserError("model-field-value", f"config.json: {name} = {value!r} must be a finite number {least}")


def _is_off(value: object) -> bool:
    return any(type(value) is type(off) and value == off for off in (*OFF, 0.0))


def of_layers(hf_config: PretrainedConfig, windowed: bool) -> PretrainedConfig:
    """Returns the config of the layers with a window or of those without, whose `HEADS` may differ; of a kind that no
    layer is, that of the others."""
    if not getattr(hf_config, "is_heterogeneous", False):
        return hf_config
    kinds = windowed_layers(hf_config)
    return hf_config.per_layer_config[kinds.index(windowed) if windowed in kinds else 0]


def each_layer(hf_config: PretrainedConfig) -> list[PretrainedConfig]:
    """Returns the config of each layer, see `of_layers`."""
    kinds = {windowed: of_layers(hf_config, windowed) for windowed in (False, True)}
    return [kinds[windowed] for windowed in windowed_layers(hf_config)]


def keys_are_values(hf_config: PretrainedConfig, windowed: bool) -> bool:
    """Whether a layer has no matrix of values, and its values are its keys before their norm."""
    return not windowed and bool(getattr(hf_config, "attention_k_eq_v", False))


def logit_cap(hf_config: PretrainedConfig) -> float | None:
    """Returns the c of logits that are c x tanh(logit / c); None without."""
    return getattr(hf_config, "final_logit_softcapping", None)


def mlp_width(hf_config: PretrainedConfig) -> int:
    """Returns the intermediate size of the MLP; of models whose layers all have experts, which have no such field, that
    of an expert."""
    return getattr(hf_config, "intermediate_size", None) or hf_config.moe_intermediate_size


def head_dim(hf_config: PretrainedConfig) -> int:
    """Returns the size of an attention head, of queries and keys; configs without the field mean hidden_size / heads.

    With latent attention ``head_dim`` is what `rotary_dim` returns.
    """
    if has_latents(hf_config):
        return hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    return rotary_dim(hf_config)


def value_dim(hf_config: PretrainedConfig) -> int:
    """Returns the size of an attention head of values."""
    return hf_config.v_head_dim if has_latents(hf_config) else head_dim(hf_config)


def rotary_dim(hf_config: PretrainedConfig) -> int:
    """Returns the channels of a head that RoPE, or its ``partial_rotary_factor``, is of."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def has_latents(hf_config: PretrainedConfig) -> bool:
    """Whether keys and values come from a latent of each token (multi-head latent attention)."""
    return hasattr(hf_config, "kv_lora_rank")


def attention_window(hf_config: PretrainedConfig) -> int | None:
    """Returns the window of the layers that have one, in tokens: a token sees itself and the window - 1 before it.

    Raises:
        UserError: a layer's attention is neither full nor sliding, or the window is not a whole number of at least 1.
    """
    window = getattr(hf_config, "sliding_window", None)
    if not getattr(hf_config, "use_sliding_window", True):
        window = None
    if window is not None:
        check_sizes(hf_config, "sliding_window")
    kinds = getattr(hf_config, "layer_types", None)
    if kinds is None:
        return window
    supported = {"full_attention"} | ({"sliding_attention"} if window is not None else set())
    if hasattr(hf_config, "linear_num_key_heads"):
        supported.add(LINEAR)
    for kind in kinds:
        if kind not in supported:
            raise UserError(
                "model-field-unsupported",
                f"config.json: layer_types has {kind!r} with sliding_window = {window}: not supported",
            )
    return window if "sliding_attention" in kinds else None


def windowed_layers(hf_config: PretrainedConfig) -> list[bool]:
    """Returns whether each layer has a window.

    Raises:
        UserError: see `attention_window`.
    """
    layers, window = hf_config.num_hidden_layers, attention_window(hf_config)
    kinds = getattr(hf_config, "layer_types", None)
    if window is None or kinds is None:
        return [window is not None] * layers
    return [kind == "sliding_attention" for kind in kinds]


def linear_layers(hf_config: PretrainedConfig) -> list[bool]:
    """Returns whether each layer has a recurrent state in the place of attention."""
    kinds = getattr(hf_config, "layer_types", None) or [""] * hf_config.num_hidden_layers
    return [kind == LINEAR for kind in kinds]


def window_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns megatron-core's TransformerConfig fields of the windows."""
    window = attention_window(hf_config)
    if window is None:
        return {}
    return {
        "window_size": (window - 1, 0),  # tokens before and after
        "window_attn_skip_freq": [int(windowed) for windowed in windowed_layers(hf_config)],
    }
