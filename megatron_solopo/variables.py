"""Variables in the stages of a recipe: ``$NAME`` in an option is a value of the variant or of the round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_solopo.recipe import Stage


def filled(value: object, variables: Mapping[str, object]) -> tuple[object, list[str]]:
    """Returns a value with its variables replaced, and the names of those that are unknown. ``$NAME`` alone becomes
    the variable's value of any type, ``$$`` a dollar."""
    if isinstance(value, list | dict):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        parts = [filled(value[key], variables) for key in keys]
        unknown = [name for _, names in parts for name in names]
        if isinstance(value, dict):
            return {key: part for key, (part, _) in zip(keys, parts, strict=True)}, unknown
        return [part for part, _ in parts], unknown
    if not isinstance(value, str):
        return value, []
    template = Template(value)
    names = template.get_identifiers() if template.is_valid() else []
    if len(names) == 1 and names[0] in variables and value in (f"${names[0]}", f"${{{names[0]}}}"):
        return variables[names[0]], []
    return template.safe_substitute(variables), [name for name in names if name not in variables]


def filled_stage(stage: Stage, name: str, owner: str, variables: Mapping[str, object]) -> tuple[Stage, str]:
    """Returns a stage under another name with the values of the variables; an option whose value is null is left out.

    Args:
        owner: whose variables they are, for the message.

    Returns:
        The stage, and a message about a variable that does not exist ("" where all do).
    """
    problem, options = "", {}

    def fill(value: object, where: str) -> object:
        nonlocal problem
        value, unknown = filled(value, variables)
        if unknown:
            problem = f"{where}: ${unknown[0]}: {owner} has no such variable; it has {', '.join(variables)}"
        return value

    for option, (value, where) in stage.options.items():
        if (value := fill(value, where)) is not None:
            options[option] = (value, where)
    served = fill(stage.served, f"{stage.where}: served")
    return dataclasses.replace(stage, name=name, options=options, served=served and str(served)), problem
