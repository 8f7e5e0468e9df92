"""--rope-scaling TYPE:FACTOR:ORIGINAL, a longer model of a folder: its config as trained and as exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import head_dim

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
        """As given on the command line, one text for one scaling."""
        return f"{self.kind}:{self.factor!r}:{self.original}".replace(".0:", ":")

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence of the extended model."""
        return int(self.factor * self.original)


def parse(text: str) -> RopeScaling:
    """``yarn:4:32768`` -> its parts.

    Raises:
        UserError: naming --rope-scaling and what is wrong.
    """
    kind, *numbers = text.split(":")
    try:
        factor, original = numbers
        factor, original = float(factor), int(original)
    except ValueError:
        raise UserError(f"--rope-scaling {text}: must be {FORM}, such as yarn:4:32768") from None
    if kind == "llama3":
        raise UserError(f"--rope-scaling {text}: llama3 comes from config.json only; take {' or '.join(TYPES)}")
    if kind not in TYPES:
        raise UserError(f"--rope-scaling {text}: TYPE {kind!r} is not one of {', '.join(TYPES)}")
    if not 1 < factor < float("inf"):
        raise UserError(f"--rope-scaling {text}: FACTOR must be a number above 1")
    if original < 1 or factor * original % 1:
        raise UserError(f"--rope-scaling {text}: ORIGINAL and FACTOR x ORIGINAL must be whole numbers above 0")
    return RopeScaling(kind, factor, original)


def extended(hf_config: PretrainedConfig, text: str) -> PretrainedConfig:
    """The config of the extended model.

    Raises:
        UserError: config.json has a scaling already, or was trained on another length than ORIGINAL.
    """
    scaling = parse(text)
    before, positions = hf_config.rope_parameters, hf_config.max_position_embeddings
    if before.get("rope_type", "default") != "default":
        raise UserError(
            f"--rope-scaling {text}: config.json already has rope_type {before['rope_type']!r}; leave the option out"
        )
    # Qwen3's config.json counts 8,192 tokens for the answer on top of the 32,768 it was trained on.
    trained = {positions, 1 << (positions.bit_length() - 1)}
    if scaling.original not in trained:
        raise UserError(
            f"--rope-scaling {text}: ORIGINAL is {scaling.original}, config.json has max_position_embeddings "
            f"{positions}; give {' or '.join(map(str, sorted(trained)))}"
        )
    if scaling.positions <= positions:
        raise UserError(
            f"--rope-scaling {text}: reaches {scaling.positions} tokens, no further than max_position_embeddings "
            f"{positions} of config.json; give a larger FACTOR"
        )
    result = copy.deepcopy(hf_config)
    result.max_position_embeddings = scaling.positions
    result.rope_parameters = before | {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":  # which divides all positions, whatever the model was trained on
        result.rope_parameters["original_max_position_embeddings"] = scaling.original
    return result


def write(document: dict[str, Any], hf_config: PretrainedConfig) -> None:
    """Writes a model's positions into its config.json.

    transformers 5 saves ``rope_parameters``, with rope_theta in it, and reads both that and the older fields (these
    win); transformers 4, and what is built on it, reads ``rope_scaling`` and a ``rope_theta`` beside it and knows
    nothing of ``rope_parameters``. With all three every reader finds the same numbers.
    """
    document["max_position_embeddings"] = hf_config.max_position_embeddings
    document["rope_parameters"] = _of(hf_config)
    scaling = _of(hf_config)
    document["rope_theta"] = scaling.pop("rope_theta")
    document["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if scaling.get("rope_type") == "yarn" and getattr(hf_config, "head_dim", 0) is None:
        document["head_dim"] = head_dim(hf_config)  # transformers 5.17's yarn takes Mixtral's None as a number


def is_read_alike(document: dict[str, Any], hf_config: PretrainedConfig) -> bool:
    """Whether transformers 4 finds the positions of ``hf_config`` in config.json as well, and no field disagrees."""
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
    """``rope_parameters`` without the old name of rope_type, which transformers 4 lets win."""
    return {name: value for name, value in hf_config.rope_parameters.items() if name != "type"}
