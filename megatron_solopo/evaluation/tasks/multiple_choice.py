"""Multiple-choice questions in MMLU's format, answered by log-prob: a guard of what a model knows without a context.

The prompt is MMLU's (arXiv 2009.03300, ``gen_prompt`` and ``format_example`` of evaluate.py), without examples and
without a chat template, and the answer is the letter with the highest log-prob after it: what lm-evaluation-harness
computes for its task ``mmlu`` with no examples. As there, one space precedes the subject; evaluate.py writes two.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter

from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.data.validation import Text, validated
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.items import Item
from megatron_solopo.evaluation.tasks._task import Setting, Task

LETTERS = "ABCDEFGHIJ"
FORM = "MMLU's CSV (question, choices, letter; no head), or records {question, choices, answer, subject}"


@dataclass(frozen=True)
class _Record:
    """``answer`` is the index of the right choice, or its letter."""

    question: Text
    choices: list[str]
    answer: Annotated[str, BeforeValidator(lambda value: LETTERS[value] if isinstance(value, int) else value)]
    subject: str = ""


_RECORD = TypeAdapter(_Record)


def _records(file: str) -> Iterator[tuple[str, _Record]]:
    """Yields the questions of a file with their places."""
    if Path(file).suffix != ".csv":
        for where, record in read_records([file]):
            yield where, validated(_RECORD, record, where)
        return
    subject = Path(file).stem.rsplit("_", 1)[0].replace("_", " ")  # high_school_physics_test.csv
    with Path(file).open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if len(row) < 4:
                raise UserError(
                    "field-missing", f"{file}:{number}: has {len(row)} cells; set question, at least 2 choices, letter"
                )
            yield f"{file}:{number}", _Record(row[0], row[1:-1], row[-1].strip(), subject)


def question_text(question: str, choices: list[str], subject: str) -> str:
    """Returns the prompt of a question, which ends before the letter."""
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    head = f"The following are multiple choice questions (with answers){about}."
    return f"{head}\n\n{question.strip()}\n{listed}\nAnswer:"


def _items(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    tokenizer = setting.tokenizer
    start = tokenizer("", add_special_tokens=True)["input_ids"]  # the start of a text, where the model has a token
    items = []
    for number, (where, read) in enumerate(_records(file)):
        if number == setting.limit:
            break
        letters = LETTERS[: len(read.choices)]
        if not 2 <= len(read.choices) <= len(LETTERS) or read.answer not in tuple(letters):
            raise UserError(
                "field-value",
                f"{where}: answer {read.answer!r} of {len(read.choices)} choices; set 2 to {len(LETTERS)} choices and "
                "the letter of one",
            )
        prompt = list(start) + encode(tokenizer, question_text(read.question, read.choices, read.subject))
        choices = tuple(encode(tokenizer, f" {letter}") for letter in letters)
        items.append(Item(str(number), read.question, [read.answer], [prompt], choices=choices))
    return items


TASKS = [Task("multiple_choice", ("choice",), 1, _items, file=FORM, sized=False)]
