"""What is stored on disk: questions with documents, preference groups, conversations.

Every reader names ``file:line`` (in Parquet ``file:row N``) in its errors, and every record keeps the ``id`` it came
with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from megatron_solopo.data.files import inputs
from megatron_solopo.data.files.records import Part, Record, read_records
from megatron_solopo.data.formats import as_conversation, as_group
from megatron_solopo.data.validation import (
    Chat,
    Day,
    DocumentSpan,
    Message,
    Name,
    Printed,
    Response,
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
    """One training example: a question on a short and a long context, and two responses.

    ``long_messages`` may be absent (plain preference data, ``--context-mode short`` only).

    Attributes:
        short_spans, long_spans: the documents of the last message of each chat, in order; empty where they are unknown.
        chosen_ids, rejected_ids: the token ids that were sampled, without the end-of-turn token; None where only
            the text is stored.
        chat_template_date: the day that the chat template printed when the responses were sampled; None where it
            prints none, or where it is unknown.
    """

    id: Name
    short_messages: Chat
    long_messages: Chat | None
    chosen: Response
    rejected: Response
    answers: list[object] = field(default_factory=list)
    scores: dict[str, object] = field(default_factory=dict)
    source: Printed = ""
    question: str = ""
    short_spans: list[DocumentSpan] = field(default_factory=list)
    long_spans: list[DocumentSpan] = field(default_factory=list)
    chosen_ids: TokenIds | None = None
    rejected_ids: TokenIds | None = None
    chat_template_date: Day | None = None


_GROUP = TypeAdapter(PreferenceGroup)


@dataclass(frozen=True)
class Conversation:
    """One example for ``--objective sft``; every assistant message is trained on."""

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
        record = as_group(record, where)
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
        check_unique(group.id, where, seen)
        yield group
    if useless:
        raise UserError("pair-without-preference", _useless_text(useless, f"{path}:"))


def _without_preference(record: Record) -> str | None:
    """Why a group's two responses hold no preference; None where they do, or where they are not texts."""
    responses = {name: record.get(name) for name in ("chosen", "rejected")}
    texts = {name: text for name, text in responses.items() if isinstance(text, str)}
    if len(texts) < len(responses):
        return None
    if empty := [name for name, text in texts.items() if not text.strip()]:
        return f"'{empty[0]}' is empty; a response needs at least one word"
    same = responses["chosen"] == responses["rejected"]
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
        yield validated(_CONVERSATION, record | {"messages": messages}, where, id=where)
