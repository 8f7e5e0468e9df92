"""A model family, and the check of config fields that have one supported value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.operators import Entry


class Norms(Enum):
    """Where the norms of a layer are, of its attention and of its MLP."""

    BEFORE = auto()
    """Of what each of them reads."""
    BOTH = auto()
    """And of what each of them adds to the residual stream."""
    AFTER = auto()
    """Of what each of them adds alone."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: the ``model_type`` of config.json.
        table: maps (config, padded vocabulary) to an entry for every parameter.
        check: refuses configs whose mathematics this family does not implement, beyond what `family_of` refuses for
            all families.
        transformer_options: returns the TransformerConfig fields beyond the common ones.
        fields: fields of config.json that only this family reads or checks; see families/fields.py.
        rope_fields: fields of rope_parameters that only some families have.
        activation: of the gated MLP, by transformers' name.
        norms: where the norms of a layer are.
        width_norms: whether queries and keys have a norm over all heads together.
        value_norms: whether each head of values has a norm without weight, and a layer's result a factor from the
            folder, which is not trained (`value_norm.ScaledLayer`).
        embedding_scale: returns the factor on the embeddings of tokens.
        carried: returns how names begin of tensors that a folder may have, and that an export has as they were.
    """

    model_type: str
    table: Callable[[PretrainedConfig, int], tuple[Entry, ...]]
    check: Callable[[PretrainedConfig], None] = lambda hf_config: None
    transformer_options: Callable[[PretrainedConfig], dict[str, Any]] = lambda hf_config: {}
    fields: frozenset[str] = frozenset()
    rope_fields: frozenset[str] = frozenset()
    activation: str = "silu"
    norms: Norms = Norms.BEFORE
    width_norms: bool = False
    value_norms: bool = False
    embedding_scale: Callable[[PretrainedConfig], float] = lambda hf_config: 1.0
    carried: Callable[[PretrainedConfig], tuple[str, ...]] = lambda hf_config: ()


def refuse(hf_config: PretrainedConfig, **allowed: object) -> None:
    """Refuses a config whose field differs from the one supported value.

    Raises:
        UserError: a field has another value.
    """
    for name, supported in allowed.items():
        value = getattr(hf_config, name, supported)
        if value != supported:
            raise UserError(
                "model-field-unsupported",
                f"config.json: {name} = {value!r} is not supported for {hf_config.model_type} (only {supported!r} is)",
            )
