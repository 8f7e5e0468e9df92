"""Sampled responses on disk: the finished file, and the one that a killed run resumes from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_solopo.data.records import read_jsonl
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
    token_ids = record.get("token_ids")
    if token_ids is not None:
        if not isinstance(token_ids, list) or len(token_ids) != len(texts):
            raise UserError(f"{where}: the field 'token_ids' must be a list as long as 'responses' ({len(texts)})")
        for index, ids in enumerate(token_ids):
            if ids != [] or texts[index]:  # an empty response has none
                check_ids(ids, f"token_ids[{index}]", where)
    return Responses(question_id, texts, [bool(value) for value in finished], token_ids)


class PartialFile:
    """Responses written so far, next to the output, with the settings they were sampled under.

    A line is what was sampled at once: the samples of a question from number ``first`` on. Opening the file drops an
    unfinished last line and locks it, so that no second process samples the same.

    Raises:
        UserError: the file was made with other settings, is not such a file, or another process writes it.
    """

    def __init__(self, output: Path, settings: dict[str, object]) -> None:
        self.path = output.with_name(output.name + ".partial")
        self._parts: dict[str, dict[int, Responses]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                self._lock()
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

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing it; wait for its end, or end it first") from None

    def _resume(self, settings: dict[str, object]) -> None:
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            self._file.truncate(whole)
        if whole == 0:
            self._write({"settings": settings})
            return
        records = read_jsonl(self.path)
        where, first = next(records)
        made = require(first, "settings", dict, where)
        if made != settings and text.count(b"\n", 0, whole) == 1:  # nothing was sampled with them
            self._file.truncate(0)
            self._write({"settings": settings})
            return
        for name in sorted(settings.keys() | made.keys()):
            if made.get(name) != settings.get(name):
                raise UserError(
                    f"{self.path}: begun with {name} = {made.get(name)!r}, now {settings.get(name)!r}; "
                    "repeat the first settings to resume, or delete the file to start again"
                )
        for where, record in records:
            part = _responses(record, where)
            self._parts.setdefault(part.id, {})[require(record, "first", int, where)] = part

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._parts

    @property
    def responses(self) -> int:
        """How many are there."""
        return sum(len(part.responses) for parts in self._parts.values() for part in parts.values())

    @property
    def questions(self) -> int:
        """How many have at least one response."""
        return len(self._parts)

    def missing(self, question_id: str, samples: int) -> list[int]:
        """The numbers of the samples that are not there yet, ascending."""
        parts = self._parts.get(question_id, {})
        there = {first + index for first, part in parts.items() for index in range(len(part.responses))}
        return [number for number in range(samples) if number not in there]

    def add(self, responses: Responses, first: int = 0) -> None:
        """Writes what was sampled, at once; ``first`` is the number of its first sample."""
        self._parts.setdefault(responses.id, {})[first] = responses
        self._write({"first": first, **responses.record()})

    def _write(self, record: dict[str, object]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            if self._file.write(line) == len(line):
                return
            why = "the disk is full"
        except OSError as error:
            why = system_reason(error)
        raise UserError(f"{self.path}: {why}; make room and repeat the command, what is finished is kept")

    def finish(self, output: Path, ids: Sequence[str]) -> None:
        """Writes the output, questions in the order of ``ids`` and samples in that of their numbers; removes this."""
        aside = output.with_name(output.name + ".complete")
        try:
            with aside.open("w", encoding="utf-8") as out:
                for question_id in ids:
                    parts = self._parts[question_id]
                    whole = joined([parts[first] for first in sorted(parts)])
                    out.write(json.dumps(whole.record(), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{aside}: {system_reason(error)}; make room and repeat the command, nothing is sampled again"
            ) from None
        aside.replace(output)
        self.path.unlink()
