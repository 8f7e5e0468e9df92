"""Model families: what a Hugging Face config means for Megatron Core, and which tensors make which parameter.

A family is one file. It is looked up by the config's ``model_type``; an unknown one is refused by name.
"""

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


def family_of(hf_config: PretrainedConfig) -> Family:
    """The family of a config, after its check.

    Raises:
        UserError: an unknown model_type, or a config field that the family does not cover.
    """
    from megatron_solopo.model.families.fields import attention_window, check_shape, refuse_unknown
    from megatron_solopo.model.families.llama import LLAMA
    from megatron_solopo.model.families.mistral import MISTRAL
    from megatron_solopo.model.families.mixtral import MIXTRAL
    from megatron_solopo.model.families.qwen2 import QWEN2
    from megatron_solopo.model.families.qwen3 import QWEN3
    from megatron_solopo.model.families.qwen3_moe import QWEN3_MOE
    from megatron_solopo.model.rope import check_rope

    families = {family.model_type: family for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)}
    if hf_config.model_type not in families:
        raise UserError(
            f"config.json: model_type {hf_config.model_type!r} is not supported; "
            f"supported are {', '.join(sorted(families))}"
        )
    family = families[hf_config.model_type]
    refuse(hf_config, hidden_act="silu", attention_dropout=0.0)
    family.check(hf_config)
    check_rope(hf_config)
    attention_window(hf_config)
    refuse_unknown(hf_config, family.fields)
    check_shape(hf_config)
    return family


def refuse(hf_config: PretrainedConfig, **allowed: Any) -> None:
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
