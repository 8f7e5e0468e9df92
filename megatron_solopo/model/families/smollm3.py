"""SmolLM3: Llama's layout; every fourth layer has no RoPE."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family, refuse


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=False, mlp_bias=False)
    layers, has_rope = hf_config.num_hidden_layers, hf_config.no_rope_layers
    if len(has_rope) < layers or not {*has_rope} <= {0, 1}:
        raise UserError(
            "model-field-value", f"config.json: no_rope_layers = {has_rope} must be 0 or 1 for each of {layers} layers"
        )


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    # config.json has 1 for a layer with RoPE, megatron-core for one without
    return {"no_rope_freq": [1 - has_rope for has_rope in hf_config.no_rope_layers[: hf_config.num_hidden_layers]]}


FIELDS = frozenset({"no_rope_layers", "no_rope_layer_interval"})

SMOLLM3 = Family("smollm3", llama.table, _check, _options, FIELDS)
