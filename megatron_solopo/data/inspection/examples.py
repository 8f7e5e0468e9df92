"""What a data file holds, one example at a time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_solopo.data.answers import find_in_document, stated_golds
from megatron_solopo.data.building.contexts import ContextPair, read_contexts
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.files.records import is_parquet
from megatron_solopo.data.formats import CHOSEN, REJECTED
from megatron_solopo.data.schema import DocumentSpan, Message, PreferenceGroup, read_groups
from megatron_solopo.data.text.prompt import DEFAULT_DOCUMENT_TEMPLATE
from megatron_solopo.data.tokenized.token_store import is_store
from megatron_solopo.errors import UserError

SHORT, LONG = "short", "long"
CONTEXTS = (SHORT, LONG)


@dataclass(frozen=True)
class Example:
    """A preference group, or the contexts of a question before there are responses.

    Attributes:
        index: its place in the file, from 0.
        chats: "short" and, where there is one, "long" -> messages.
        spans: "short", "long" -> the documents of the last message; empty where not known.
        group: the preference group; None for contexts.
        recorded: "short", "long" -> prompt tokens recorded in the file; empty for groups.
    """

    index: int
    id: str
    question: str
    answers: list[str]
    source: str
    chats: dict[str, list[Message]]
    spans: dict[str, list[DocumentSpan]]
    scores: dict[str, float] = field(default_factory=dict)
    group: PreferenceGroup | None = None
    recorded: dict[str, int] = field(default_factory=dict)

    def content(self, context: str) -> str:
        """Returns the text of the last message, which holds documents and question."""
        return self.chats[context][-1]["content"]

    def documents(self, context: str) -> list[tuple[str, bool]]:
        """Returns (text, gold) of each document; none where documents are not known."""
        content = self.content(context)
        return [(content[start:end], gold) for start, end, gold in self.spans[context]]

    @cached_property
    def answer_places(self) -> dict[str, list[list[tuple[int, int]]]]:
        """ "short", "long" -> for each document the places of answers in it.

        Numbers that the document template writes are no part of a document. Where documents are not known, it is one
        list for the whole last message but its question.
        """
        if not stated_golds(self.answers):
            return {name: [[] for _ in self.spans[name] or [None]] for name in self.chats}
        texts = {name: [text for text, _ in self.documents(name)] for name in self.chats}
        numbered = without_numbers(list(texts.values()))
        places = {}
        for name, documents in zip(texts, numbered, strict=True):
            searched = documents or [_without_question(self.content(name), self.question)]
            places[name] = [find_in_document(text, self.answers) for text in searched]
        return places


_HEAD = re.escape(DEFAULT_DOCUMENT_TEMPLATE.partition("{number}")[0])


def _blank(text: str, spans: Iterable[tuple[int, int]]) -> str:
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def without_numbers(contexts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rendered documents with what the template wrote for ``{number}`` blanked, by as many NUL characters.

    Files do not record the template. What it wrote is the documents' numbers, from 1, in the same surroundings in
    all documents; for a single one it is the default template.

    Args:
        contexts: the documents of each context; one template wrote them all.
    """
    documents = [(number, text) for context in contexts for number, text in enumerate(context, 1)]
    if len(documents) == 1:
        head = [match.span(1) for match in re.finditer(rf"\A{_HEAD}(1)(?!\d)", documents[0][1])]
        return [[_blank(text, head) for text in context] for context in contexts]
    places = [[match.span() for match in re.finditer(rf"(?<!\d){number}(?!\d)", text)] for number, text in documents]
    written: list[set[tuple[int, int]]] = [set() for _ in documents]
    for before in range(8, 0 if len(documents) > 3 else 1, -1):
        if before < 3 and any(written):  # so short surroundings may be common by chance
            break
        around: list[dict[tuple[str, str], set[tuple[int, int]]]] = [defaultdict(set) for _ in documents]
        for of_text, (_, text), spans in zip(around, documents, places, strict=True):
            for start, end in spans:
                of_text[text[max(start - before, 0) : start], text[end : end + 1]].add((start, end))
        for surroundings in set.intersection(*map(set, around)) if around else ():
            for known, of_text in zip(written, around, strict=True):
                known |= of_text[surroundings]
    blanked = iter([_blank(text, spans) for (_, text), spans in zip(documents, written, strict=True)])
    return [[next(blanked) for _ in context] for context in contexts]


