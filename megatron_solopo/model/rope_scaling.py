"""--rope-scaling TYPE:FACTOR:ORIGINAL extends a model's positions: its config while it trains, and as exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import head_dim
from megatron_solopo.model.rope import has_rope_by_layer

FORM = "TYPE:FACTOR:ORIGINAL"
TYPES = ("yarn", "linear")
"""llama3's scaling has two more numbers, and models that were trained with it say so in config.json."""


@dataclass(frozen=True)
class RopeScaling:
    """A model trained on sequences of ``original`` tokens, extended to ``factor`` times as many."""

    kind: str
    factor: float
    original: int

    def __str__(self) -> str:
        """The option's value; equal scalings have equal texts."""
        return f"{self.kind}:{self.factor!r}:{self.original}".replace(".0:", ":")

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence of the extended model."""
        return int(self.factor * self.original)


def parse(text: str) -> RopeScaling:
    """Splits ``yarn:4:32768`` into its parts.

    Raises:
        UserError: a part is missing or has no valid value.
    """
    kind, *numbers = text.split(":")
    option = f"--rope-scaling {text}"
    try:
        factor, original = numbers
        factor, original = float(factor), int(original)
    except ValueError:
        raise UserError("option-value", f"{option}: must be {FORM}, such as yarn:4:32768") from None
    if kind == "llama3":
        raise UserError("option-value", f"{option}: llama3 comes from config.json only; take {' or '.join(TYPES)}")
    if kind not in TYPES:
        raise UserError("option-value", f"{option}: TYPE {kind!r} is not one of {', '.join(TYPES)}")
    if not 1 < factor < float("inf"):
        raise UserError("option-value", f"{option}: FACTOR must be a number above 1")
    if original < 1 or factor * original % 1:
        raise UserError("option-value", f"{option}: ORIGINAL and FACTOR x ORIGINAL must be whole numbers above 0")
    return RopeScaling(kind, factor, original)


def extended(hf_config: PretrainedConfig, text: str) -> PretrainedConfig:
    """Returns the config of the extended model.

    Raises:
        UserError: config.json has a scaling already, ORIGINAL is not the length the model was trained on, or the
            result is no longer than the model.
    """
    scaling = parse(text)
    if has_rope_by_layer(hf_config):
        raise UserError(
            "rope-scaling-by-layer",
            f"--rope-scaling {text}: config.json has a RoPE for each kind of layer; set the rope_type of "
            "full_attention in its rope_parameters",
        )
    before, positions = hf_config.rope_parameters, hf_config.max_position_embeddings
    if before.get("rope_type", "default") != "default":
        raise UserError(
            "rope-scaling-already-set",
            f"--rope-scaling {text}: config.json already has rope_type {before['rope_type']!r}; leave the option out",
        )
    # Qwen3's config.json counts 8,192 tokens for the answer on top of the 32,768 it was trained on.
    trained = {positions, 1 << (positions.bit_length() - 1)}
    if scaling.original not in trained:
        raise UserError(
            "rope-scaling-positions",
            f"--rope-scaling {text}: ORIGINAL is {scaling.original}, but config.json has max_position_embeddings "
            f"{positions}; use {' or '.join(map(str, sorted(trained)))}",
        )
    if scaling.positions <= positions:
        raise UserError(
            "rope-scaling-positions",
            f"--rope-scaling {text}: extends to {scaling.positions} tokens, not beyond max_position_embeddings "
            f"{positions} of config.json; use a larger FACTOR",
        )
    result = copy.deepcopy(hf_config)
    result.max_position_embeddings = scaling.positions
    result.rope_parameters = before | {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":  # linear scaling divides all positions, whatever the model was trained on
        result.rope_parameters["original_max_position_embeddings"] = scaling.original
    return result


def write(document: dict[str, Any], hf_config: PretrainedConfig) -> None:
    """Writes a model's positions into its config.json.

    transformers 5 saves ``rope_parameters``, with rope_theta in it, and reads both that and the older fields (these
    win); transformers 4, and what is built on it, reads ``rope_scaling`` and a ``rope_theta`` beside it and ignores
    ``rope_parameters``. With all three fields every reader gets the same numbers.
    """
    document["max_position_embeddings"] = hf_config.max_position_embeddings
    document["rope_parameters"] = _of(hf_config)
    scaling = _of(hf_config)
    document["rope_theta"] = scaling.pop("rope_theta")
    if (partial := scaling.pop("partial_rotary_factor", None)) is not None:
        document["partial_rotary_factor"] = partial
    document["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if scaling.get("rope_type") == "yarn" and getattr(hf_config, "head_dim", 0) is None:
        document["head_dim"] = head_dim(hf_config)  # transformers 5.17's yarn takes Mixtral's None as a number


def is_read_alike(document: dict[str, Any], hf_config: PretrainedConfig) -> bool:
    """Whether transformers 4 reads the positions of ``hf_config`` from config.json too, and no field disagrees."""
    if has_rope_by_layer(hf_config):  # nothing changes it
        return True
    scaling, trained = document.get("rope_scaling"), _of(hf_config)
    if document.get("rope_parameters") is not None:
        if document["rope_parameters"] != hf_config.rope_parameters or "rope_theta" not in document:
            return False
    if scaling == {} or (trained["rope_type"] == "yarn" and getattr(hf_config, "head_dim", 0) is None):  # see `write`
        return False
    read = {"rope_type": "default"} | (scaling or {})
    read["rope_type"] = read.pop("type", None) or read["rope_type"]
    read["rope_theta"] = document.get("rope_theta", type(hf_config)().rope_parameters["rope_theta"])
    if read["rope_type"] == "yarn":
        read.setdefault("original_max_position_embeddings", document.get("max_position_embeddings"))
    trained.pop("partial_rotary_factor", None)
    return read == trained


def _of(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Returns ``rope_parameters`` without ``type``, the old name of rope_type, which takes precedence in transformers
    4."""
    return {name: value for name, value in hf_config.rope_parameters.items() if name != "type"}
