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
from megatron_solopo.model.families.fields import check_number, of_layers, rotary_dim

_ALWAYS = {"rope_type", "type", "rope_theta"}
ROPE_FIELDS = {
    "default": _ALWAYS,
    "linear": _ALWAYS | {"factor"},
    "llama3": _ALWAYS | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "proportional": _ALWAYS | {"factor", "partial_rotary_factor"},
    "yarn": _ALWAYS
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
"""Scalings whose frequencies do not depend on the sequence's length, and the fields that act in each."""

SWITCHED_OFF_BY_0 = {"mscale", "mscale_all_dim"}
"""transformers takes yarn's usual factor on cos and sin where one of them is 0."""

INERT_FIELDS = {"original_max_position_embeddings", "max_position_embeddings", "finetuned"} | {
    *("mrope_section", "mrope_interleaved")  # which of an image's three positions turns a channel; a text has one
}
"""Fields of published configs that nothing reads."""


class RotaryFrequencies(nn.Module):
    """Computes cos and sin of every position of a pack as transformers does (angles in float32).

    R, the channels of a head that are rotated, is `fields.rotary_dim` where config.json has no
    ``partial_rotary_factor``.

    Attributes:
        windowed: those of layers with a window where config.json has others for them.
    """

    inverse: Tensor

    def __init__(self, hf_config: PretrainedConfig, windowed: bool = False) -> None:
        super().__init__()
        parameters = rope_of(hf_config, windowed)
        inverse, self.attention_scaling = inverse_frequencies(of_layers(hf_config, windowed), parameters)
        # Not a parameter and not saved: the config defines it.
        self.register_buffer("inverse", inverse, persistent=False)
        self.beta = parameters.get("llama_4_scaling_beta")
        self.original: int = parameters.get("original_max_position_embeddings", 1)
        self.windowed: RotaryFrequencies | None = None
        if not windowed and has_rope_by_layer(hf_config):
            self.windowed = RotaryFrequencies(hf_config, True)

    @torch.no_grad()
    def query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[S] positions -> [S, 1, 1], 1 + beta ln(1 + floor(position / original positions)) as in Llama 4 and Ministral
        3, in ``dtype``; None for other models."""
        if self.beta is None:
            return None
        return (1 + self.beta * torch.log(1 + torch.floor(positions / self.original)))[:, None, None].to(dtype)

    @torch.no_grad()
    def angles(self, positions: Tensor) -> Tensor:
        """[S] positions -> [S, R] float32, radians; both halves are the same."""
        half = torch.outer(positions.float(), self.inverse.to(positions.device))
        return torch.cat((half, half), dim=-1)

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[S] positions -> cos and sin, each [S, 1, R] in ``dtype``."""
        angles = self.angles(positions)[:, None]
        return ((angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype))


def has_rope_by_layer(hf_config: PretrainedConfig) -> bool:
    """Whether layers with a window have another RoPE than layers without."""
    return "full_attention" in (hf_config.rope_parameters or {})


def rope_of(hf_config: PretrainedConfig, windowed: bool = False) -> dict[str, Any]:
    """Returns the ``rope_parameters`` of the layers with a window, or of those without."""
    if has_rope_by_layer(hf_config):
        return hf_config.rope_parameters["sliding_attention" if windowed else "full_attention"]
    return hf_config.rope_parameters or {}


def rotated_channels(hf_config: PretrainedConfig) -> int:
    """Returns how many channels of a head, the first ones, are rotated."""
    inverse, _ = inverse_frequencies(of_layers(hf_config, False), rope_of(hf_config))
    return 2 * len(inverse)


def check_rope(hf_config: PretrainedConfig, fields: frozenset[str]) -> None:
    """Refuses what `RotaryFrequencies` does not cover.

    Args:
        fields: of rope_parameters that the family applies beyond `ROPE_FIELDS`.

    Raises:
        UserError: naming the rope_type, or the field of rope_parameters.
    """
    partial = getattr(hf_config, "partial_rotary_factor", None)
    if partial not in (None, 1) and "partial_rotary_factor" not in fields:
        raise UserError(
            "model-field-unknown",
            f"config.json: partial_rotary_factor = {partial!r} is not known for {hf_config.model_type} and might "
            "change the frequencies; remove the field if it does not",
        )
    for windowed in (False, True):
        _check_parameters(of_layers(hf_config, windowed), dict(rope_of(hf_config, windowed)), fields)


def _check_parameters(hf_config: PretrainedConfig, parameters: dict[str, Any], fields: frozenset[str]) -> None:
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
        if name not in ROPE_FIELDS[kind] | INERT_FIELDS | fields and value is not None:
            raise UserError(
                "model-field-unknown",
                f"config.json: {name} = {value!r} is not known for rope_type {kind!r} and might change the "
                "frequencies; remove the field if it does not",
            )
    check_number("rope_theta", parameters.get("rope_theta"))
    for name in ROPE_FIELDS[kind] - _ALWAYS - {"truncate"} | fields:
        if parameters.get(name) is not None:
            check_number(name, parameters[name], zero=name in SWITCHED_OFF_BY_0)
    if (parameters.get("factor") or 1) < 1:
        factor = parameters["factor"]
        raise UserError(
            "model-field-value", f"config.json: factor = {factor!r} of rope_type {kind!r} must be at least 1"
        )
    size, factor = rotary_dim(hf_config), parameters.get("partial_rotary_factor")
    if factor is not None and (not 2 <= size * factor <= size or int(size * factor) % 2):
        raise UserError(
            "model-field-value",
            f"config.json: partial_rotary_factor = {factor!r} of head_dim {size}: RoPE needs an even number of "
            "channels, at most all",
        )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if kind == "llama3" and low is not None and high is not None and low >= high:
        raise UserError(
            "model-field-value", f"config.json: low_freq_factor = {low!r} must be below high_freq_factor = {high!r}"
        )


def inverse_frequencies(hf_config: PretrainedConfig, parameters: dict[str, Any]) -> tuple[Tensor, float]:
    """Computes the RoPE frequencies of a Hugging Face config that `check_rope` accepts.

    Args:
        parameters: see `rope_of`.

    Returns:
        [R / 2] float32 inverse frequencies, and the factor on cos and sin.
    """
    kind, size = parameters.get("rope_type", "default"), rotary_dim(hf_config)
    if kind != "default":
        # transformers writes into the config, and its yarn uses a head_dim of None (Mixtral's) as a number.
        config = copy.deepcopy(hf_config)
        config.head_dim, config.rope_parameters = size, parameters
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inverse.float(), float(scaling)
    size = int(size * parameters.get("partial_rotary_factor", 1))
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
    """Rotates the first R channels of [S, heads, head_dim] by its positions' cos and sin, halves paired as in Llama."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
