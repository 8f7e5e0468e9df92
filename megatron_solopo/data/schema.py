"""What is stored on disk: questions with documents, preference groups, conversations.

Every reader names ``file:line`` (in Parquet ``file:row N``) in its errors, and every record keeps the ``id`` it came
with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter

from megatron_solopo.data.files import inputs
from megatron_solopo.data.files.records import Part, Record, read_records
from megatron_solopo.data.formats import as_conversation, as_group, with_tools
from megatron_solopo.data.validation import (
    TOOL_CALLS,
    Answer,
    Chat,
    Day,
    DocumentSpan,
    Message,
    Name,
    Printed,
    Responses,
    SampledIds,
    TokenIds,
    check_unique,
    validated,
)
from megatron_solopo.errors import UserError

NAMED = 20
"""The most places of pairs without a preference that an error names."""


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
    """One training example: a question on a short and a long context, and chosen and rejected responses to it.

    ``long_messages`` may be absent (plain preference data, ``--context-mode short`` only).

    Attributes:
        short_messages, long_messages: the first message has the record's ``tools``, where it has some.
        short_spans, long_spans: the documents of the last message of each chat, in order; empty where they are unknown.
        chosen, rejected: a response, or a list of several; a response is a text, or a list of messages where it has
            several turns or calls tools.
        chosen_ids, rejected_ids: the token ids that were sampled, without the end-of-turn token; None where only
            the text is stored. For several responses a list of these.
        chat_template_date: the day that the chat template printed when the responses were sampled; None where it
            prints none, or where it is unknown.
    """

    id: Name
    short_messages: Chat
    long_messages: Chat | None
    chosen: Responses
    rejected: Responses
    answers: list[object] = field(default_factory=list)
    scores: dict[str, object] = field(default_factory=dict)
    source: Printed = ""
    question: str = ""
    short_spans: list[DocumentSpan] = field(default_factory=list)
    long_spans: list[DocumentSpan] = field(default_factory=list)
    chosen_ids: SampledIds | None = None
    rejected_ids: SampledIds | None = None
    chat_template_date: Day | None = None

    def responses(self, side: str) -> list[Answer]:
        """Returns the responses of ``chosen`` or ``rejected``."""
        return as_list(getattr(self, side))

    def sampled_ids(self, side: str) -> list[TokenIds | None]:
        """Returns the sampled token ids of each of `responses`."""
        ids, count = getattr(self, f"{side}_ids"), len(self.responses(side))
        if ids is None:
            return [None] * count
        return ids if isinstance(getattr(self, side), list) and ids and not isinstance(ids[0], int) else [ids]


def as_list(responses: Answer | list[Answer]) -> list[Answer]:
    """Returns the responses of a field that may hold one alone."""
    several = isinstance(responses, list) and not isinstance(responses[0], dict)
    return cast(list[Answer], responses) if several else [cast(Answer, responses)]


def text_of(response: Answer) -> str:
    """Returns a response as a text to read: that of its turns has their roles, tool calls as JSON."""
    if isinstance(response, str):
        return response
    lines = []
    for number, turn in enumerate(response):
        calls = [json.dumps(call, ensure_ascii=False) for call in turn.get(TOOL_CALLS, ())]
        said = "\n".join(filter(None, [turn["content"], *calls]))
        lines.append(f"[{turn['role']}] {said}" if number or len(response) > 1 else said)
    return "\n".join(lines)


_GROUP = TypeAdapter(PreferenceGroup)


@dataclass(frozen=True)
class Conversation:
    """One example for ``--objective sft``; every assistant message is trained on. The first message has the record's
    ``tools``, where it has some."""

    id: Name
    messages: Chat


_CONVERSATION = TypeAdapter(Conversation)


def check_spans(spans: Sequence[DocumentSpan], messages: list[Message] | None, key: str, where: str) -> None:
    """Refuses documents that do not follow each other within a chat's last message."""
    size, last = len(messages[-1]["content"]) if messages else 0, 0
    for index, (start, end, _) in enumerate(spans):
        if not last <= start <= end <= size:
            raise UserError(
                "field-value",
                f"{where}: {key}[{index}] is {start} to {end}; spans must follow each other within the "
                f"{size} characters of the last message",
            )
        last = end


