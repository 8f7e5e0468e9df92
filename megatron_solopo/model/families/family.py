"""A model family, and the check of config fields that have one supported value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.operators import Entry


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
    """

    model_type: str
    table: Callable[[PretrainedConfig, int], tuple[Entry, ...]]
    check: Callable[[PretrainedConfig], None] = lambda hf_config: None
    transformer_options: Callable[[PretrainedConfig], dict[str, Any]] = lambda hf_config: {}
    fields: frozenset[str] = frozenset()


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
