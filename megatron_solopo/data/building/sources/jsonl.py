"""A user's questions and documents, in this project's form, which a user's function returns too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, TypeAdapter

from megatron_solopo.data.building.sources._source import Mark, NonEmpty, Record, Source, make_question
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import Text, empty, validated, wrong_type
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class _Document:
    text: Text
    title: str | None = None
    is_supporting: Mark | None = None


def _document(value: object) -> object:
    if not isinstance(value, str | dict):
        raise wrong_type(f"must be a text or an object, found {type(value).__name__}")
    return {"text": value} if isinstance(value, str) else value


def _answers(value: list[str]) -> list[str]:
    if not value:
        raise empty("must be a non-empty list of texts")
    return value


@dataclass(frozen=True)
class _Record:
    documents: NonEmpty[Annotated[_Document, BeforeValidator(_document)]]
    answer: object = None
    answers: Annotated[list[str], AfterValidator(_answers)] | None = None


_RECORD = TypeAdapter(_Record)


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    read = validated(_RECORD, record, where)
    if labelled and all(document.is_supporting is None for document in read.documents):
        raise UserError(
            "evidence-missing",
            f"{where}: no document has 'is_supporting', so the evidence is not known; mark it, or let "
            "prepare-data find it with --evidence bm25",
        )
    if read.answers and read.answer is None:
        record = {**record, "answer": read.answers[0], "answer_aliases": read.answers[1:]}
    paragraphs = [Paragraph(one.title or "", one.text, bool(one.is_supporting)) for one in read.documents]
    return make_question(record, question_id, where, paragraphs)


SOURCE = Source(
    name="jsonl",
    form="`question`, `answer` (and `answer_aliases`) or `answers`, `documents` [text, or `{text, title, "
    "is_supporting}`, the title optional], `id` (default: derived from the content)",
    question=_question,
    fields=frozenset({"question", "documents"}),
)
