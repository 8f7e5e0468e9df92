"""A user's own questions and documents, in our own form; a user's function gives records of it too."""

from __future__ import annotations

from megatron_solopo.data.building.sources._source import (
    Record,
    Source,
    flag_of,
    list_of,
    make_question,
    text_of,
    title_of,
)
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.errors import UserError


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    paragraphs = []
    marked = False
    for index, item in enumerate(list_of(record, "documents", where)):
        place = f"{where}, documents[{index}]"
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict):
            raise UserError(f"{place}: expected a text or an object, found {type(item).__name__}")
        text = text_of(item, "text", place)
        marked = marked or item.get("is_supporting") is not None
        supporting = item.get("is_supporting") is not None and flag_of(item, "is_supporting", place)
        paragraphs.append(Paragraph(title_of(item, place), text, supporting))
    if labelled and not marked:
        raise UserError(
            f"{where}: no document has 'is_supporting', so the evidence is not known; mark it, or let "
            "prepare-data find it with --evidence bm25"
        )
    answers = record.get("answers")
    if answers is not None and "answer" not in record:
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise UserError(f"{where}: the field 'answers' must be a non-empty list of texts")
        record = {**record, "answer": answers[0], "answer_aliases": answers[1:]}
    return make_question(record, question_id, where, paragraphs)


SOURCE = Source(
    name="jsonl",
    form="`question`, `answer` (and `answer_aliases`) or `answers`, `documents` [text, or `{text, title, "
    "is_supporting}`, the title optional], `id` (without one it is made of the content)",
    question=_question,
    fields=frozenset({"question", "documents"}),
)