def read_groups(path: str | Path, part: Part | None = None) -> Iterator[PreferenceGroup]:
    """Reads preference groups, and the forms of preference data that the hub ships (`formats`), which have no long
    context.

    Args:
        path: see `_records`.
        part: read only this part of the file; ids are then unique within it.

    Raises:
        UserError: naming ``file:line`` and what is wrong there. One error names all pairs without a preference, for
            large data sets contain them: nothing is yielded after the first, and the file is read to its end.
    """
    seen: dict[str, str] = {}
    useless: list[tuple[str, str]] = []
    for where, record in _records(path, part):
        record = with_tools(as_group(record, where), where)
        if reason := _without_preference(record):
            useless.append((where, reason))
        if useless:
            continue
        group = validated(_GROUP, record, where, id=where, long_messages=None)
        for context in ("short", "long"):
            chat, key = getattr(group, f"{context}_messages"), f"{context}_messages"
            if chat and chat[-1]["role"] == "assistant":
                raise UserError(
                    "messages-order",
                    f"{where}: {key} ends with an assistant message; it must end where the response starts",
                )
            check_spans(getattr(group, f"{context}_spans"), chat, f"{context}_spans", where)
        for side in ("chosen", "rejected"):
            ids, responses = group.sampled_ids(side), group.responses(side)
            if len(ids) != len(responses):
                raise UserError(
                    "field-value",
                    f"{where}: the field '{side}_ids' must have the ids of each of the {len(responses)} responses, or "
                    f"null for it, found {len(ids)}",
                )
        check_unique(group.id, where, seen)
        yield group
    if useless:
        raise UserError("pair-without-preference", _useless_text(useless, f"{path}:"))


def _without_preference(record: Record) -> str | None:
    """Why a group's responses hold no preference; None where they do, or where they are not responses."""
    sides: dict[str, list[object]] = {}
    for name in ("chosen", "rejected"):
        value = record.get(name)
        sides[name] = value if isinstance(value, list) and value and not isinstance(value[0], dict) else [value]
        if not all(isinstance(one, str | list) for one in sides[name]):
            return None
        if any(isinstance(one, str) and not one.strip() for one in sides[name]):
            return f"'{name}' is empty; a response needs at least one word"
        if any(one in sides[name][:number] for number, one in enumerate(sides[name])):
            return f"two {name} responses are the same text; keep one"
    same = any(one in sides["rejected"] for one in sides["chosen"])
    return "chosen and rejected are the same text; such a pair has no preference; remove it" if same else None


def _useless_text(useless: list[tuple[str, str]], prefix: str) -> str:
    """One line about all pairs without a preference."""
    (where, reason), *others = useless
    if not others:
        return f"{where}: {reason}"
    places = [place.removeprefix(prefix) for place, _ in others[:NAMED]]
    more = ", ..." if len(others) > NAMED else ""
    return f"{where}: {reason} ({len(useless):,} such pairs in all, the others at {', '.join(places)}{more})"


def _records(path: str | Path, part: Part | None) -> Iterator[tuple[str, Record]]:
    """Returns (where, record) of a part of a JSONL or Parquet file, or of all that an input of `inputs.read_records`
    holds, which may be ``hub:NAME``, a JSON array, CSV or Arrow too."""
    return inputs.read_records([path]) if part is None else read_records(path, part)


def read_conversations(path: str | Path, part: Part | None = None) -> Iterator[Conversation]:
    """Reads conversations for ``--objective sft`` (`formats`), all or those of a part of the file; see `_records`."""
    for where, record in _records(path, part):
        messages = as_conversation(record, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                "messages-without-answer",
                f"{where}: 'messages' holds no assistant message, so there is nothing to train on",
            )
        if messages[0]["role"] == "assistant":
            raise UserError(
                "messages-order", f"{where}: 'messages' starts with an assistant message; a prompt must come first"
            )
        record = with_tools(record | {"messages": messages}, where)
        yield validated(_CONVERSATION, record, where, id=where)
