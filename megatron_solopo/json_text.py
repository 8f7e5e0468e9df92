"""JSON without duplicate keys of different values, of which readers silently keep the last."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_solopo.errors import UserError


class KeyTwice(ValueError):
    """An object has a key twice, with different values; the message names it."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise KeyTwice(f"the key {json.dumps(key, ensure_ascii=False)} occurs twice, with two values")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Raises `KeyTwice` too. It is created once, because one for each line of a file would be slow."""


def loads(text: str) -> Any:
    """As `json.loads`, without duplicate keys.

    Raises:
        KeyTwice: an object has a key twice, with different values.
        json.JSONDecodeError: not JSON.
    """
    return DECODER.decode(text)


def fault(error: json.JSONDecodeError) -> str:
    """Returns Python's description of the fault, of which some end in "at", before "at column 3"."""
    return error.msg.removesuffix(" at")


def check_json(*paths: Path) -> None:
    """Refuses files in which a key occurs twice with different values, or has the value NaN. Missing files and invalid
    JSON are left to the file's reader.

    Raises:
        UserError: naming the file and the key.
    """
    for path in paths:
        try:
            if (key := _not_a_number(loads(path.read_text(encoding="utf-8-sig")))) is not None:
                raise UserError("json-nan", f"{path}: {key} is NaN, which is not a number; set a number")
        except KeyTwice as error:
            raise UserError("json-key-twice", f"{path}: {error}; keep one of them") from None
        except (OSError, ValueError, RecursionError):
            continue


def _not_a_number(value: object, key: str = "a value") -> str | None:
    """Returns the key whose value is NaN."""
    if isinstance(value, dict):
        return next((name for key, inner in value.items() if (name := _not_a_number(inner, key)) is not None), None)
    return key if isinstance(value, float) and math.isnan(value) else None
