"""Common parts of the families with experts: a router and gated experts instead of the MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.family import refuse
from megatron_solopo.model.families.fields import check_number, check_sizes
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER, mlp_entries
from megatron_solopo.model.families.operators import Entry, FusedGateUp, Rename, StackGateUp, part_of
from megatron_solopo.parallel.topology import EXPERT_COUNTS, expert_count, first_dense_layers

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

GATE_UP = "experts.gate_up_proj"


def expert_entries(hf_block: str, gate: str, up: str, down: str, layers: range | None = None) -> tuple[Entry, ...]:
    """Returns the entries of router and experts.

    transformers 5 holds a layer's experts in one tensor; its files have one tensor for each expert and projection, as
    the original models do, unless it was asked to save them as they are: then see `in_one_tensor`.

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
    gate = Entry(
        MEGATRON_LAYER + "mlp.shared_experts.gate_weight",
        (f"{HF_LAYER}{hf_block}.shared_expert_gate.weight",),
        Rename(),
    )
    return (*mlp_entries("mlp.shared_experts", f"{hf_block}.shared_expert"), gate)


def router_bias_entry(hf_config: PretrainedConfig) -> Entry:
    """Returns the entry of the bias with which `router.Router` chooses experts: float32 in every folder, not
    trained."""
    name, layers = HF_LAYER + "mlp.gate.e_score_correction_bias", hf_config.num_hidden_layers
    layers = range(first_dense_layers(hf_config), layers)
    return Entry(MEGATRON_LAYER + "mlp.router.expert_bias", (name,), Rename(), layers, torch.float32)


def entries_behind_first_layers(hf_config: PretrainedConfig) -> tuple[Entry, ...]:
    """Returns the entries of the first layers' MLPs, and of router, experts and shared experts in the others."""
    first = first_dense_layers(hf_config)
    with_experts = range(first, hf_config.num_hidden_layers)
    return (
        *mlp_entries(layers=range(first)),
        *expert_entries("mlp", gate="gate_proj", up="up_proj", down="down_proj", layers=with_experts),
        *mlp_entries("mlp.shared_experts", layers=with_experts),
    )


def options_behind_first_layers(hf_config: PretrainedConfig, renormalize: bool) -> dict[str, Any]:
    """Returns the TransformerConfig fields of such layers; see `expert_options`."""
    first = first_dense_layers(hf_config)
    return expert_options(hf_config, hf_config.moe_intermediate_size, renormalize) | {
        "moe_layer_freq": [int(layer >= first) for layer in range(hf_config.num_hidden_layers)],
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
        "moe_shared_expert_intermediate_size": hf_config.moe_intermediate_size * hf_config.n_shared_experts,
    }


def sigmoid_options(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns the TransformerConfig fields of such layers with a sigmoid router and groups of experts."""
    return options_behind_first_layers(hf_config, hf_config.norm_topk_prob) | {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": hf_config.n_group,
        "moe_router_group_topk": hf_config.topk_group,
    }


def in_one_tensor(table: Sequence[Entry]) -> tuple[Entry, ...]:
    """Returns the table of a folder that has the experts of each layer in one tensor, as transformers 5 holds and on
    request saves them, under its names; gate is above up in each."""
    return tuple(_in_one_tensor(entry) for entry in table)


def _in_one_tensor(entry: Entry) -> Entry:
    if not entry.of_experts or part_of(entry.hf[0].format(layer=0, expert=0))[1] is not None:
        return replace(entry, hf=tuple(name.replace(".block_sparse_moe.", ".mlp.") for name in entry.hf))
    if isinstance(entry.operator, StackGateUp):
        return replace(entry, hf=(f"{HF_LAYER}mlp.{GATE_UP}[{{expert}}]",), operator=FusedGateUp())
    return replace(entry, hf=(f"{HF_LAYER}mlp.experts.down_proj[{{expert}}]",))


def are_in_one_tensor(names: Iterable[str]) -> bool:
    """Whether a folder with these tensors has the experts of each layer in one."""
    return any(name.endswith(GATE_UP) for name in names)


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
    field = next(name for name in EXPERT_COUNTS if hasattr(hf_config, name))
    check_sizes(hf_config, hf_config.attribute_map.get(field, field), "num_experts_per_tok")
    if hf_config.num_experts_per_tok > expert_count(hf_config):
        raise UserError(
            "model-field-value",
            f"config.json: num_experts_per_tok = {hf_config.num_experts_per_tok} is more than the "
            f"{expert_count(hf_config)} experts",
        )
    if renormalize and hf_config.num_experts_per_tok == 1:
        # The one weight is always 1: the router would have no gradient, and megatron-core raises an error.
        refuse(hf_config, num_experts_per_tok=2)


def check_groups(hf_config: PretrainedConfig, compared: int = 2) -> None:
    """Refuses groups of experts, of which a token's experts come from the best, that do not fit.

    Args:
        compared: number of experts by which groups are compared.

    Raises:
        UserError: the groups are not alike, have less than the experts by which they are compared, or the chosen
            ones hold too few experts.
    """
    check_sizes(hf_config, "n_group", "topk_group")
    experts, groups, chosen = expert_count(hf_config), hf_config.n_group, hf_config.topk_group
    if experts % groups or experts // groups < compared:
        raise UserError(
            "model-field-value",
            f"config.json: n_group = {groups} must divide the {experts} experts into groups of at least {compared}",
        )
    if chosen > groups or hf_config.num_experts_per_tok > chosen * (experts // groups):
        raise UserError(
            "model-field-value",
            f"config.json: topk_group = {chosen} of {groups} groups with {experts // groups} experts each: a token "
            f"needs num_experts_per_tok = {hf_config.num_experts_per_tok}",
        )


def check_behind_first_layers(hf_config: PretrainedConfig) -> None:
    """Refuses sizes and numbers of such layers that do not fit.

    Raises:
        UserError: a field has an invalid value, or there is no layer with experts behind the first.
    """
    check_sizes(hf_config, "moe_intermediate_size", "n_shared_experts")
    check_number("routed_scaling_factor", hf_config.routed_scaling_factor)
    check_experts(hf_config, renormalize=False)
    kinds, layers = getattr(hf_config, "mlp_layer_types", None), hf_config.num_hidden_layers
    if kinds is not None:
        first = kinds.count("dense")
        if kinds != ["dense"] * first + ["sparse"] * (layers - first) or first == layers:
            raise UserError(
                "model-field-value",
                f"config.json: mlp_layer_types = {kinds!r} must be num_hidden_layers = {layers} times dense or sparse, "
                "dense layers first and a sparse one behind",
            )
        refuse(hf_config, first_k_dense_replace=first)
        return
    first = hf_config.first_k_dense_replace
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < layers:
        raise UserError(
            "model-field-value",
            f"config.json: first_k_dense_replace = {first!r} must be at least 0 and below num_hidden_layers = {layers}",
        )


def carried_layers(hf_config: PretrainedConfig) -> tuple[str, ...]:
    """Returns how names begin of layers of multi-token prediction, which follow the model's own."""
    first = hf_config.num_hidden_layers
    number = getattr(hf_config, "num_nextn_predict_layers", 0) or 0
    return tuple(f"model.layers.{first + place}." for place in range(number))


BEHIND_FIRST_LAYERS = FIELDS | {
    *("moe_intermediate_size", "norm_topk_prob", "first_k_dense_replace", "n_routed_experts", "n_shared_experts"),
    *("routed_scaling_factor", "n_group", "topk_group", "num_nextn_predict_layers", "num_mtp_layers"),
}
"""Fields that families with first layers without experts read or check beside their own."""
