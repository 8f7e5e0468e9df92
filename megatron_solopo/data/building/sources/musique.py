"""MuSiQue (arXiv 2108.00573), as its authors publish it."""

from __future__ import annotations

from megatron_solopo.data.building.sources._source import (
    CannotUse,
    Record,
    Source,
    flag_of,
    make_question,
    objects_of,
    text_of,
)
from megatron_solopo.data.fields import require
from megatron_solopo.data.schema import Paragraph, Question


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    # MuSiQue-Full has each question twice under one id, once with paragraphs that do not answer it.
    if not flag_of(record, "answerable", where, default=True):
        raise CannotUse("not answerable from its paragraphs")
    paragraphs = [
        Paragraph(
            title=require(item, "title", str, place),
            text=text_of(item, "paragraph_text", place),
            is_supporting=flag_of(item, "is_supporting", place, default=None if labelled else False),
        )
        for place, item in objects_of(record, "paragraphs", where)
    ]
    return make_question(record, question_id, where, paragraphs)


SOURCE = Source(
    name="musique",
    form="`id, question, answer, answer_aliases, answerable, paragraphs [{title, paragraph_text, is_supporting}]`",
    question=_question,
    fields=frozenset({"question", "paragraphs"}),
)
