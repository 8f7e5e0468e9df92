"""HotpotQA (arXiv 1809.09600): its own files, and the hub's form of them."""

from __future__ import annotations

from typing import Any

from megatron_solopo.data.building.sources._source import CannotUse, Record, Source, list_of, make_question
from megatron_solopo.data.fields import require
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.errors import UserError


def _question(record: Record, question_id: str, where: str, labelled: bool) -> Question:
    context = _pairs(record, "context", ("title", "sentences"), where)
    marked = labelled or record.get("supporting_facts")
    facts = _pairs(record, "supporting_facts", ("title", "sent_id"), where) if marked else []
    supporting = {title for title, _ in facts}
    paragraphs = []
    for index, (title, sentences) in enumerate(context):
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise UserError(f"{where}: context[{index}] must be a title and a list of sentences")
        # HotpotQA's sentences bring their spaces along, 2WikiMultihopQA's do not.
        text = " ".join(filter(None, (sentence.strip() for sentence in sentences)))
        if text:
            paragraphs.append(Paragraph(title, text, title in supporting))
    if not paragraphs:
        raise UserError(f"{where}: the field 'context' is empty; a question needs at least its supporting document")
    if missing := supporting - {paragraph.title for paragraph in paragraphs}:
        raise CannotUse(f"{len(missing)} titles of supporting_facts are not among the documents")
    return make_question(record, question_id, where, paragraphs)


def _pairs(record: Record, key: str, names: tuple[str, str], where: str) -> list[tuple[str, Any]]:
    """``[[title, value], ...]``, also from ``{names[0]: [...], names[1]: [...]}``."""
    value = record.get(key)
    if isinstance(value, dict):
        columns = [require(value, name, list, f"{where}, {key}") for name in names]
        if len(columns[0]) != len(columns[1]):
            raise UserError(f"{where}: the lists of '{key}' differ in length ({len(columns[0])}, {len(columns[1])})")
        pairs = list(map(list, zip(*columns, strict=True)))
    else:
        pairs = list_of(record, key, where)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{where}: {key}[{index}] must be a pair that begins with a title")
    return [(pair[0], pair[1]) for pair in pairs]


SOURCE = Source(
    name="hotpotqa",
    form="`_id` or `id`, `question, answer, context [[title, [sentence]]], supporting_facts [[title, number]]`; the "
    "hub's form of both lists (`{title: [...], sentences: [...]}`) and lists as JSON text too",
    question=_question,
    fields=frozenset({"question", "context", "supporting_facts"}),
)
