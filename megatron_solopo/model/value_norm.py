"""Gemma 4's layer: values with a norm, some layers with heads of another size and without a matrix of values, and a
factor on the layer's result."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_solopo.model.families.fields import head_dim, keys_are_values, of_layers
from megatron_solopo.model.norm import SandwichLayer


class ValueNormAttention(SelfAttention):
    """megatron-core's attention with a norm, without weight, of each head of values.

    Args:
        keys_are_values: ``linear_qkv`` has no rows of values, and a head's values are its keys before norm and RoPE.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *arguments: Any,
        keys_are_values: bool = False,
        **settings: Any,
    ) -> None:
        self.keys_are_values = keys_are_values

        def without_values(inputs: int, rows: int, **others: Any) -> Any:
            matrix: Any = submodules.linear_qkv
            return matrix(inputs, rows - cast(int, config.kv_channels) * cast(int, config.num_query_groups), **others)

        made = replace(submodules, linear_qkv=without_values) if keys_are_values else submodules
        super().__init__(config, made, *arguments, **settings)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *arguments: Any, **settings: Any) -> Any:
        """[S, B, hidden] -> query [S, B, heads, head_dim], key and value [S, B, kv_heads, head_dim] of this rank."""
        if self.keys_are_values:
            mixed, _ = cast(Any, self.linear_qkv)(hidden_states)
            groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
            heads = mixed.unflatten(-1, (groups, -1, size))
            query, value = heads[..., :-1, :].flatten(2, 3), heads[..., -1, :]
            query, key = cast(Any, self.q_layernorm)(query), cast(Any, self.k_layernorm)(value)
        else:
            made: Any = super().get_query_key_value_tensors(hidden_states, *arguments, **settings)
            query, key, value = made
        return query, key, F.rms_norm(value, value.shape[-1:], eps=self.config.layernorm_epsilon)


class ScaledLayer(SandwichLayer):
    """A layer whose result is multiplied by a number of the folder, as transformers' buffer ``layer_scalar``.

    Args:
        heads: fields of ``config`` that this layer has otherwise.

    Attributes:
        layer_scalar: [1]; it has no gradient, and training leaves it as it is.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, heads: dict[str, int], **settings: Any) -> None:
        config = copy.copy(config)
        vars(config).update(heads)
        super().__init__(config, *arguments, **settings)
        self.layer_scalar = nn.Parameter(torch.ones(1, dtype=config.params_dtype), requires_grad=False)

    def forward(self, *arguments: Any, **settings: Any) -> tuple[Tensor, Any]:
        """See megatron-core's layer."""
        output, context = cast(Any, super()).forward(*arguments, **settings)
        return output * self.layer_scalar, context


def value_norm_spec(layer: ModuleSpec, hf_config: PretrainedConfig, windowed: bool) -> ModuleSpec:
    """Returns the spec of a portable layer, with a window or without, as Gemma 4 has it."""
    sizes, submodules = of_layers(hf_config, windowed), cast(TransformerLayerSubmodules, layer.submodules)
    attention = cast(ModuleSpec, submodules.self_attention)
    own = {"keys_are_values": keys_are_values(hf_config, windowed)}
    attention = replace(attention, module=ValueNormAttention, params=attention.params | own)
    heads = {"kv_channels": head_dim(sizes), "num_query_groups": sizes.num_key_value_heads}
    return ModuleSpec(
        module=ScaledLayer, params={"heads": heads}, submodules=replace(submodules, self_attention=attention)
    )
