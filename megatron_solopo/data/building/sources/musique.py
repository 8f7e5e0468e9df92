"""MuSiQue (arXiv 2108.00573), as its authors publish it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from megatron_solopo.data.building.sources._source import CannotUse, Mark, NonEmpty, Record, Source, make_question
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import Text, validated
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class _Paragraph:
    title: str
    paragraph_text: Text
    is_supporting: Mark | None = None


@dataclass(frozen=True)
class _Record:
    paragraphs: NonEmpty[_Paragraph]
    answerable: Mark = True


_RECORD = TypeAdapter(_Record)


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    read = validated(_RECORD, record, where)
    # MuSiQue-Full has each question twice under one id, once with paragraphs that do not answer it.
    if not read.answerable:
        raise CannotUse("not answerable from its paragraphs")
    unmarked = [index for index, one in enumerate(read.paragraphs) if one.is_supporting is None]
    if labelled and unmarked:
        raise UserError(
            "evidence-missing",
            f"{where}, paragraphs[{unmarked[0]}]: the field 'is_supporting' is missing; mark the evidence",
        )
    paragraphs = [Paragraph(one.title, one.paragraph_text, bool(one.is_supporting)) for one in read.paragraphs]
    return make_question(record, question_id, where, paragraphs)


SOURCE = Source(
    name="musique",
    form="`id, question, answer, answer_aliases, answerable, paragraphs [{title, paragraph_text, is_supporting}]`",
    question=_question,
    fields=frozenset({"question", "paragraphs"}),
)
