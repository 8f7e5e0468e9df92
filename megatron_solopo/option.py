"""The declaration of an option: a dataclass field with its default, meaning and limits."""

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
    word: str | None = None,
) -> Any:
    """Returns a dataclass field of a section or of a loss.

    Args:
        default: its value where nobody sets it.
        help: its meaning, in one line.
        choices: the allowed values.
        minimum: the smallest allowed number.
        mapping: it is a JSON object in a text, which a YAML file may write as a mapping.
        word: a text that is allowed instead of a number.
    """
    limits = {"choices": choices, "minimum": minimum, "word": word}
    return field(default=default, metadata={"help": help, "mapping": mapping, **limits})
