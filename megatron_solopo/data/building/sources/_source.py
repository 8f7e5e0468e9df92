"""What a source is, and the types of fields that several sources have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, TypeAdapter

from megatron_solopo import json_text
from megatron_solopo.data.files.records import Record
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import Flag, Text, empty, validated, wrong


class CannotUse(Exception):
    """A well-formed record that yields no example; the message is the reason to count."""


@dataclass(frozen=True)
class Source:
    """One form of questions.

    Attributes:
        name: its name for ``--source``.
        form: the records it reads, in Markdown, for ``--help`` and the documentation.
        question: (record, id, where, labelled) -> question. ``labelled``: the evidence must be marked; else marks are
            read where there are any. Raises `UserError`, whose message starts with ``where``, and `CannotUse`. None for
            records that hold no questions; ``form`` then explains how to use them.
        fields: the fields that identify its records, for messages about a file passed in another one's place.
        convert: (record, where) -> the record that ``question`` reads, called before the id is read.
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


@dataclass(frozen=True)
class _Asked:
    question: Text
    answer: Text
    answer_aliases: list[str] = field(default_factory=list)


_ASKED = TypeAdapter(_Asked)


def make_question(record: Record, question_id: str, where: str, paragraphs: Sequence[Paragraph]) -> Question:
    """Returns the question of a record that has ``question``, ``answer`` and perhaps ``answer_aliases``."""
    asked = validated(_ASKED, record, where)
    aliases = tuple(alias for alias in asked.answer_aliases if alias.strip())
    return Question(question_id, asked.question, asked.answer, aliases, tuple(paragraphs))


def decoded(value: object) -> object:
    """Returns the value of a JSON text, which tables of the hub have for lists; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise wrong(f"is a text and no JSON list ({json_text.fault(error)} at column {error.colno})") from None


def not_empty[T](value: list[T]) -> list[T]:
    """Refuses an empty list."""
    if not value:
        raise empty("is empty; a question needs at least its supporting document")
    return value


def _flag(value: object) -> object:
    return value in ("True", "true") if value in ("True", "true", "False", "false") else value


type NonEmpty[T] = Annotated[list[T], BeforeValidator(decoded), AfterValidator(not_empty)]
"""A list that is not empty, or the JSON text of one."""
Mark = Annotated[Flag, BeforeValidator(_flag)]
"""Reads true or false, also as text, because a CSV file holds texts only."""
