"""HotpotQA (arXiv 1809.09600): its files, and the hub's form of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter

from megatron_solopo.data.building.sources._source import CannotUse, Record, Source, decoded, make_question
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import validated, wrong
from megatron_solopo.errors import UserError


def _rows(value: object) -> object:
    """``[[title, value], ...]`` of the hub's ``{title: [...], NAME: [...]}``; anything else as it is."""
    value = decoded(value)
    if not isinstance(value, dict):
        return value
    columns = [value[name] for name in ("title", "sentences", "sent_id") if name in value]
    if len(columns) != 2 or not all(isinstance(column, list) for column in columns):
        raise wrong("must have two lists, title and sentences or sent_id")
    if len(columns[0]) != len(columns[1]):
        raise wrong(f"has lists of different lengths ({len(columns[0])}, {len(columns[1])})")
    return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class _Record:
    context: Annotated[list[tuple[str, list[str]]], BeforeValidator(_rows)]
    supporting_facts: Annotated[list[tuple[str, object]], BeforeValidator(_rows)]


_RECORD = TypeAdapter(_Record)


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    read = validated(_RECORD, record, where, **({} if labelled else {"supporting_facts": []}))
    supporting = {title for title, _ in read.supporting_facts}
    paragraphs = []
    for title, sentences in read.context:
        # HotpotQA's sentences bring their spaces along, 2WikiMultihopQA's do not.
        text = " ".join(filter(None, (sentence.strip() for sentence in sentences)))
        if text:
            paragraphs.append(Paragraph(title, text, title in supporting))
    if not paragraphs:
        raise UserError(
            "field-empty", f"{where}: the field 'context' is empty; a question needs at least its supporting document"
        )
    if missing := supporting - {paragraph.title for paragraph in paragraphs}:
        raise CannotUse(f"{len(missing)} titles of supporting_facts are not among the documents")
    return make_question(record, question_id, where, paragraphs)


SOURCE = Source(
    name="hotpotqa",
    form="`_id` or `id`, `question, answer, context [[title, [sentence]]], supporting_facts [[title, number]]`; the "
    "hub's form of both lists (`{title: [...], sentences: [...]}`) and lists as JSON text too",
    question=_question,
    fields=frozenset({"question", "context", "supporting_facts"}),
)
