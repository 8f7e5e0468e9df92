"""Common parts of the families with experts: a router and gated experts instead of the MLP."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.family import refuse
from megatron_solopo.model.families.fields import check_sizes, expert_count
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, Rename, StackGateUp

FIELDS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        # Not read: --moe-aux-loss-coeff replaces them.
        "router_aux_loss_coef",
        "output_router_logits",
    }
)
"""Fields of config.json that every family with experts reads."""


def expert_entries(hf_block: str, gate: str, up: str, down: str, layers: range | None = None) -> tuple[Entry, ...]:
    """Returns the entries of router and experts.

    transformers 5 holds a layer's experts in one tensor; its files have one tensor for each expert and projection, as
    the original models do.

    Args:
        hf_block: a layer's name of its block of experts.
        gate, up, down: an expert's names of its projections.
        layers: that have experts; None: all.
    """
    experts = MEGATRON_LAYER + "mlp.experts.local_experts.{expert}."
    gate, up, down = (f"{HF_LAYER}{hf_block}.experts.{{expert}}.{name}.weight" for name in (gate, up, down))
    return (
        Entry(MEGATRON_LAYER + "mlp.router.weight", (f"{HF_LAYER}{hf_block}.gate.weight",), Rename(), layers),
        Entry(experts + "linear_fc1.weight", (gate, up), StackGateUp(), layers),
        Entry(experts + "linear_fc2.weight", (down,), Rename(), layers),
    )


def shared_expert_entries(hf_block: str) -> tuple[Entry, ...]:
    """Returns the entries of the expert of every token, whose output is weighted by a gate of its own."""
    ours, theirs = MEGATRON_LAYER + "mlp.shared_experts.", f"{HF_LAYER}{hf_block}.shared_expert"
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return (
        Entry(ours + "linear_fc1.weight", gate_up, StackGateUp()),
        Entry(ours + "linear_fc2.weight", (f"{theirs}.down_proj.weight",), Rename()),
        Entry(ours + "gate_weight", (f"{theirs}_gate.weight",), Rename()),
    )


def router_bias_entry(hf_block: str, layers: range) -> Entry:
    """Returns the entry of the bias with which `router.Router` chooses experts: float32 in every folder, not
    trained."""
    name = f"{HF_LAYER}{hf_block}.gate.e_score_correction_bias"
    return Entry(MEGATRON_LAYER + "mlp.router.expert_bias", (name,), Rename(), layers, torch.float32)


def expert_options(hf_config: PretrainedConfig, ffn_hidden_size: int, renormalize: bool) -> dict[str, Any]:
    """Returns the TransformerConfig fields of the experts.

    Args:
        ffn_hidden_size: intermediate size of one expert.
        renormalize: the weights of a token's experts sum to 1; otherwise they are the softmax over all experts.
    """
    return {
        "num_moe_experts": expert_count(hf_config),
        "moe_ffn_hidden_size": ffn_hidden_size,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_router_pre_softmax": not renormalize,
    }


def check_experts(hf_config: PretrainedConfig, renormalize: bool) -> None:
    """Refuses fields that no family with experts supports.

    Raises:
        UserError: a field has an invalid or unsupported value.
    """
    name = "num_local_experts" if hasattr(hf_config, "num_local_experts") else "num_experts"
    check_sizes(hf_config, hf_config.attribute_map.get(name, name), "num_experts_per_tok")
    if hf_config.num_experts_per_tok > expert_count(hf_config):
        raise UserError(
            "model-field-value",
            f"config.json: num_experts_per_tok = {hf_config.num_experts_per_tok} is more than the "
            f"{expert_count(hf_config)} experts",
        )
    if renormalize and hf_config.num_experts_per_tok == 1:
        # The one weight is always 1: the router would have no gradient, and megatron-core raises an error.
        refuse(hf_config, num_experts_per_tok=2)


def check_groups(hf_config: PretrainedConfig) -> None:
    """Refuses groups of experts, of which a token's experts come from the best, that do not fit.

    Raises:
        UserError: the groups are not alike, have less than the two experts by which they are compared, or the chosen
            ones hold too few experts.
    """
    experts, groups, chosen = expert_count(hf_config), hf_config.n_group, hf_config.topk_group
    if experts % groups or experts // groups < 2:
        raise UserError(
            "model-field-value",
            f"config.json: n_group = {groups} must divide the {experts} experts into groups of at least 2",
        )
    if chosen > groups or hf_config.num_experts_per_tok > chosen * (experts // groups):
        raise UserError(
            "model-field-value",
            f"config.json: topk_group = {chosen} of {groups} groups with {experts // groups} experts each: a token "
            f"needs num_experts_per_tok = {hf_config.num_experts_per_tok}",
        )


def check_first_layers(hf_config: PretrainedConfig) -> None:
    """Refuses first_k_dense_replace, the first layers without experts, if there is no layer with experts behind.

    Raises:
        UserError: it is no number of layers, or of all.
    """
    first, layers = hf_config.first_k_dense_replace, hf_config.num_hidden_layers
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < layers:
        raise UserError(
            "model-field-value",
            f"config.json: first_k_dense_replace = {first!r} must be at least 0 and below num_hidden_layers = {layers}",
        )
