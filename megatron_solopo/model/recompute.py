"""What backward recomputes: the options as megatron-core's settings, and checks of the parts of a model.

This module does not import megatron-core: checks come before the start of the platform.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.config import ModelConfig
from megatron_solopo.config_checks import recomputed_modules
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.family import Norms
from megatron_solopo.model.families.registry import family_of

OF_LAYERS = {"mlp": "moe", "mlp_act": "moe_act"}
"""Part of a layer with an MLP -> that of a layer with experts."""


def megatron_settings(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of megatron-core's `TransformerConfig`, which refuses a method with selective recomputation
    and the modules that it does not compute itself: mlp_act, and moe_act of portable layers."""
    granularity, modules = model.recompute_granularity, recomputed_modules(model)
    ours = {"mlp_act"} if model.transformer_impl == "transformer_engine" else {"mlp_act", "moe_act"}
    full = granularity == "full"
    return {
        "recompute_granularity": granularity,
        "recompute_method": model.recompute_method if full else None,
        "recompute_num_layers": model.recompute_num_layers if full else None,
        "recompute_modules": [part for part in modules if part not in ours] if granularity == "selective" else None,
    }


def check_modules(hf_config: PretrainedConfig, model: ModelConfig) -> None:
    """Refuses a part of --recompute-modules that the layers of a model do not have.

    Raises:
        UserError: the layers have experts and no MLP, or the reverse, or no norm of their own.
    """
    family = family_of(hf_config)
    has_experts = bool(family.transformer_options(hf_config).get("num_moe_experts"))
    for part in recomputed_modules(model):
        wrong = part in (OF_LAYERS if has_experts else OF_LAYERS.values())
        if wrong:
            other = next(pair[has_experts] for pair in OF_LAYERS.items() if part in pair)
            kind = "experts" if has_experts else "an MLP without experts"
            raise UserError("option-unused", f"--recompute-modules {part}: the model's layers have {kind}; use {other}")
        if part == "layernorm" and family.norms is Norms.AFTER:
            raise UserError(
                "option-unused",
                "--recompute-modules layernorm: the model's norms are behind attention and MLP, and keep none of their "
                "results; leave it out",
            )
        if part == "layernorm" and model.transformer_impl == "transformer_engine" and not has_experts:
            raise UserError(
                "option-unused",
                "--recompute-modules layernorm: Transformer Engine's products compute the norms of this model and "
                "keep none of their results; leave it out",
            )
