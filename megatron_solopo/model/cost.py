"""What a token costs in a layer, beside a pair of tokens that attend: balances packs over processes."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families.fields import attention_window, head_dim, mlp_width, windowed_layers
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.pack import Windows


def width_of_cost(hf_config: PretrainedConfig) -> float:
    """Returns the width h with which `batches.attention_cost` counts a model's tokens and pairs: 6 h pairs cost as much
    as a token.

    Forward and backward compute 6 operations for each weight of a token, and 14 for each pair and width of the queries
    (4 forward, 10 backward; `planning.cost` counts the same). A hidden size would stand for a layer with 14 h^2
    weights, which grouped queries, wide MLPs and experts do not have.
    """
    options, size = family_of(hf_config).transformer_options(hf_config), head_dim(hf_config)
    hidden, queries = hf_config.hidden_size, size * hf_config.num_attention_heads
    ffn = options.get("moe_ffn_hidden_size", mlp_width(hf_config)) * options.get("moe_router_topk", 1)
    ffn += options.get("moe_shared_expert_intermediate_size", 0)
    weights = 2 * hidden * (queries + size * hf_config.num_key_value_heads) + 3 * hidden * ffn
    return weights / (14 * queries)


def windows_of(hf_config: PretrainedConfig) -> Windows:
    """Returns the windows of a model's layers."""
    layers = windowed_layers(hf_config)
    return Windows(attention_window(hf_config) or 0, sum(layers) / len(layers))
