"""Rotary position embedding fed by explicit positions.

Megatron Core's packed RoPE restarts at every piece of a pack and hard-codes scaling constants; a completion must
continue the positions of its prompt. Frequencies come from transformers, so that every field of the config acts as it
does there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import check_number, head_dim

_ALWAYS = {"rope_type", "type", "rope_theta"}
ROPE_FIELDS = {
    "default": _ALWAYS,
    "linear": _ALWAYS | {"factor"},
    "llama3": _ALWAYS | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _ALWAYS
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
"""Scalings whose frequencies do not depend on the sequence's length, and the fields that act in each."""

SWITCHED_OFF_BY_0 = {"mscale", "mscale_all_dim"}
"""transformers takes yarn's usual factor on cos and sin where one of them is 0."""

INERT_FIELDS = {"original_max_position_embeddings", "finetuned"}
"""Fields of published configs that nothing reads."""


class RotaryFrequencies(nn.Module):
    """Computes cos and sin of every position of a pack as transformers does (angles in float32)."""

    inverse: Tensor

    def __init__(self, hf_config: PretrainedConfig) -> None:
        super().__init__()
        inverse, self.attention_scaling = inverse_frequencies(hf_config)
        # Not a parameter and not saved: the config defines it.
        self.register_buffer("inverse", inverse, persistent=False)

    @torch.no_grad()
    def angles(self, positions: Tensor) -> Tensor:
        """[S] positions -> [S, head_dim] float32, radians; both halves are the same."""
        half = torch.outer(positions.float(), self.inverse.to(positions.device))
        return torch.cat((half, half), dim=-1)

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[S] positions -> cos and sin, each [S, 1, head_dim] in ``dtype``."""
        angles = self.angles(positions)[:, None]
        return ((angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype))


def check_rope(hf_config: PretrainedConfig) -> None:
    """Refuses what `inverse_frequencies` does not cover.

    Raises:
        UserError: naming the rope_type, or the field of rope_parameters.
    """
    parameters = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        why = ": its frequencies depend on the sequence's length" if kind in ("dynamic", "longrope") else ""
        raise UserError(
            "rope-type-unsupported",
            f"config.json: rope_type {kind!r} is not supported{why}; supported are {', '.join(ROPE_FIELDS)}",
        )
    if parameters.get("partial_rotary_factor") == 1:
        parameters.pop("partial_rotary_factor")
    for name, value in parameters.items():
        if name not in ROPE_FIELDS[kind] | INERT_FIELDS and value is not None:
            raise UserError(
                "model-field-unknown",
                f"config.json: {name} = {value!r} is not known for rope_type {kind!r} and might change the "
                "frequencies; remove the field if it does not",
            )
    check_number("rope_theta", parameters.get("rope_theta"))
    for name in ROPE_FIELDS[kind] - _ALWAYS - {"truncate"}:
        if parameters.get(name) is not None:
            check_number(name, parameters[name], zero=name in SWITCHED_OFF_BY_0)
    if (parameters.get("factor") or 1) < 1:
        factor = parameters["factor"]
        raise UserError(
            "model-field-value", f"config.json: factor = {factor!r} of rope_type {kind!r} must be at least 1"
        )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if kind == "llama3" and low is not None and high is not None and low >= high:
        raise UserError(
            "model-field-value", f"config.json: low_freq_factor = {low!r} must be below high_freq_factor = {high!r}"
        )


def inverse_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """Computes the RoPE frequencies of a Hugging Face config.

    Returns:
        [head_dim / 2] float32 inverse frequencies, and the factor on cos and sin.

    Raises:
        UserError: see `check_rope`.
    """
    check_rope(hf_config)
    parameters = hf_config.rope_parameters
    kind, size = parameters.get("rope_type", "default"), head_dim(hf_config)
    if kind != "default":
        # transformers writes into the config, and its yarn uses a head_dim of None (Mixtral's) as a number.
        config = copy.deepcopy(hf_config)
        config.head_dim = size
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inverse.float(), float(scaling)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0


def reach(positions: int, parameters: dict[str, Any] | None) -> int:
    """Returns the number of positions that a model covers.

    Args:
        positions: ``max_position_embeddings``.
        parameters: ``rope_parameters`` or ``rope_scaling`` of the same config.
    """
    parameters = parameters or {}
    if (parameters.get("rope_type") or parameters.get("type")) != "yarn":
        return positions
    # Published YaRN configs keep max_position_embeddings at the length before the extension.
    original = parameters.get("original_max_position_embeddings") or positions
    return max(positions, int(original * (parameters.get("factor") or 1.0)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [S, heads, head_dim] by its positions' cos and sin, halves paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
