"""`solopo convert-checkpoint doctor MODEL`: what of a Hugging Face folder is not understood, and the nearest family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_solopo.conversion.carried import carried_names
from megatron_solopo.conversion.quantized import WeightReader
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model.families.fields import unknown_fields
from megatron_solopo.model.families.moe import are_in_one_tensor, in_one_tensor
from megatron_solopo.model.families.registry import FAMILIES, MULTIMODAL, UNSUPPORTED, family_of
from megatron_solopo.model.hf_config import read_config_file
from megatron_solopo.model_folder import check_is_folder

_NUMBERS = (
    (re.compile(r"\blayers\.\d+\."), "layers.{layer}."),
    (re.compile(r"\bexperts\.\d+\."), "experts.{expert}."),
    (re.compile(r"\.\d+\."), ".{number}."),  # of other layouts
)

_OLDER = {"rope_theta", "rope_scaling", "torch_dtype", "dtype"}
"""Fields that transformers reads into others."""


class Diagnosis(NamedTuple):
    """What the command prints.

    Attributes:
        lines: one for each finding.
        understood: whether the folder can be loaded.
    """

    lines: list[str]
    understood: bool


def diagnose(folder: str | Path) -> Diagnosis:
    """Compares a folder's config.json and the names of its weights, if it has some, with the families.

    Raises:
        UserError: there is no folder, no config.json, or a file of weights is damaged.
    """
    folder = Path(folder)
    check_is_folder(f"MODEL {folder}", folder, "set a Hugging Face folder")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("model-config-missing", f"MODEL {folder}: the folder holds no config.json")
    check_json(path)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines, reader = [], _reader(folder)
    if document.get("model_type") in MULTIMODAL:
        lines.append(f"model_type {document['model_type']!r}: its text_config is that of the trained model")
        document = {"model_type": read_config_file(path).model_type} | (document.get("text_config") or {})
    kind, kinds = str(document.get("model_type")), {_kind(name) for name in (reader.names() if reader else ())}
    name = kind if kind in FAMILIES else _nearest(document, kinds)
    if name != kind:
        reason = f", because {UNSUPPORTED[kind]}" if kind in UNSUPPORTED else ""
        lines.append(f"model_type {kind!r} is of no family{reason}; the nearest is {name}")
    refusal, values, hf_config = None, document, None
    if name == kind:
        try:
            hf_config = read_config_file(path)
            values = vars(hf_config)
            family_of(hf_config)
        except UserError as error:
            refusal, hf_config = error.message, None
    else:
        refusal = _refusal_as(name, document)
    values = {field: value for field, value in values.items() if field not in _OLDER}
    fields = unknown_fields(values, FAMILIES[name].fields)
    lines += [f"config.json: {field} = {value!r} is read by no code of {name}" for field, value in fields.items()]
    if refusal is not None and not any(f"config.json: {field} = " in refusal for field in fields):
        lines.append(refusal)
    stacked = are_in_one_tensor(kinds)
    expected = _kinds_of(name, bool(document.get("tie_word_embeddings")), stacked, hf_config)
    carried = carried_names(reader, hf_config) if reader and hf_config else []
    if reader and carried:
        lines.append(f"weights: {len(carried)} beside the trained model are carried through, such as {carried[0]}")
        kinds = {_kind(name) for name in reader.names() if reader.stored(name) not in carried}
    if kinds:
        both = len(kinds & expected)
        lines += [f"the weights {one} are in no table of {name}" for one in sorted(kinds - expected)]
        if both:  # else the layout is another
            lines += [f"the weights {one}, which {name} has, are missing" for one in sorted(expected - kinds)]
        lines.append(f"weights: {both} of {len(kinds)} kinds of tensors are those of {name}")
    else:
        lines.append("weights: the folder holds none")
    understood = name == kind and not fields and refusal is None and kinds <= expected
    if understood:
        lines.append(f"all fields are understood: {name}")
    return Diagnosis(lines, understood)


def _refusal_as(family: str, document: dict[str, Any]) -> str | None:
    """Returns why a family refuses the values of a config.json of another model_type, if it does."""
    try:
        family_of(CONFIG_MAPPING[family].from_dict(document | {"model_type": family}))
    except UserError as error:
        return error.message
    except Exception:  # transformers' own checks, of values that this class has no such meaning for
        return None
    return None


def _reader(folder: Path) -> WeightReader | None:
    """Returns a folder's weights; None if it has none."""
    try:
        return WeightReader(folder)
    except UserError as error:
        if error.code != "weights-missing":
            raise
        return None


def _kind(name: str) -> str:
    for pattern, replacement in _NUMBERS:
        name = pattern.sub(replacement, name)
    return name


def _kinds_of(family: str, tied: bool, stacked: bool, hf_config: PretrainedConfig | None = None) -> set[str]:
    """Returns the names of a family's tensors with placeholders for the numbers of layers and experts.

    Args:
        stacked: the experts of a layer are in one tensor, see `in_one_tensor`.
        hf_config: of the model; without it the class's defaults decide which optional tensors there are.
    """
    hf_config = hf_config or CONFIG_MAPPING[family](tie_word_embeddings=tied)
    table = FAMILIES[family].table(hf_config, hf_config.vocab_size)
    names = (name for entry in (in_one_tensor(table) if stacked else table) for name in entry.hf)
    return {name.removesuffix("[{expert}]") for name in names}


def _nearest(document: dict[str, Any], kinds: set[str]) -> str:
    """Returns the family with most of a folder's tensors for its own number; of those with as many, and without
    weights, that with most fields."""

    def likeness(family: str) -> tuple[float, float]:
        tied = bool(document.get("tie_word_embeddings"))
        sets = (
            (kinds, _kinds_of(family, tied, are_in_one_tensor(kinds))),
            ({*document}, {*CONFIG_MAPPING[family]().to_dict()}),
        )
        of_weights, of_fields = (len(own & theirs) / len(own | theirs) for own, theirs in sets)
        return of_weights, of_fields

    return max(sorted(FAMILIES), key=likeness)
