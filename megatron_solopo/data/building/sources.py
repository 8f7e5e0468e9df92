"""Question sets, read into ``schema.Question`` and checked record by record.

Each source is a function from one record to one question; what all have in common (ids, answers that can be
scored, ids to leave out) is checked once, in `read_questions`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_solopo.data.answers import golds
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.schema import Paragraph, Question, require
from megatron_solopo.errors import UserError

NO_EVIDENCE = "no document is marked as supporting"
EXCLUDED = "listed in --exclude-ids"


@dataclass
class LeftOut:
    """What was read and not used: counts by reason, and every id with its reason."""

    counts: Counter[str] = field(default_factory=Counter)
    entries: list[tuple[str, str]] = field(default_factory=list)

    def add(self, question_id: str, reason: str) -> None:
        self.counts[reason] += 1
        self.entries.append((question_id, reason))


class CannotUse(Exception):
    """A well-formed record that no example can be made of; the message is the reason to count."""


def read_questions(
    source: str,
    inputs: Iterable[str | Path],
    left_out: LeftOut,
    *,
    labelled: bool = True,
    exclude: Collection[str] = (),
) -> Iterator[Question]:
    """Yields the questions of the inputs (see `inputs.read_records`), in their order.

    Args:
        source: a name of `SOURCES`, the format of the records.
        inputs: the ids of what is yielded must be unique over all of them.
        left_out: gets the questions that were read and not yielded; grows while reading.
        labelled: the evidence must be marked; else marks are read where there are any.
        exclude: ids that are left out.

    Raises:
        UserError: naming ``file:line`` (or the row) and the field that is missing or of the wrong kind.
    """
    seen: dict[str, str] = {}
    for where, record in read_records(inputs):
        question_id = _id(record, where)
        try:
            if question_id in exclude:
                raise CannotUse(EXCLUDED)
            question = SOURCES[source](record, question_id, where, labelled)
            if labelled and not any(paragraph.is_supporting for paragraph in question.paragraphs):
                raise CannotUse(NO_EVIDENCE)
            if not golds([question.answer]):
                raise CannotUse("the answer has no visible character, so no response can be scored")
        except CannotUse as reason:
            left_out.add(question_id, str(reason))
            continue
        # MuSiQue-Full has each question twice under one id, once with paragraphs that do not answer it.
        if question_id in seen:
            raise UserError(
                f"{where}: the id {question_id!r} was used before at {seen[question_id]}; ids must be unique"
            )
        seen[question_id] = where
        yield question


def read_pool(paths: Iterable[str | Path]) -> Iterator[Paragraph]:
    """Yields distractor paragraphs from records of ``{title?, text}``.

    Raises:
        UserError: naming ``file:line`` and the field.
    """
    for where, record in read_records(paths):
        yield Paragraph(title=_title(record, where), text=_text(record, "text", where))


def _musique(record: dict[str, Any], question_id: str, where: str, labelled: bool) -> Question:
    """``{question, answer, answer_aliases?, answerable?, paragraphs: [{title, paragraph_text, is_supporting}]}``."""
    if not _flag(record, "answerable", where, default=True):
        raise CannotUse("not answerable from its paragraphs")
    paragraphs = [
        Paragraph(
            title=require(item, "title", str, place),
            text=_text(item, "paragraph_text", place),
            is_supporting=_flag(item, "is_supporting", place, default=None if labelled else False),
        )
        for place, item in _objects(record, "paragraphs", where)
    ]
    return _question(record, question_id, where, paragraphs)


def _hotpotqa(record: dict[str, Any], question_id: str, where: str, labelled: bool) -> Question:
    """``{question, answer, context: [[title, [sentence]]], supporting_facts: [[title, sentence number]]}``.

    The hub's form of both lists (``{title: [...], sentences: [...]}``) is read too, and so are lists given as
    JSON text. 2WikiMultihopQA has the same records.
    """
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
    return _question(record, question_id, where, paragraphs)


def _jsonl(record: dict[str, Any], question_id: str, where: str, labelled: bool) -> Question:
    """``{question, answer | answers, documents: [text | {text, title?, is_supporting?}]}``."""
    paragraphs = []
    marked = False
    for index, item in enumerate(_list(record, "documents", where)):
        place = f"{where}, documents[{index}]"
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict):
            raise UserError(f"{place}: expected a text or an object, found {type(item).__name__}")
        text = _text(item, "text", place)
        marked = marked or item.get("is_supporting") is not None
        supporting = item.get("is_supporting") is not None and _flag(item, "is_supporting", place)
        paragraphs.append(Paragraph(_title(item, place), text, supporting))
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
    return _question(record, question_id, where, paragraphs)


SOURCES: dict[str, Callable[[dict[str, Any], str, str, bool], Question]] = {
    "musique": _musique,
    "hotpotqa": _hotpotqa,
    "2wiki": _hotpotqa,
    "jsonl": _jsonl,
}
"""Every format by the name ``--source`` knows it under: (record, id, where, labelled) -> question."""


def _id(record: dict[str, Any], where: str) -> str:
    for key in ("id", "_id"):
        if record.get(key) is not None:
            return str(require(record, key, (str, int), where))
    if "question" in record and "documents" in record:
        # A generic record needs no id; one made of its content stays the same wherever the record stands.
        text = json.dumps([record["question"], record["documents"]], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return require(record, "id", (str, int), where)


def _question(record: dict[str, Any], question_id: str, where: str, paragraphs: list[Paragraph]) -> Question:
    aliases = record.get("answer_aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise UserError(f"{where}: the field 'answer_aliases' must be a list of texts")
    return Question(
        id=question_id,
        question=_text(record, "question", where),
        answer=_text(record, "answer", where),
        answer_aliases=tuple(alias for alias in aliases if alias.strip()),
        paragraphs=tuple(paragraphs),
    )


def _list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    """A list that is not empty; one given as JSON text (as tables of the hub do) is decoded."""
    value = require(record, key, (list, str), where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the field '{key}' is a text and no JSON list ({error.msg})") from None
        if not isinstance(value, list):
            raise UserError(f"{where}: the field '{key}' must be list, found {type(value).__name__} in its text")
    if not value:
        raise UserError(f"{where}: the field '{key}' is empty; a question needs at least its supporting document")
    return value


def _objects(record: dict[str, Any], key: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in enumerate(_list(record, key, where)):
        place = f"{where}, {key}[{index}]"
        if not isinstance(item, dict):
            raise UserError(f"{place}: expected an object, found {type(item).__name__}")
        yield place, item


def _pairs(record: dict[str, Any], key: str, names: tuple[str, str], where: str) -> list[tuple[str, Any]]:
    """``[[title, value], ...]``, also from ``{names[0]: [...], names[1]: [...]}``."""
    value = record.get(key)
    if isinstance(value, dict):
        columns = [require(value, name, list, f"{where}, {key}") for name in names]
        if len(columns[0]) != len(columns[1]):
            raise UserError(f"{where}: the lists of '{key}' differ in length ({len(columns[0])}, {len(columns[1])})")
        pairs = list(map(list, zip(*columns, strict=True)))
    else:
        pairs = _list(record, key, where)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{where}: {key}[{index}] must be a pair that begins with a title")
    return [(pair[0], pair[1]) for pair in pairs]


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = require(record, key, str, where)
    if not value.strip():
        raise UserError(f"{where}: the field '{key}' is empty; fill it in or remove the record")
    return value


def _title(record: dict[str, Any], where: str) -> str:
    """The title, "" for a document without one."""
    return "" if record.get("title") is None else require(record, "title", str, where)


def _flag(record: dict[str, Any], key: str, where: str, default: bool | None = None) -> bool:
    if default is not None and record.get(key) is None:
        return default
    if record.get(key) in ("True", "true", "False", "false"):  # a CSV file knows texts only
        return record[key] in ("True", "true")
    return require(record, key, bool, where)
