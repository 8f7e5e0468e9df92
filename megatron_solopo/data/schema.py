"""What is stored on disk: questions with documents, preference groups, conversations.

Every reader names ``file:line`` (in Parquet ``file:row N``) in its errors, and every record keeps the ``id`` it came
with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_solopo import template_kwargs
from megatron_solopo.data.fields import Message, check_messages, require
from megatron_solopo.data.files import inputs
from megatron_solopo.data.files.records import Part, read_records
from megatron_solopo.data.formats import as_conversation, as_group
from megatron_solopo.errors import UserError

DocumentSpan = tuple[int, int, bool]
"""(start, end, gold): a document is ``content[start:end]`` of a chat's last message; gold: it is evidence."""


@dataclass(frozen=True)
class Paragraph:
    title: str
    text: str
    is_supporting: bool = False


@dataclass(frozen=True)
class Question:
    """One question with its documents (MuSiQue's fields)."""

    id: str
    question: str
    answer: str
    answer_aliases: tuple[str, ...]
    paragraphs: tuple[Paragraph, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer, the main one first."""
        return (self.answer, *self.answer_aliases)


@dataclass(frozen=True)
class PreferenceGroup:
    """One training example: a question on a short and a long context, and two responses.

    ``long_messages`` may be absent (plain preference data, ``--context-mode short`` only).

    Attributes:
        short_spans, long_spans: the documents of the last message of each chat, in order; empty where not known.
        chosen_ids, rejected_ids: the token ids that were sampled, without the end-of-turn token; None where only
            the text is known.
        chat_template_date: the day that the chat template printed when the responses were sampled; None where it
            prints none, or where that is not known.
    """

    id: str
    short_messages: list[Message]
    long_messages: list[Message] | None
    chosen: str
    rejected: str
    answers: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    source: str = ""
    question: str = ""
    short_spans: list[DocumentSpan] = field(default_factory=list)
    long_spans: list[DocumentSpan] = field(default_factory=list)
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    chat_template_date: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One example for ``--objective sft``; every assistant message is learnt."""

    id: str
    messages: list[Message]


def check_spans(value: Any, messages: list[Message] | None, key: str, where: str) -> list[DocumentSpan]:
    """Documents of a chat's last message: ``[start, end, gold]`` in order, within its content; None is no document."""
    if value is None:
        return []
    size, last, spans = len(messages[-1]["content"]) if messages else 0, 0, []
    if not isinstance(value, list):
        raise UserError(f"{where}: the field '{key}' must be a list of [start, end, gold]")
    for index, span in enumerate(value):
        if not isinstance(span, list) or [type(part) for part in span] != [int, int, bool]:
            raise UserError(f"{where}: {key}[{index}] must be [start, end, gold], two whole numbers and true or false")
        start, end, gold = span
        if not last <= start <= end <= size:
            raise UserError(
                f"{where}: {key}[{index}] is {start} to {end}; spans must follow each other within the "
                f"{size} characters of the last message"
            )
        last = end
        spans.append((start, end, gold))
    return spans


def check_ids(value: Any, key: str, where: str) -> list[int] | None:
    """Token ids of a response, or None."""
    if value is not None and not (isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value)):
        raise UserError(f"{where}: the field '{key}' must be a non-empty list of token ids")
    return value


def check_day(record: dict[str, Any], where: str) -> str | None:
    """``chat_template_date`` of a record, None where it has none."""
    value = record.get(template_kwargs.DATE)
    return None if value is None else template_kwargs.check_date(value, f"{where}: the field '{template_kwargs.DATE}'")


def read_groups(path: str | Path, part: Part | None = None) -> Iterator[PreferenceGroup]:
    """Reads preference groups, and the forms of preference data that the hub ships (`formats`), which have no long
    context.

    Args:
        path: see `_records`.
        part: read only this part of the file; ids are then unique within it.
    """
    seen: dict[str, str] = {}
    for where, record in _records(path, part):
        record = as_group(record, where)
        short = check_messages(require(record, "short_messages", list, where), "short_messages", where)
        long = record.get("long_messages")
        if long is not None:
            long = check_messages(long, "long_messages", where)
        for key, chat in (("short_messages", short), ("long_messages", long)):
            if chat and chat[-1]["role"] == "assistant":
                raise UserError(f"{where}: {key} ends with an assistant message; it must end where the response starts")
        group = PreferenceGroup(
            id=_id(record, where),
            short_messages=short,
            long_messages=long,
            chosen=_response(record, "chosen", where),
            rejected=_response(record, "rejected", where),
            answers=_optional(record, "answers", list, where) or [],
            scores=_optional(record, "scores", dict, where) or {},
            source=str(record.get("source") or ""),
            question=_optional(record, "question", str, where) or "",
            short_spans=check_spans(record.get("short_spans"), short, "short_spans", where),
            long_spans=check_spans(record.get("long_spans"), long, "long_spans", where),
            chosen_ids=check_ids(record.get("chosen_ids"), "chosen_ids", where),
            rejected_ids=check_ids(record.get("rejected_ids"), "rejected_ids", where),
            chat_template_date=check_day(record, where),
        )
        if group.chosen == group.rejected:
            raise UserError(f"{where}: chosen and rejected are the same text; such a pair teaches nothing, remove it")
        if group.id in seen:
            raise UserError(f"{where}: the id {group.id!r} was used before at {seen[group.id]}; ids must be unique")
        seen[group.id] = where
        yield group


def _records(path: str | Path, part: Part | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a part of a JSONL or Parquet file, or of all that an input of `inputs.read_records` holds,
    which may be ``hub:NAME``, a JSON array, CSV or Arrow too."""
    return inputs.read_records([path]) if part is None else read_records(path, part)


def read_conversations(path: str | Path, part: Part | None = None) -> Iterator[Conversation]:
    """Reads conversations for ``--objective sft`` (`formats`), all or those of a part of the file; see `_records`."""
    for where, record in _records(path, part):
        messages = as_conversation(record, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{where}: 'messages' holds no assistant message, so there is nothing to learn")
        if messages[0]["role"] == "assistant":
            raise UserError(f"{where}: 'messages' starts with an assistant message; a prompt must come first")
        yield Conversation(id=_id(record, where), messages=messages)


def _id(record: dict[str, Any], where: str) -> str:
    return where if record.get("id") is None else str(record["id"])


def _optional(record: dict[str, Any], key: str, kind: type, where: str) -> Any:
    return None if record.get(key) is None else require(record, key, kind, where)


def _response(record: dict[str, Any], key: str, where: str) -> str:
    value = require(record, key, str, where)
    if not value.strip():
        raise UserError(f"{where}: '{key}' is empty; a response needs at least one word")
    return value
