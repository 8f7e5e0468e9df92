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
from megatron_solopo.data.files.records import Part, read_records
from megatron_solopo.errors import UserError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

ROLES = ("system", "user", "assistant", "tool")

_KINDS = (
    ({"short_messages", "chosen", "rejected"}, "preference groups, as build-pairs writes them"),
    ({"short_messages", "long_messages", "short_tokens"}, "contexts, as prepare-data writes them"),
    ({"id", "responses"}, "responses, as sample-responses writes them"),
    ({"settings"}, "an unfinished file of sample-responses; repeat that command to complete it"),
    ({"question", "paragraphs"}, "questions of --source musique"),
    ({"question", "context", "supporting_facts"}, "questions of --source hotpotqa or 2wiki"),
    ({"question", "documents"}, "questions of --source jsonl"),
    ({"prompt", "chosen", "rejected"}, "TRL's preference data"),
    ({"id", "messages"}, "conversations for --objective sft"),
)
"""Fields that tell what a record is, for a file that was given in another one's place."""

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


def require(record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``record[key]``, checked to be there and of the kind.

    Raises:
        UserError: naming ``where`` and the key.
    """
    if key not in record:
        known = ", ".join(sorted(record)) or "none"
        kind_found = next((words for fields, words in _KINDS if fields <= record.keys()), None)
        hint = f"; these are {kind_found}" if kind_found else ""
        raise UserError(f"{where}: the field '{key}' is missing (fields found: {known}){hint}")
    value = record[key]
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise UserError(f"{where}: the field '{key}' must be {wanted}, found {type(value).__name__}")
    return value


def check_messages(value: Any, key: str, where: str) -> list[Message]:
    """A chat: a non-empty list of ``{role, content}``."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the field '{key}' must be a non-empty list of {{role, content}} messages")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: {key}[{index}] must be an object with a text 'content'")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: {key}[{index}] has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
    return value


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
    """Reads preference groups, JSONL or Parquet; TRL's ``prompt / chosen / rejected`` is accepted too.

    In TRL's form ``prompt`` is a text or a chat, ``chosen`` and ``rejected`` a text or a chat of one
    assistant message; such a group has no long context.

    Args:
        part: read only this part of the file; ids are then unique within it.
    """
    seen: dict[str, str] = {}
    for where, record in read_records(path, part):
        if "prompt" in record and "short_messages" not in record:
            record = _from_trl(record, where)
        short = check_messages(require(record, "short_messages", list, where), "short_messages", where)
        long = record.get("long_messages")
        if long is not None:
            check_messages(long, "long_messages", where)
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


def read_conversations(path: str | Path, part: Part | None = None) -> Iterator[Conversation]:
    """Reads ``{id, messages}`` records for ``--objective sft``, all or those of a part of the file."""
    for where, record in read_records(path, part):
        messages = check_messages(require(record, "messages", list, where), "messages", where)
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


def _from_trl(record: dict[str, Any], where: str) -> dict[str, Any]:
    prompt = require(record, "prompt", (str, list), where)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    converted = {**record, "short_messages": chat}
    for key in ("chosen", "rejected"):
        value = require(record, key, (str, list), where)
        if isinstance(value, list):
            answer = check_messages(value, key, where)
            if len(answer) != 1 or answer[0]["role"] != "assistant":
                raise UserError(
                    f"{where}: '{key}' must be one assistant message after 'prompt'; "
                    f"found {', '.join(message['role'] for message in answer)}"
                )
            converted[key] = answer[0]["content"]
    return converted
