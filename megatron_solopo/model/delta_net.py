"""Gated DeltaNet (arXiv 2412.06464) as the attention of a layer over a pack, for megatron-core's layer specs.

megatron-core 0.19.2 has such a module (ssm/gated_delta_net), which cannot be built without fla's CUDA kernels, takes
sequences that each begin anew, and so no response that continues a shared prompt. Here a pack's layout
(parallel/recurrence.py) says where convolution and state of a response come from.

The rows of ``in_proj``, and the channels of the convolution, are ordered by key head: its query, key, values, gates,
and of each of its value heads beta and alpha. Tensor and context parallelism each give a rank adjacent key heads.
Context-parallel ranks have some tokens each; they exchange them for the heads that they compute (all-to-all), so that
all tokens of a head are on one rank, and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from megatron_solopo.model.attention import PackLayout
from megatron_solopo.model.delta_rule import CausalConvolution, fla_rule, gated_delta_rule, uses_fla
from megatron_solopo.parallel.recurrence import RecurrentLayout

VARIANT = "gated_delta_net"
"""megatron-core's ``experimental_attention_variant`` of a model with such layers."""


@dataclass
class DeltaNetSubmodules:
    """The matrices of the layer."""

    in_proj: Any
    out_proj: Any


def taps_of(settings: TransformerConfig) -> int | None:
    """Returns the taps of the convolution; None for a model without such layers."""
    return settings.linear_conv_kernel_dim if settings.experimental_attention_variant == VARIANT else None


class GatedDeltaNet(MegatronModule):
    """The layer's attention; the arguments are megatron-core's.

    Attributes:
        groups: key heads of this tensor-parallel rank.
        sections: rows of a key head in ``in_proj``: query, key and values; gates; beta; alpha.
        conv_weight: [channels, 1, taps]; dt_bias, A_log: [value heads]; all of this tensor-parallel rank.
        norm_weight: [dv], of all heads.
    """

    def __init__(
        self, config: TransformerConfig, submodules: DeltaNetSubmodules, layer_number: int, **ignored: object
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.group = cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())
        keys, values = cast(int, config.linear_num_key_heads), cast(int, config.linear_num_value_heads)
        self.key_width, self.value_width = (
            cast(int, config.linear_key_head_dim),
            cast(int, config.linear_value_head_dim),
        )
        self.values = values // keys
        self.groups = keys // self.group.size()
        of_values = self.values * self.value_width
        self.sections = (2 * self.key_width + of_values, of_values, self.values, self.values)
        matrix: dict[str, Any] = dict(config=config, bias=False, is_expert=False, tp_group=self.group)
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            keys * sum(self.sections),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **matrix,
        )
        self.out_proj = submodules.out_proj(
            keys * of_values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **matrix,
        )

        def parameter(*shape: int, sharded: bool = True) -> nn.Parameter:
            made = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
            if sharded:
                set_tensor_model_parallel_attributes(made, True, 0, 1)
            return made

        taps = cast(int, config.linear_conv_kernel_dim)
        self.conv_weight = parameter(self.groups * self.sections[0], 1, taps)
        self.dt_bias = parameter(self.groups * self.values)
        self.A_log = parameter(self.groups * self.values)
        self.norm_weight = parameter(self.value_width, sharded=False)
        self.repeats = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or ())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackLayout,
        **ignored: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[S / cp, 1, hidden] (of sequence parallelism this rank's part) -> the same shape, and no bias."""
        layout = packed_seq_params.recurrent
        assert layout is not None, "a model with recurrent layers makes their layout of every pack"
        projected = self.in_proj(hidden_states)[0][:, 0].unflatten(-1, (self.groups, -1))
        mixed, gate, beta, alpha = projected.split(self.sections, -1)
        inputs = (mixed, beta, alpha)
        if layout.group is not None:
            inputs = _to_heads(torch.cat(inputs, -1), layout.group).split((self.sections[0], *self.sections[2:]), -1)
        inputs = (each.flatten(1) for each in inputs)
        parameters = self._of_rank(layout.group)
        core = partial(self._core, layout)
        repeats = self.repeats and self.training and torch.is_grad_enabled()
        output = (
            tensor_parallel.checkpoint(core, False, *parameters, *inputs) if repeats else core(*parameters, *inputs)
        )
        if layout.group is not None:
            output = _to_rows(output, layout.group)
        output = self._normed(output, gate.reshape(output.shape))
        return self.out_proj(output.flatten(1)[:, None])

    def _of_rank(self, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        """Returns the parameters of the heads that a context-parallel rank computes."""
        parameters = (self.conv_weight[:, 0], self.dt_bias, self.A_log)
        return parameters if group is None else tuple(x.chunk(group.size())[group.rank()] for x in parameters)

    def _core(self, layout: RecurrentLayout, *tensors: Tensor) -> Tensor:
        """Computes convolution and delta rule of some heads over all tokens.

        Args:
            tensors: [channels, taps], [heads], [heads]; [S, channels], [S, heads], [S, heads], before their functions.

        Returns:
            [S, heads, dv] in the dtype of the layer.
        """
        weight, dt_bias, a_log, mixed, beta, alpha = tensors
        convolved = cast(Tensor, CausalConvolution.apply(mixed, weight, layout.rows, layout.present))
        widths = (self.key_width, self.key_width, self.values * self.value_width)
        query, key, value = convolved.unflatten(-1, (-1, sum(widths))).split(widths, -1)
        value = value.unflatten(-1, (self.values, -1)).flatten(2, 3)
        wide = torch.promote_types(mixed.dtype, torch.float32)
        decay = -a_log.to(wide).exp() * F.softplus(alpha.to(wide) + dt_bias)
        decay, beta = (layout.in_chunks(x) for x in (decay, beta.sigmoid().to(wide)))
        rule = fla_rule if uses_fla(mixed, self.config.deterministic_mode) else gated_delta_rule
        return rule(query, key, value, decay, beta, layout).to(mixed.dtype)

    def _normed(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head [S, heads, dv] times silu of its gate, rounded as transformers rounds it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        # Each tensor-parallel rank has other heads, so its gradient of the weight is a part of the sum.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight)
        inverse = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        return (weight * (x * inverse).to(x.dtype) * F.silu(gate.to(wide))).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Returns megatron-core's description of the parameters for checkpoints."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        described = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(("conv_weight", "dt_bias", "A_log"), 0),
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        for name, module in self.named_children():
            described |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        return described


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / cp, heads, d] of this rank's tokens -> [S, heads / cp, d] of its heads, the tokens rank by rank."""
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    return all_to_all(group, parts).flatten(0, 1)


def _to_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `_to_heads`."""
    parts = all_to_all(group, x.unflatten(0, (group.size(), -1)).contiguous())
    return parts.transpose(0, 1).flatten(1, 2)