def _without_question(content: str, question: str) -> str:
    """Returns a message whose documents are not known, without its question and the default template's numbers."""
    place = content.rfind(question) if question else -1
    spans = [(place, place + len(question))] if place >= 0 else []
    return _blank(content, [*spans, *(m.span(1) for m in re.finditer(rf"(?m)^{_HEAD}(\d+)(?!\d)", content))])


def _finite(value: object) -> float | None:
    """Returns a finite number as a float; None for anything else, whole numbers beyond a float's range too."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _from_group(index: int, group: PreferenceGroup) -> Example:
    chats = {SHORT: group.short_messages} | ({LONG: group.long_messages} if group.long_messages else {})
    spans = {SHORT: group.short_spans, LONG: group.long_spans}
    scores = {name: value for name, one in group.scores.items() if (value := _finite(one)) is not None}
    answers = [str(answer) for answer in group.answers]
    return Example(index, group.id, group.question, answers, group.source, chats, spans, scores, group)


def _from_contexts(index: int, pair: ContextPair) -> Example:
    chats, spans = {SHORT: pair.short_messages, LONG: pair.long_messages}, {SHORT: pair.short_spans}
    recorded = {SHORT: pair.short_tokens, LONG: pair.long_tokens}
    spans[LONG] = pair.long_spans
    return Example(index, pair.id, pair.question, pair.answers, pair.source, chats, spans, recorded=recorded)


def holds_groups(path: str | Path) -> bool:
    """Whether a file holds preference groups (else the contexts that prepare-data writes), by its first record.

    Raises:
        UserError: it is missing, empty, or holds something else, which is named with the command that reads it.
    """
    if is_store(path):
        raise UserError(
            "not-a-file", f"--data {path}: is a folder; set the JSONL or Parquet file from which it was written"
        )
    if is_parquet(path):
        return True
    where, record = next(read_records([path]), (None, None))
    if record is None:
        raise UserError(
            "data-empty", f"--data {path}: holds no record; set groups of build-pairs or contexts of prepare-data"
        )
    if {*CHOSEN, *REJECTED} & record.keys():
        return True
    if {"short_messages", "short_tokens"} <= record.keys():
        return False
    for key, what in (
        ("paragraphs", "questions; set the contexts that 'solopo prepare-data --data' writes of them"),
        ("responses", "responses; set the groups that 'solopo build-pairs --responses' writes of them"),
        ("messages", "conversations for --objective sft, which have no contexts to compare; set preference groups"),
    ):
        if key in record:
            raise UserError("data-kind", f"{where}: this file holds {what}")
    fields = ", ".join(sorted(record)) or "none"
    raise UserError(
        "data-kind",
        f"{where}: neither a preference group nor contexts (fields found: {fields}); see docs/data-storage.md",
    )


def read_examples(path: str | Path) -> Iterator[Example]:
    """Yields the examples of a file of groups (in the forms of `formats`) or of contexts, one in memory at a time.

    Raises:
        UserError: naming file:line and the field.
    """
    if holds_groups(path):
        yield from itertools.starmap(_from_group, enumerate(read_groups(path)))
    else:
        yield from itertools.starmap(_from_contexts, enumerate(read_contexts(path)))


def sample(examples: Iterable[Example], size: int, seed: int) -> list[Example]:
    """Returns a uniform sample of a stream of unknown length, in its order; no more than ``size`` are kept at a
    time."""
    draw = random.Random(seed)
    return sorted(heapq.nsmallest(size, examples, key=lambda _: draw.random()), key=lambda example: example.index)


def depths(spans: Sequence[DocumentSpan]) -> list[float]:
    """Returns where each gold document starts: 0 as the first document does, 1 as the last, by characters between them.

    Empty where there is one document or none.
    """
    if len(spans) < 2 or spans[-1][0] == spans[0][0]:
        return []
    first, last = spans[0][0], spans[-1][0]
    return [(start - first) / (last - first) for start, _, gold in spans if gold]
