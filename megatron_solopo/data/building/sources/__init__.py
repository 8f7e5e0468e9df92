"""Question sets, read into ``schema.Question`` and checked record by record.

Each source is a file of this folder whose ``SOURCE`` declares what it reads; `sources` finds them, so a new source
needs a file and nothing else. `read_questions` checks what all have in common: ids, answers that can
be scored, ids to leave out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, TypeAdapter

from megatron_solopo.data.answers import golds
from megatron_solopo.data.building.sources._source import CannotUse, Record, Source
from megatron_solopo.data.building.sources._user import FORM, user_source
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import Name, Text, check_unique, validated
from megatron_solopo.errors import UserError

DEFAULT = "musique"
"""The source where ``--source`` is not set."""

NO_EVIDENCE = "no document is marked as supporting"
EXCLUDED = "listed in --exclude-ids"


@dataclass
class LeftOut:
    """What was read and not used: counts by reason, and every id with its reason."""

    counts: Counter[str] = field(default_factory=Counter)
    entries: list[tuple[str, str]] = field(default_factory=list)

    def add(self, question_id: str, reason: str) -> None:
        self.counts[reason] += 1
        self.entries.append((question_id, reason))


def sources() -> dict[str, Source]:
    """Returns every source of this folder by name, in the order of the names; files ``_*.py`` hold none."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    loaded = [importlib.import_module(f"{__name__}.{name}").SOURCE for name in names]
    return {source.name: source for source in sorted(loaded, key=lambda source: source.name)}


def load_source(name: str) -> Source:
    """Returns a source of `sources`, or a user's function named ``module:function``.

    Raises:
        UserError: there is no such source, module or function, or its records hold no questions.
    """
    by_name = sources()
    usable = [one.name for one in by_name.values() if one.question]
    source = by_name[name] if name in by_name else user_source(name, usable)
    if source.question is None:
        raise UserError("option-value", f"--source {name}: {source.form}")
    return source


def kinds_of(fields: Collection[str]) -> list[str]:
    """Returns the names of the sources whose records have these fields."""
    return [source.name for source in sources().values() if source.fields and source.fields <= set(fields)]


def forms() -> list[tuple[str, str]]:
    """Returns (name, form in Markdown) of every source and of a user's function, for people."""
    return [*((name, source.form) for name, source in sources().items()), ("module:function", FORM)]


def add_source_option(group: argparse._ArgumentGroup) -> None:
    """``--source``, with the form of each source in its help."""
    listed = "; ".join(f"{name}: {form}" for name, form in forms()).replace("`", "").replace("%", "%%")
    group.add_argument(
        "--source", default=DEFAULT, metavar="NAME", help=f"form of the questions (default: {DEFAULT}). {listed}"
    )


def read_questions(
    source: str,
    inputs: Iterable[str | Path],
    left_out: LeftOut,
    *,
    labelled: bool = True,
    exclude: Collection[str] = (),
) -> Iterator[Question]:
    """Yields the questions of the inputs (see `inputs.read_records`), in their order.

    Args:
        source: see `load_source`.
        inputs: the ids of what is yielded must be unique over all of them.
        left_out: gets the questions that were read and not yielded; grows while reading.
        labelled: the evidence must be marked; else marks are read where there are any.
        exclude: ids that are left out.

    Raises:
        UserError: naming ``file:line`` (or the row) and the field that is missing or of the wrong kind, or an input
            without records.
    """
    read = load_source(source)
    assert read.question is not None, "load_source refuses such"
    seen: dict[str, str] = {}
    for where, record in _some_records(inputs):
        question_id = None
        try:
            converted = read.convert(record, where)
            question_id = _id(converted, where + read.origin)
            if question_id in exclude:
                raise CannotUse(EXCLUDED)
            question = read.question(converted, question_id, where + read.origin, labelled)
            if labelled and not any(paragraph.is_supporting for paragraph in question.paragraphs):
                raise CannotUse(NO_EVIDENCE)
            if not golds([question.answer]):
                raise CannotUse("the answer has no visible character, so no response can be scored")
        except CannotUse as reason:
            left_out.add(question_id or str(record.get("id", record.get("_id", where))), str(reason))
            continue
        check_unique(question_id, where, seen)
        yield question


@dataclass(frozen=True)
class _Document:
    text: Text
    title: str = ""


@dataclass(frozen=True)
class _Named:
    id: Annotated[Name, Field(validation_alias=AliasChoices("id", "_id"))]


_DOCUMENT, _NAMED = TypeAdapter(_Document), TypeAdapter(_Named)


def read_pool(paths: Iterable[str | Path]) -> Iterator[Paragraph]:
    """Yields distractor paragraphs from records of ``{title?, text}``.

    Raises:
        UserError: naming ``file:line`` and the field, or an input without records.
    """
    for where, record in _some_records(paths):
        document = validated(_DOCUMENT, record, where)
        yield Paragraph(document.title, document.text)


def _some_records(inputs: Iterable[str | Path]) -> Iterator[tuple[str, Record]]:
    """Yields the records of `read_records`, and refuses an input without any: a download or an export that failed."""
    for source in inputs:
        record = None
        for record in read_records([source]):
            yield record
        if record is None:
            raise UserError("data-empty", f"{source}: holds no record; replace the file, or leave it out")


def _id(record: Record, where: str) -> str:
    if record.get("id") is None and record.get("_id") is None and {"question", "documents"} <= record.keys():
        # A generic record needs no id; one derived from its content stays the same wherever the record is.
        text = json.dumps([record["question"], record["documents"]], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return validated(_NAMED, record, where).id
