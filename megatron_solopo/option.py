"""How an option is declared: a dataclass field with its default, meaning and rule."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    mapping: bool = False,
) -> Any:
    """A field of a section or of a loss: default, one line of help, allowed values or the smallest allowed number.

    With ``mapping`` it is a JSON object in a text, which a YAML file may also give as a mapping.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "mapping": mapping})
