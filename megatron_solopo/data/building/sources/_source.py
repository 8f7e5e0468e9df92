"""What a source is, and how the fields of its records are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_solopo.data.fields import require
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.errors import UserError

Record = dict[str, Any]


class CannotUse(Exception):
    """A well-formed record that no example can be made of; the message is the reason to count."""


@dataclass(frozen=True)
class Source:
    """One form of questions.

    Attributes:
        name: what ``--source`` knows it under.
        form: the records it reads, in Markdown, for ``--help`` and the documentation.
        question: (record, id, where, labelled) -> question. ``labelled``: the evidence must be marked; else marks are
            read where there are any. Raises `UserError`, which begins with ``where``, and `CannotUse`. None where no
            question can be made of such records; ``form`` then says what to do with them.
        fields: the fields that tell its records from others, for a file that was given in another one's place.
        convert: (record, where) -> the record that ``question`` reads, made before the id is read.
        origin: what errors add to the place of a record.
        digest: of a user's code, so that unfinished work of an earlier version is not resumed.
    """

    name: str
    form: str
    question: Callable[[Record, str, str, bool], Question] | None
    fields: frozenset[str] = frozenset()
    convert: Callable[[Record, str], Record] = lambda record, where: record
    origin: str = ""
    digest: str = ""


def make_question(record: Record, question_id: str, where: str, paragraphs: list[Paragraph]) -> Question:
    """The question of a record that has ``question``, ``answer`` and perhaps ``answer_aliases``."""
    aliases = record.get("answer_aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise UserError(f"{where}: the field 'answer_aliases' must be a list of texts")
    return Question(
        id=question_id,
        question=text_of(record, "question", where),
        answer=text_of(record, "answer", where),
        answer_aliases=tuple(alias for alias in aliases if alias.strip()),
        paragraphs=tuple(paragraphs),
    )


def list_of(record: Record, key: str, where: str) -> list[Any]:
    """A list that is not empty; one given as JSON text (as tables of the hub do) is decoded."""
    value = require(record, key, (list, str), where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the field '{key}' is a text and no JSON list ({error.msg})") from None
        if not isinstance(value, list):
            raise UserError(f"{where}: the field '{key}' must be list, found {type(value).__name__} in its text")
    if not value:
        raise UserError(f"{where}: the field '{key}' is empty; a question needs at least its supporting document")
    return value


def objects_of(record: Record, key: str, where: str) -> Iterator[tuple[str, Record]]:
    """(where, object) of each element of a list of objects."""
    for index, item in enumerate(list_of(record, key, where)):
        place = f"{where}, {key}[{index}]"
        if not isinstance(item, dict):
            raise UserError(f"{place}: expected an object, found {type(item).__name__}")
        yield place, item


def text_of(record: Record, key: str, where: str) -> str:
    """A text with a visible character."""
    value = require(record, key, str, where)
    if not value.strip():
        raise UserError(f"{where}: the field '{key}' is empty; fill it in or remove the record")
    return value


def title_of(record: Record, where: str) -> str:
    """The title, "" for a document without one."""
    return "" if record.get("title") is None else require(record, "title", str, where)


def flag_of(record: Record, key: str, where: str, default: bool | None = None) -> bool:
    """True or false; None for ``default`` requires the field."""
    if default is not None and record.get(key) is None:
        return default
    if record.get(key) in ("True", "true", "False", "false"):  # a CSV file knows texts only
        return record[key] in ("True", "true")
    return require(record, key, bool, where)
