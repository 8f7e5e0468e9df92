"""What is known of a model family, and the refusal of a config field that it does not cover."""

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
        model_type: of config.json.
        table: (config, padded vocabulary) -> every parameter.
        check: refuses configs whose mathematics this family does not cover, beyond what `family_of` refuses for all.
        transformer_options: TransformerConfig fields beyond the common ones.
        fields: of config.json that only this family reads or checks; see families/fields.py.
    """

    model_type: str
    table: Callable[[PretrainedConfig, int], tuple[Entry, ...]]
    check: Callable[[PretrainedConfig], None] = lambda hf_config: None
    transformer_options: Callable[[PretrainedConfig], dict[str, Any]] = lambda hf_config: {}
    fields: frozenset[str] = frozenset()


def refuse(hf_config: PretrainedConfig, **allowed: object) -> None:
    """Refuses a config whose field differs from the one value that is covered.

    Raises:
        UserError: naming the field.
    """
    for name, value in allowed.items():
        found = getattr(hf_config, name, value)
        if found != value:
            raise UserError(
                f"config.json: {name} = {found!r} is not supported for {hf_config.model_type} (only {value!r} is)"
            )
