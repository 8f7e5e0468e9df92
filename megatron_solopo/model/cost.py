"""What a token costs in a layer, beside a pair of tokens that attend: balances packs over processes."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families.fields import (
    attention_window,
    each_layer,
    has_latents,
    head_dim,
    keys_are_values,
    linear_layers,
    mlp_width,
    windowed_layers,
)
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.pack import Windows


def width_of_cost(hf_config: PretrainedConfig) -> float:
    """Returns the width h with which `batches.attention_cost` counts a model's tokens and pairs: 6 h pairs cost as much
    as a token.

    Forward and backward compute 6 operations for each weight of a token, and 14 for each pair and width of the queries
    (4 forward, 10 backward; `planning.cost` counts the same). A hidden size would stand for a layer with 14 h^2
    weights, which grouped queries, wide MLPs and experts do not have.
    """
    options, hidden = family_of(hf_config).transformer_options(hf_config), hf_config.hidden_size
    queries = mean_width(query_widths(hf_config))
    ffn = options.get("moe_ffn_hidden_size", mlp_width(hf_config)) * options.get("moe_router_topk", 1)
    ffn += options.get("moe_shared_expert_intermediate_size", 0)
    return (attention_weights(hf_config) + 3 * hidden * ffn) / (14 * queries)


def query_widths(hf_config: PretrainedConfig) -> list[int]:
    """Returns the width of the queries of each layer, of all heads."""
    return [head_dim(layer) * layer.num_attention_heads for layer in each_layer(hf_config)]


def key_widths(hf_config: PretrainedConfig) -> list[int]:
    """Returns the width of the keys of each layer, of all heads."""
    return [head_dim(layer) * layer.num_key_value_heads for layer in each_layer(hf_config)]


def mean_width(widths: list[int]) -> int:
    """Returns the mean over the layers, rounded."""
    return round(sum(widths) / len(widths))


def attention_weights(hf_config: PretrainedConfig) -> int:
    """Returns the weights of the matrices of a layer's attention, the mean over the layers of both kinds."""
    options, hidden = family_of(hf_config).transformer_options(hf_config), hf_config.hidden_size
    if has_latents(hf_config):
        rank, heads, size = hf_config.q_lora_rank, hf_config.num_attention_heads, head_dim(hf_config)
        expanded = hf_config.kv_lora_rank * (hf_config.qk_nope_head_dim + hf_config.v_head_dim)
        expanded += (hidden if rank is None else rank) * size + hidden * hf_config.v_head_dim
        return whole_attention_weights(hf_config) + heads * expanded
    gates = 1 + bool(options.get("attention_output_gate"))
    matrices = [1 if keys_are_values(hf_config, windowed) else 2 for windowed in windowed_layers(hf_config)]
    queries, keys = query_widths(hf_config), key_widths(hf_config)
    full = hidden * mean_width(
        [(1 + gates) * q + count * k for q, k, count in zip(queries, keys, matrices, strict=True)]
    )
    if not any(linear := linear_layers(hf_config)):
        return full
    keys = hf_config.linear_num_key_heads * hf_config.linear_key_head_dim
    values = hf_config.linear_num_value_heads * hf_config.linear_value_head_dim
    recurrent = hidden * (2 * keys + 3 * values + 2 * hf_config.linear_num_value_heads)
    return (sum(linear) * recurrent + (len(linear) - sum(linear)) * full) // len(linear)


def whole_attention_weights(hf_config: PretrainedConfig) -> int:
    """Returns those of `attention_weights` that each tensor-parallel rank has whole: the matrices that make latents."""
    if not has_latents(hf_config):
        return 0
    return hf_config.hidden_size * (sum(latents(hf_config)) + hf_config.qk_rope_head_dim)


def latents(hf_config: PretrainedConfig) -> tuple[int, ...]:
    """Returns the widths of a token's latents, of keys and values and of queries; () of a model without."""
    return (hf_config.kv_lora_rank, hf_config.q_lora_rank or 0) if has_latents(hf_config) else ()


def rule_operations(hf_config: PretrainedConfig) -> int:
    """Returns the operations of the gated delta rule for a token of a recurrent layer, forward: the product of a state
    with a key, its update, and the product with a query, of each value head; 0 for a model without such layers."""
    if not any(linear_layers(hf_config)):
        return 0
    return 6 * hf_config.linear_num_value_heads * hf_config.linear_key_head_dim * hf_config.linear_value_head_dim


def windows_of(hf_config: PretrainedConfig) -> Windows:
    """Returns the windows of a model's layers, whose share is by the width of their queries; a recurrent layer has the
    window in which attention would cost as much.

    Chunks of tokens cost it about half as much again as `rule_operations` (model/delta_rule.py); attention computes 4
    operations for a pair and width of the queries.
    """
    if any(linear := linear_layers(hf_config)):
        queries = head_dim(hf_config) * hf_config.num_attention_heads
        return Windows(round(1.5 * rule_operations(hf_config) / (4 * queries)), sum(linear) / len(linear))
    widths = query_widths(hf_config)
    windowed = sum(width for width, is_windowed in zip(widths, windowed_layers(hf_config), strict=True) if is_windowed)
    return Windows(attention_window(hf_config) or 0, windowed / sum(widths))
