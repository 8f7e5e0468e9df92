"""The first pass over a question set: everything checked once, questions and paragraphs on disk for the second."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_solopo.data.building.pool import CountTexts, open_writer, write_pool
from megatron_solopo.data.building.sources import EXCLUDED, LeftOut, read_pool, read_questions
from megatron_solopo.data.building.split import near_duplicates, validation_members
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar, reporting

_TEXTS, _OFFSETS, _SIDES = "questions.jsonl", "questions.npy", "sides.npy"


@dataclass(frozen=True)
class Ingested:
    """The result of the first pass; ``left_out`` are (id, reason)."""

    questions: int
    paragraphs: int
    left_out: list[tuple[str, str]]
    notes: list[str]


def ingest(
    folder: Path,
    *,
    source: str,
    inputs: Iterable[str],
    pool: Iterable[str],
    prompt_format: PromptFormat,
    count: CountTexts | None,
    labelled: bool = True,
    exclude: frozenset[str] = frozenset(),
    limit: int | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Ingested:
    """Reads all inputs once and leaves questions and pool in ``folder``, in memory that grows by bytes a question.

    Args:
        source, inputs, labelled, exclude: as in `sources.read_questions`.
        pool: inputs of further distractors.
        count: for the paragraphs' lengths; None for sizes in documents.
        limit: build contexts for the first so many; all of them are distractors. What cannot be used after those is not
            listed as left out.

    Raises:
        UserError: as `sources.read_questions`.
    """
    left_out = LeftOut()
    writer = open_writer(folder)
    sizes, ids, texts = array("q"), [], []
    reported = None  # entries of `left_out` up to the last question of the limit
    with (folder / _TEXTS).open("wb") as out:
        questions = read_questions(source, inputs, left_out, labelled=labelled, exclude=exclude)
        for question in ProgressBar(questions, desc="reading", unit="question", leave=False):
            for paragraph in question.paragraphs:
                writer.add(paragraph)
            if limit is None or len(sizes) < limit:
                line = _dump(question)
                out.write(line)
                sizes.append(len(line))
                if len(sizes) == limit:
                    reported = len(left_out.entries)
                if validation_fraction:
                    ids.append(question.id)
                    texts.append(question.question)
    for paragraph in ProgressBar(read_pool(pool), desc="reading the pool", unit="paragraph", leave=False):
        writer.add(paragraph)
    total = len(sizes)
    np.save(folder / _OFFSETS, np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]).astype(np.int64))
    sides = np.zeros(total, np.uint8)
    notes = []
    if exclude:
        present = len({name for name, reason in left_out.entries if reason == EXCLUDED})
        notes.append(f"ids to exclude: {present} of {len(exclude)} are in the input")
    if validation_fraction:
        with reporting("finding near-duplicates"):
            groups = near_duplicates(texts)
            chosen = validation_members(ids, groups, validation_fraction, seed)
        sides[list(chosen)] = 1
        notes.append(
            f"validation: {len(chosen)} of {total} questions; {total - len(set(groups))} near-duplicates stay on the "
            "side of the question they repeat"
        )
        if not 0 < len(chosen) < total:
            raise UserError(
                "validation-split-empty",
                f"--validation-fraction {validation_fraction}: of {total} questions {len(chosen)} would be for "
                "validation; set a fraction that leaves questions on both sides",
            )
    np.save(folder / _SIDES, sides)
    return Ingested(total, write_pool(folder, writer, prompt_format, count), left_out.entries[:reported], notes)


class QuestionFile:
    """The questions that `ingest` left in a folder, by index, and whether each is for validation."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / _TEXTS).open("rb")
        self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
        self._sides = np.load(folder / _SIDES, mmap_mode="r")

    def read(self, start: int, stop: int) -> list[tuple[Question, bool]]:
        """Returns the questions from ``start`` up to ``stop``."""
        self._file.seek(int(self._offsets[start]))
        lines = self._file.read(int(self._offsets[stop] - self._offsets[start])).splitlines()
        return [(_load(line), bool(side)) for line, side in zip(lines, self._sides[start:stop], strict=True)]


def _dump(question: Question) -> bytes:
    paragraphs = [[p.title, p.text, p.is_supporting] for p in question.paragraphs]
    record = [question.id, question.question, question.answer, question.answer_aliases, paragraphs]
    return json.dumps(record).encode() + b"\n"


def _load(line: bytes) -> Question:
    question_id, question, answer, aliases, paragraphs = json.loads(line)
    documents = tuple(Paragraph(*paragraph) for paragraph in paragraphs)
    return Question(question_id, question, answer, tuple(aliases), documents)
