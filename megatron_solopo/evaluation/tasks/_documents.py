"""Questions over documents in the files of SQuAD and HotpotQA."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from megatron_solopo import json_text
from megatron_solopo.data.building.sources import LeftOut, read_questions
from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.validation import validated
from megatron_solopo.errors import UserError

SQUAD = "SQuAD's JSON, such as dev-v2.0.json (or v1.1)"
HOTPOTQA = "HotpotQA's JSON, such as hotpot_dev_distractor_v1.json"


@dataclass(frozen=True)
class _Answer:
    text: str


@dataclass(frozen=True)
class _Asked:
    id: str
    question: str
    answers: list[_Answer]
    is_impossible: bool = False


@dataclass(frozen=True)
class _Passage:
    context: str
    qas: list[_Asked]


@dataclass(frozen=True)
class _Article:
    paragraphs: list[_Passage]
    title: str = ""


@dataclass(frozen=True)
class _File:
    data: list[_Article] = field(default_factory=list)


_FILE = TypeAdapter(_File)


def read_squad(path: str) -> list[Question]:
    """Returns the answerable questions of a SQuAD file (arXiv 1606.05250, 1806.03822).

    The paragraphs of a question are those of its article, without titles; its own is marked as supporting.

    Raises:
        UserError: the file is not SQuAD's.
    """
    try:
        record = json.loads(read_text("--tasks", Path(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            "not-json",
            f"--tasks: {path}: not valid JSON ({json_text.fault(error)}, line {error.lineno}); set {SQUAD}",
        ) from None
    if not isinstance(record, dict) or "data" not in record:
        raise UserError("field-missing", f"--tasks: {path}: the field 'data' is missing; set {SQUAD}")
    questions = []
    for article in validated(_FILE, record, f"--tasks: {path}").data:
        texts = list(dict.fromkeys(passage.context for passage in article.paragraphs))
        for passage in article.paragraphs:
            paragraphs = tuple(Paragraph("", text, text == passage.context) for text in texts)
            for asked in passage.qas:
                answers = list(dict.fromkeys(answer.text for answer in asked.answers))
                if answers and not asked.is_impossible:
                    questions.append(Question(asked.id, asked.question, answers[0], tuple(answers[1:]), paragraphs))
    return questions


def read_hotpotqa(path: str, counts: Counter[str]) -> list[Question]:
    """Returns the questions of a HotpotQA file; those without evidence are counted.

    Raises:
        UserError: the file is not HotpotQA's.
    """
    left_out = LeftOut()
    questions = list(read_questions("hotpotqa", [path], left_out))
    counts.update(left_out.counts)
    return questions
