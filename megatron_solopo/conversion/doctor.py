"""`solopo convert-checkpoint doctor MODEL`: what of a Hugging Face folder is not understood, and the nearest family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_solopo.conversion.carried import carried_names
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model.families.fields import unknown_fields
from megatron_solopo.model.families.registry import FAMILIES, MULTIMODAL, family_of
from megatron_solopo.model.hf_config import read_config_file
from megatron_solopo.model_folder import check_is_folder

_NUMBERS = ((re.compile(r"\blayers\.\d+\."), "layers.{layer}."), (re.compile(r"\bexperts\.\d+\."), "experts.{expert}."))

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
        lines.append(f"model_type {kind!r} is of no family; the nearest is {name}")
    refusal, values, hf_config = None, document, None
    if name == kind:
        try:
            hf_config = read_config_file(path)
            values = vars(hf_config)
            family_of(hf_config)
        except UserError as error:
            refusal, hf_config = error.message, None
    values = {field: value for field, value in values.items() if field not in _OLDER}
    fields = unknown_fields(values, FAMILIES[name].fields)
    lines += [f"config.json: {field} = {value!r} is read by no code of {name}" for field, value in fields.items()]
    if refusal is not None and not any(f"config.json: {field} = " in refusal for field in fields):
        lines.append(refusal)
    expected = _kinds_of(name, bool(document.get("tie_word_embeddings")), hf_config)
    carried = carried_names(reader, hf_config) if reader and hf_config else []
    if carried:
        lines.append(f"weights: {len(carried)} beside the trained model are carried through, such as {carried[0]}")
        kinds = {_kind(name) for name in reader.names() - {*carried}} if reader else kinds
    if kinds:
        both = len(kinds & expected)
        lines += [f"the weights {one} are in no table of {name}" for one in sorted(kinds - expected)]
        lines += [f"the weights {one}, which {name} has, are missing" for one in sorted(expected - kinds)]
        lines.append(f"weights: {both} of {len(kinds)} kinds of tensors are those of {name}")
    else:
        lines.append("weights: the folder holds none")
    understood = name == kind and not fields and refusal is None and kinds <= expected
    if understood:
        lines.append(f"all fields are understood: {name}")
    return Diagnosis(lines, understood)


def _reader(folder: Path) -> TensorReader | None:
    """Returns a folder's weights; None if it has none."""
    try:
        return TensorReader(folder)
    except UserError as error:
        if error.code != "weights-missing":
            raise
        return None


def _kind(name: str) -> str:
    for pattern, replacement in _NUMBERS:
        name = pattern.sub(replacement, name)
    return name


def _kinds_of(family: str, tied: bool, hf_config: PretrainedConfig | None = None) -> set[str]:
    """Returns the names of a family's tensors with placeholders for the numbers of layers and experts.

    Args:
        hf_config: of the model; without it the class's defaults decide which optional tensors there are.
    """
    hf_config = hf_config or CONFIG_MAPPING[family](tie_word_embeddings=tied)
    return {name for entry in FAMILIES[family].table(hf_config, hf_config.vocab_size) for name in entry.hf}


def _nearest(document: dict[str, Any], kinds: set[str]) -> str:
    """Returns the family with most of a folder's tensors, or without weights with most fields, for its own number."""

    def likeness(family: str) -> float:
        own, theirs = kinds, _kinds_of(family, bool(document.get("tie_word_embeddings")))
        if not kinds:
            own, theirs = {*document}, {*CONFIG_MAPPING[family]().to_dict()}
        return len(own & theirs) / len(own | theirs)

    return max(sorted(FAMILIES), key=likeness)
