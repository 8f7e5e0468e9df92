"""Question sets on disk, read into ``schema.Question`` and checked line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_solopo.data.schema import Paragraph, Question, read_jsonl, require
from megatron_solopo.data.scoring import normalise
from megatron_solopo.errors import UserError


def read_musique(paths: Iterable[str | Path], left_out: Counter[str]) -> Iterator[Question]:
    """Yields the answerable questions of MuSiQue JSONL files, in file order.

    A line is ``{id, question, answer, answer_aliases, paragraphs: [{title, paragraph_text,
    is_supporting}], answerable}``; ``answer_aliases`` and ``answerable`` may be absent.

    Args:
        paths: the files; ids must be unique over all of them.
        left_out: counts, by reason, the questions that were read and not yielded; grows while reading.

    Raises:
        UserError: naming ``file:line`` and the field that is missing or of the wrong kind.
    """
    seen: dict[str, str] = {}
    for path in paths:
        for where, record in read_jsonl(path):
            question_id = str(require(record, "id", (str, int), where))
            if question_id in seen:
                raise UserError(
                    f"{where}: the id {question_id!r} was used before at {seen[question_id]}; ids must be unique"
                )
            seen[question_id] = where
            if not _flag(record, "answerable", where, default=True):
                left_out["not answerable from its paragraphs"] += 1
                continue
            aliases = record.get("answer_aliases") or []
            if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
                raise UserError(f"{where}: the field 'answer_aliases' must be a list of texts")
            question = Question(
                id=question_id,
                question=_text(record, "question", where),
                answer=_text(record, "answer", where),
                answer_aliases=tuple(alias for alias in aliases if alias.strip()),
                paragraphs=tuple(_musique_paragraphs(require(record, "paragraphs", list, where), where)),
            )
            if not any(paragraph.is_supporting for paragraph in question.paragraphs):
                left_out["no paragraph is marked as supporting"] += 1
            elif not normalise(question.answer):
                left_out["the answer is only articles or punctuation, so no response can be scored"] += 1
            else:
                yield question


def read_pool(paths: Iterable[str | Path]) -> Iterator[Paragraph]:
    """Yields distractor paragraphs from JSONL files of ``{title, text}``.

    Raises:
        UserError: naming ``file:line`` and the field.
    """
    for path in paths:
        for where, record in read_jsonl(path):
            yield Paragraph(title=require(record, "title", str, where), text=_text(record, "text", where))


SOURCES: dict[str, Callable[[Iterable[str | Path], Counter[str]], Iterator[Question]]] = {"musique": read_musique}
"""Every reader by the name ``--source`` knows it under."""


def _musique_paragraphs(records: list[Any], where: str) -> Iterator[Paragraph]:
    if not records:
        raise UserError(f"{where}: the field 'paragraphs' is empty; a question needs at least its supporting paragraph")
    for index, record in enumerate(records):
        place = f"{where}, paragraphs[{index}]"
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object, found {type(record).__name__}")
        yield Paragraph(
            title=require(record, "title", str, place),
            text=_text(record, "paragraph_text", place),
            is_supporting=_flag(record, "is_supporting", place),
        )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = require(record, key, str, where)
    if not value.strip():
        raise UserError(f"{where}: the field '{key}' is empty; fill it in or remove the line")
    return value


def _flag(record: dict[str, Any], key: str, where: str, default: bool | None = None) -> bool:
    if default is not None and key not in record:
        return default
    return require(record, key, bool, where)
