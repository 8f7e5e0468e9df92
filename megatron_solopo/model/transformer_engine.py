"""Checks and parameter names of --transformer-impl transformer_engine.

This module does not import Transformer Engine; te_layers.py does, and can be imported only where it is installed.
"""

from __future__ import annotations

import importlib.util
import re

from transformers import PretrainedConfig

from megatron_solopo import environment
from megatron_solopo.config import FP8_MULTIPLES, Config, flag
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.family import Family, Norms
from megatron_solopo.model.families.fields import has_latents, head_dim, linear_layers, mlp_width, of_layers
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.topology import expert_count

NAME = "transformer_engine"

UNSAFE_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""The environment variable with which Transformer Engine loads the state of delayed scaling, a Python pickle."""

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""A layer's norms: Transformer Engine's names, fused into the next matrix -> the portable layers'."""

FUSED = (
    *((re.compile(rf"\b{re.escape(fused)}$"), own) for fused, own in FUSED_NORMS.items()),
    (re.compile(r"\bmlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)
"""Parameters that Transformer Engine's layers name otherwise: norms fused into the next matrix, grouped experts."""


def portable_name(name: str) -> str:
    """Returns the portable layers' name of the parameter ``name`` of either implementation."""
    for pattern, replacement in FUSED:
        name = pattern.sub(replacement, name)
    return name


def check_widths(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuses a model whose matrices or heads the chosen kernels do not support.

    Raises:
        UserError: the model's layers are portable only, a width is no multiple of what the FP8 recipe needs, or the
            heads do not divide.
    """
    model, parallel = config.model, config.parallel
    family = family_of(hf_config)
    if model.transformer_impl == NAME and (part := portable_part(family, hf_config)):
        raise UserError(
            "model-portable-only",
            f"--transformer-impl {NAME}: the layers of {hf_config.model_type} have {part}, which are portable layers' "
            "only; use portable",
        )
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sizes = of_layers(hf_config, False)  # others in layers with a window are portable layers' only
    heads = {
        "num_attention_heads": sizes.num_attention_heads // tensor,
        "num_key_value_heads": sizes.num_key_value_heads // tensor,
    }
    method_of(context, parallel.cp_comm_type).check_heads(heads, context)
    if model.fp8_format is None:
        return
    size = head_dim(sizes)
    experts = expert_count(hf_config)
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    inner = getattr(hf_config, "moe_intermediate_size", None) if experts else None
    widths = {
        "hidden_size": hf_config.hidden_size,
        "attention width": size * heads["num_attention_heads"],
        "width of queries, keys and values": size * sum(heads.values()) + size * heads["num_key_value_heads"],
        "MLP width": (inner or mlp_width(hf_config)) // (expert_tensor if experts else tensor),
    }
    multiple = FP8_MULTIPLES[model.fp8_recipe]
    for name, width in widths.items():
        if width % multiple:
            raise UserError(
                "fp8-width",
                f"{flag('fp8_recipe')} {model.fp8_recipe}: the model's {name} on a rank, {width}, is no multiple of "
                f"{multiple}; leave --fp8-format out, or change the recipe or --tensor-model-parallel-size",
            )


def portable_part(family: Family, hf_config: PretrainedConfig) -> str | None:
    """Returns what of a model's layers Transformer Engine's layers of megatron-core do not have; None if nothing."""
    if family.norms is not Norms.BEFORE or family.activation != "silu":
        return "norms behind attention and MLP"
    if any(linear_layers(hf_config)):
        return "recurrent states"
    if has_latents(hf_config):
        return "latent attention"
    options = family.transformer_options(hf_config)
    if options.get("add_bias_linear"):
        return "biases of experts"
    return "shared experts" if "moe_shared_expert_intermediate_size" in options else None


def check_machine(config: Config, platform: str) -> None:
    """Refuses a machine that lacks Transformer Engine or DeepEP, if the run needs them.

    Args:
        platform: ``cuda`` (its device chosen) or ``cpu``.

    Raises:
        UserError: there is no CUDA device, no Transformer Engine, no DeepEP, or the GPU lacks the requested FP8
            recipe.
    """
    if config.parallel.moe_token_dispatcher_type == "flex":
        what = "--moe-token-dispatcher-type flex"
        if platform != "cuda":
            raise UserError("cuda-missing", f"{what}: torch sees no CUDA device; use alltoall")
        if importlib.util.find_spec("deep_ep") is None:
            raise UserError(
                "package-missing",
                f"{what}: DeepEP (the package deep_ep, from https://github.com/deepseek-ai/DeepEP) is not installed; "
                "install it, or use alltoall",
            )
    if config.model.transformer_impl != NAME:
        return
    if platform != "cuda":
        raise UserError(
            "cuda-missing", "--transformer-impl transformer_engine: torch sees no CUDA device; use portable"
        )
    engine = environment.transformer_engine()
    if not engine["found"]:
        raise UserError(
            "transformer-engine-unusable",
            f"--transformer-impl transformer_engine: Transformer Engine is not usable ({engine['note']}); install it "
            "with pip install 'megatron-solopo[te]' and run `solopo env`, or use portable",
        )
    if config.model.fp8_format is not None:
        reason = environment.fp8_refusals()[config.model.fp8_recipe]
        if reason:
            raise UserError(
                "fp8-unsupported", f"--fp8-recipe {config.model.fp8_recipe}: this GPU does not support it ({reason})"
            )
