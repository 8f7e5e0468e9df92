"""Rotary position embedding fed by explicit positions.

Megatron Core's packed RoPE restarts at every piece of a pack and hard-codes scaling constants; a continuation must
go on from its prompt. Frequencies come from transformers, so that every field of the config acts as it does there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_solopo.errors import UserError

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings whose frequencies do not depend on the length of the sequence at hand."""


class RotaryFrequencies(nn.Module):
    """cos and sin of every position of a pack, as transformers computes them (angles in float32)."""

    def __init__(self, hf_config: PretrainedConfig) -> None:
        super().__init__()
        inverse, self.attention_scaling = inverse_frequencies(hf_config)
        # Not a parameter and not saved: the config defines it.
        self.register_buffer("inverse", inverse, persistent=False)

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[S] positions -> cos and sin, each [S, 1, head_dim] in ``dtype``."""
        angles = torch.outer(positions.float(), self.inverse.to(positions.device))
        both = torch.cat((angles, angles), dim=-1)[:, None, :]
        return ((both.cos() * self.attention_scaling).to(dtype), (both.sin() * self.attention_scaling).to(dtype))


def inverse_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """([head_dim / 2] float32 inverse frequencies, the factor on cos and sin) of a Hugging Face config.

    Raises:
        UserError: a scaling whose frequencies change with the sequence length.
    """
    parameters = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if kind != "default":
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        return inverse.float(), float(scaling)
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [S, heads, head_dim] by its positions' cos and sin, halves paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
