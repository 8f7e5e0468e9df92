"""Sampled responses on disk: the finished file, and the one that a killed run resumes from."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_solopo.data.files.progress import hold, refuse_other_settings
from megatron_solopo.data.files.records import parse_line, read_jsonl
from megatron_solopo.data.schema import check_ids, require
from megatron_solopo.errors import UserError, system_reason


@dataclass(frozen=True)
class Responses:
    """A line of a responses file; ``finished[i]`` says whether ``responses[i]`` ended by itself.

    ``token_ids[i]`` are the ids that were sampled, without the end-of-turn token; None where tokenising the text gives
    those very ids, or where only the text is known. None for the whole line stands for None for each response.
    """

    id: str
    responses: list[str]
    finished: list[bool]
    token_ids: list[list[int] | None] | None = None

    def record(self) -> dict[str, Any]:
        """What is written; ``token_ids`` only where there are some."""
        return {name: value for name, value in vars(self).items() if value is not None}


def joined(parts: Sequence[Responses]) -> Responses:
    """The responses of one question that were sampled in parts, in the order given."""
    ids = [ids for part in parts for ids in part.token_ids or [None] * len(part.responses)]
    return Responses(
        parts[0].id,
        [text for part in parts for text in part.responses],
        [finished for part in parts for finished in part.finished],
        ids if any(found is not None for found in ids) else None,
    )


def read_responses(path: str | Path) -> Iterator[Responses]:
    """Reads ``{id, responses, finished, token_ids}`` lines; without ``finished`` every response counts as finished.

    Raises:
        UserError: naming ``file:line`` and the field, or an id that occurs twice.
    """
    seen: dict[str, str] = {}
    for where, record in read_jsonl(path):
        responses = _responses(record, where)
        if responses.id in seen:
            raise UserError(
                f"{where}: the id {responses.id!r} was used before at {seen[responses.id]}; ids must be unique"
            )
        seen[responses.id] = where
        yield responses


def _responses(record: dict[str, Any], where: str) -> Responses:
    question_id = str(require(record, "id", (str, int), where))
    texts = require(record, "responses", list, where)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the field 'responses' must be a list of texts")
    finished = record.get("finished", [True] * len(texts))
    if not isinstance(finished, list) or len(finished) != len(texts):
        raise UserError(f"{where}: the field 'finished' must be a list as long as 'responses' ({len(texts)})")
    if not all(isinstance(value, bool) for value in finished):
        raise UserError(f"{where}: the field 'finished' must be a list of true and false")
    token_ids = record.get("token_ids")
    if token_ids is not None:
        if not isinstance(token_ids, list) or len(token_ids) != len(texts):
            raise UserError(f"{where}: the field 'token_ids' must be a list as long as 'responses' ({len(texts)})")
        for index, ids in enumerate(token_ids):
            if ids != [] or texts[index].strip():  # an empty response has none
                check_ids(ids, f"token_ids[{index}]", where)
    return Responses(question_id, texts, finished, token_ids)


class InStep:
    """Responses of a file, asked for in the order of the contexts and read once.

    A file in that order, which is how ``sample-responses`` writes it, needs no memory; what comes earlier in the file
    than it is asked for waits here.

    Raises:
        UserError: a malformed responses file.
    """

    def __init__(self, path: str) -> None:
        self._left = {record.id for record in read_responses(path)}
        self._records = read_responses(path)
        self._waiting: dict[str, Responses] = {}

    def __call__(self, question_id: str) -> Responses | None:
        if question_id not in self._left:
            return None
        self._left.remove(question_id)
        while question_id not in self._waiting:
            record = next(self._records)
            self._waiting[record.id] = record
        return self._waiting.pop(question_id)

    def unasked(self) -> set[str]:
        """The ids that nobody asked for."""
        return self._left


class _Line(NamedTuple):
    """Where a line of a `PartialFile` begins, and how many responses it holds."""

    start: int
    responses: int


class PartialFile:
    """Responses written so far, next to the output, with the settings they were sampled under.

    A line is what was sampled at once: the samples of a question from number ``first`` on. Opening the file drops an
    unfinished last line and locks it, so that no second process samples the same. Memory holds where the lines are, not
    what is in them.

    Raises:
        UserError: the file holds samples of other settings, is not such a file, or another process writes it.
    """

    def __init__(self, output: Path, settings: dict[str, object]) -> None:
        self.path = output.with_name(output.name + ".partial")
        self._parts: dict[str, dict[int, _Line]] = {}
        self._size = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            hold(self._file.fileno(), self.path)
            self._resume(settings)
        except UserError:
            self._file.close()
            raise

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._file.close()

    def _resume(self, settings: dict[str, object]) -> None:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                where = f"{self.path}:{number}"
                record = parse_line(line, where)
                if number == 1:
                    made = require(record, "settings", dict, where)
                else:
                    if number == 2:  # with nothing sampled, any settings may take the file
                        refuse_other_settings(self.path, made, settings)
                    part = _responses(record, where)
                    place = _Line(self._size, len(part.responses))
                    self._parts.setdefault(part.id, {})[require(record, "first", int, where)] = place
                self._size += len(line)
        if not self._parts:
            self._size = 0
        self._file.truncate(self._size)
        if self._size == 0:
            self._write({"settings": settings})

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._parts

    @property
    def responses(self) -> int:
        """How many are there."""
        return sum(line.responses for parts in self._parts.values() for line in parts.values())

    @property
    def questions(self) -> int:
        """How many have at least one response."""
        return len(self._parts)

    def missing(self, question_id: str, samples: int) -> list[int]:
        """The numbers of the samples that are not there yet, ascending."""
        parts = self._parts.get(question_id, {})
        there = {first + index for first, line in parts.items() for index in range(line.responses)}
        return [number for number in range(samples) if number not in there]

    def add(self, responses: Responses, first: int = 0) -> None:
        """Writes what was sampled, at once; ``first`` is the number of its first sample."""
        start = self._size
        self._write({"first": first, **responses.record()})
        self._parts.setdefault(responses.id, {})[first] = _Line(start, len(responses.responses))

    def _write(self, record: dict[str, object]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            if self._file.write(line) == len(line):
                self._size += len(line)
                return
            why = "the disk is full"
        except OSError as error:
            why = system_reason(error)
        self._file.truncate(self._size)  # answers to other requests may still come, and find room
        raise UserError(f"{self.path}: {why}; make room and repeat the command, what is finished is kept")

    def finish(self, output: Path, ids: Sequence[str]) -> None:
        """Writes the output, questions in the order of ``ids`` and samples in that of their numbers; removes this."""
        aside = output.with_name(output.name + ".complete")
        try:
            with self.path.open("rb") as lines, aside.open("w", encoding="utf-8") as out:
                for question_id in ids:
                    parts = []
                    for _, line in sorted(self._parts[question_id].items()):
                        lines.seek(line.start)
                        where = f"{self.path}, byte {line.start}"
                        parts.append(_responses(parse_line(lines.readline(), where), where))
                    out.write(json.dumps(joined(parts).record(), ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())  # what it is made of is removed
        except OSError as error:
            raise UserError(
                f"{aside}: {system_reason(error)}; make room and repeat the command, nothing is sampled again"
            ) from None
        aside.replace(output)
        self.path.unlink()
