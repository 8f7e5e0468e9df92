"""Sampled responses on disk: the finished file, and the one that a killed run resumes from."""

from __future__ import annotations

import contextlib
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from megatron_solopo.data.files.progress import differences, hold, refuse_other_settings, write_aside
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


def cut(record: Responses, start: int, stop: int) -> Responses:
    """Its responses ``start`` to ``stop - 1``."""
    ids = record.token_ids[start:stop] if record.token_ids else []
    return Responses(
        record.id,
        record.responses[start:stop],
        record.finished[start:stop],
        ids if any(one is not None for one in ids) else None,
    )


def runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Ascending numbers in runs of neighbours."""
    for _, run in groupby(enumerate(numbers), lambda place: place[1] - place[0]):
        yield [number for _, number in run]


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


NOT_DECIDING = ("limit", "samples")
"""Settings of earlier versions that decide no response."""


def settings_path(output: Path) -> Path:
    """The file beside an output that says how its responses were sampled."""
    return output.with_name(output.name + ".settings.json")


def output_settings(output: Path, file: Path | None = None) -> dict[str, Any] | None:
    """The settings that a finished output was sampled under; None: nothing beside it says so.

    Args:
        file: what to look at, where it is not yet in the output's place.
    """
    try:
        recorded = json.loads(settings_path(output).read_text(encoding="utf-8"))
        matches = recorded["bytes"] == (file or output).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return recorded["settings"] if matches else None


def check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuses to extend a finished output that was not sampled under these settings.

    Args:
        settings: some of them or all.
    """
    made = output_settings(output)
    if made is None:
        raise UserError(
            f"--output {output}: is already complete, and {settings_path(output).name} is not there or is another "
            "file's, so it cannot be extended; give another name, or --overwrite to sample again"
        )
    for name, before, after in differences({name: made.get(name) for name in settings}, settings):
        raise UserError(
            f"--output {output}: was sampled with {name} = {before!r}, now {after!r}; give another name, or "
            "--overwrite to sample again"
        )


class PartialFile:
    """Responses written so far, next to the output, with the settings they were sampled under.

    A line is what was sampled at once: the samples of a question from number ``first`` on. Opening the file drops an
    unfinished last line and locks it, so that no second process samples the same. Memory holds where the lines are, not
    what is in them.

    A finished output is extended (`extend`): it stays until the new one is complete.

    Args:
        settings: those that decide a response.
        anew: leave out what a finished output holds, and what an unfinished extension of it does.

    Raises:
        UserError: the file holds samples of other settings, is not such a file, or another process writes it; or the
            finished output cannot be extended (`check_output`).
    """

    def __init__(self, output: Path, settings: dict[str, object], anew: bool = False) -> None:
        self._output = output
        self.path = output.with_name(output.name + ".partial")
        self._settings = json.loads(json.dumps(settings))
        self._parts: dict[str, dict[int, _Line]] = {}
        self._size = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            hold(self._file.fileno(), self.path)
            put_in_place(output)
            self._extends = output.exists() and not anew
            if self._extends:
                check_output(output, self._settings)
            self._resume(anew and output.exists())
        except UserError:
            self._file.close()
            raise

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._file.close()

    def _resume(self, anew: bool) -> None:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                where = f"{self.path}:{number}"
                record = parse_line(line, where)
                if number == 1:
                    made = require(record, "settings", dict, where)
                    made = {name: value for name, value in made.items() if name not in NOT_DECIDING}
                    extends = not record.get("anew", False)
                else:
                    if number == 2:  # with nothing sampled, any settings may take the file
                        refuse_other_settings(self.path, made, self._settings)
                        if anew and extends:
                            break
                    part = _responses(record, where)
                    place = _Line(self._size, len(part.responses))
                    self._parts.setdefault(part.id, {})[require(record, "first", int, where)] = place
                self._size += len(line)
        if not self._parts:
            self._size = 0
        self._file.truncate(self._size)
        if self._size == 0:
            self._write({"settings": self._settings, **({"anew": True} if anew else {})})

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._parts

    def extend(self, ids: Sequence[str], samples: int) -> bool:
        """Copies here what a finished output holds.

        Returns:
            False where it holds all these samples; nothing is copied then.
        """
        if not self._extends:
            return True
        held = {record.id: len(record.responses) for record in read_responses(self._output)}
        if all(held.get(name, 0) >= samples for name in ids):
            return False
        for record in read_responses(self._output):
            for run in runs(self.missing(record.id, len(record.responses))):
                self.add(cut(record, run[0], run[-1] + 1), run[0])
        return True

    @property
    def empty(self) -> bool:
        return not self._parts

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

    def finish(self, ids: Sequence[str], samples: int, notes: Mapping[str, Any] | None = None) -> bool:
        """Writes the output: questions in the order of ``ids``, of each the first ``samples`` samples in order.

        Beside it go its settings. This file is removed where all of it is in the output.

        Args:
            notes: what the settings file says beside the settings.

        Returns:
            Whether this file was removed.
        """
        output, aside = self._output, _aside(self._output)
        try:
            with self.path.open("rb") as lines, aside.open("w", encoding="utf-8") as out:
                for question_id in ids:
                    parts = []
                    for _, line in sorted(self._parts[question_id].items()):
                        lines.seek(line.start)
                        where = f"{self.path}, byte {line.start}"
                        parts.append(_responses(parse_line(lines.readline(), where), where))
                    record = cut(joined(parts), 0, samples).record()
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())  # what it is made of is removed
            beside = {"settings": self._settings, **(notes or {}), "bytes": aside.stat().st_size}
            write_aside(settings_path(output), beside)
        except OSError as error:
            raise UserError(
                f"{aside}: {system_reason(error)}; make room and repeat the command, nothing is sampled again"
            ) from None
        put_in_place(output)
        held = sum(line.responses for parts in self._parts.values() for line in parts.values())
        if held > len(ids) * samples:
            return False
        self.path.unlink()
        return True

    def discard(self) -> None:
        """Removes the file."""
        self.path.unlink()


def _aside(output: Path) -> Path:
    return output.with_name(output.name + ".complete")


def put_in_place(output: Path) -> None:
    """Moves an output that is whole to its place, now or after a kill: the settings, written before, name its size."""
    aside = _aside(output)
    with contextlib.suppress(FileNotFoundError):  # nothing to do, or another process has just done it
        if output_settings(output, aside) is not None:
            aside.replace(output)
