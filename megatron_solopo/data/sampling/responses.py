"""Sampled responses on disk: the finished file, and the one that a killed run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_solopo.atomic import file_aside, finish_file, new_file, write_text
from megatron_solopo.data.files.jobs import Jobs, Line, differences
from megatron_solopo.data.files.records import Record, read_jsonl
from megatron_solopo.data.validation import Flag, Name, Whole, check_unique, validated
from megatron_solopo.errors import UserError, system_reason


@dataclass(frozen=True)
class Responses:
    """A line of a responses file; ``finished[i]`` says whether ``responses[i]`` ended by itself.

    ``token_ids[i]`` are the ids that were sampled, without the end-of-turn token; None where tokenising the text gives
    those very ids, or where only the text is known. None for the whole line stands for None for each response.
    """

    id: Name
    responses: list[str]
    finished: list[Flag]
    token_ids: list[list[Whole] | None] | None = None

    def record(self) -> Record:
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
        check_unique(responses.id, where, seen)
        yield responses


_RESPONSES = TypeAdapter(Responses)


def _responses(record: Record, where: str) -> Responses:
    texts = record.get("responses")
    all_finished = [True] * len(texts) if isinstance(texts, list) else []
    found = validated(_RESPONSES, record, where, finished=all_finished)
    for name, values in (("finished", found.finished), ("token_ids", found.token_ids)):
        if values is not None and len(values) != len(found.responses):
            raise UserError(
                "field-value",
                f"{where}: the field '{name}' must be a list as long as 'responses' ({len(found.responses)})",
            )
    for index, ids in enumerate(found.token_ids or ()):
        check_ids(ids, found.responses[index], f"{where}: the field 'token_ids[{index}]'")
    return found


def check_ids(ids: list[int] | None, text: str, where: str) -> None:
    """Refuses token ids that no response can have; an empty one has none."""
    if ids is not None and (min(ids) < 0 if ids else text.strip()):
        raise UserError("field-value", f"{where} must be a non-empty list of token ids")


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


@dataclass(frozen=True, slots=True)
class _Samples:
    """Where samples of a question are in the jobs file, and how many."""

    start: int
    count: int


def settings_path(output: Path) -> Path:
    """The file beside an output that says how its responses were sampled."""
    return output.with_name(output.name + ".settings.json")


@dataclass(frozen=True)
class _Beside:
    settings: Record
    bytes: int


_BESIDE = TypeAdapter(_Beside)


def output_settings(output: Path, file: Path | None = None) -> Record | None:
    """The settings that a finished output was sampled under; None: nothing beside it says so.

    Args:
        file: what to look at, where it is not yet in the output's place.
    """
    try:
        recorded = _BESIDE.validate_json(settings_path(output).read_bytes())
        return recorded.settings if recorded.bytes == (file or output).stat().st_size else None
    except (OSError, ValidationError):
        return None


def check_output(output: Path, settings: Mapping[str, object]) -> None:
    """Refuses to extend a finished output that was not sampled under these settings.

    Args:
        settings: some of them or all.
    """
    made = output_settings(output)
    if made is None:
        raise UserError(
            "file-exists",
            f"--output {output}: is already complete, and {settings_path(output).name} is not there or is another "
            "file's, so it cannot be extended; give another name, or --overwrite to sample again",
        )
    for name, before, after in differences({name: made.get(name) for name in settings}, settings):
        raise UserError(
            "output-other-settings",
            f"--output {output}: was sampled with {name} = {before!r}, now {after!r}; give another name, or "
            "--overwrite to sample again",
        )


class SampledJobs(Jobs):
    """Responses sampled so far, in ``OUTPUT.partial``: a job is what was sampled at once.

    It is named ``[question, first, count]``: the samples of a question from number ``first`` on. Memory holds where the
    lines are, not what is in them.

    A finished output is extended (`extend`): it stays until the new one is complete.

    Raises:
        UserError: as `Jobs`.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._samples: dict[str, dict[int, _Samples]] = {}
        super().__init__(output.with_name(output.name + ".partial"))
        put_in_place(output)

    def begin_sampling(self, settings: Mapping[str, object], anew: bool = False) -> None:
        """Resumes or begins the work.

        Args:
            settings: those that decide a response.
            anew: leave out what a finished output holds, and what an unfinished extension of it does.

        Raises:
            UserError: as `Jobs.begin`; or the finished output cannot be extended (`check_output`).
        """
        self._extends = self._output.exists() and not anew
        if self._extends:
            check_output(self._output, json.loads(json.dumps(settings)))
        head = {"anew": True} if anew and self._output.exists() else {}
        self.begin(settings, head=head)
        if head and "anew" not in self.head:
            self.restart(settings, head)

    def restart(self, settings: Mapping[str, object], head: Mapping[str, object] | None = None) -> None:
        self._samples.clear()
        super().restart(settings, head)

    def _finished(self, job: Line, start: int) -> None:
        question_id, first, count = job["job"]
        self._samples.setdefault(question_id, {})[first] = _Samples(start, count)

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._samples

    def extend(self, ids: Sequence[str], samples: int) -> bool:
        """Copies here what a finished output holds.

        Returns:
            False where it holds all these samples; nothing is copied then.
        """
        if not self._extends:
            return True
        held = {record.id: len(record.responses) for record in read_responses(self._output)}
        if all(held.get(name, 0) >= samples for name in ids):
            if all(self._behind(name) <= held.get(name, 0) for name in self._samples):
                self.remove()  # a kill left what is in the output
            return False
        for record in read_responses(self._output):
            for run in runs(self.missing(record.id, len(record.responses))):
                self.add_samples(cut(record, run[0], run[-1] + 1), run[0])
        return True

    def _behind(self, question_id: str) -> int:
        """The number behind the last sample of a question that is there."""
        return max(first + part.count for first, part in self._samples[question_id].items())

    def missing(self, question_id: str, samples: int) -> list[int]:
        """The numbers of the samples that are not there yet, ascending."""
        parts = self._samples.get(question_id, {})
        there = {first + index for first, part in parts.items() for index in range(part.count)}
        return [number for number in range(samples) if number not in there]

    def add_samples(self, responses: Responses, first: int = 0) -> None:
        """Writes what was sampled, at once; ``first`` is the number of its first sample."""
        known = {name: value for name, value in responses.record().items() if name != "id"}
        self.add([responses.id, first, len(responses.responses)], known)

    def finish(self, ids: Sequence[str], samples: int, notes: Mapping[str, object] | None = None) -> bool:
        """Writes the output: questions in the order of ``ids``, of each the first ``samples`` samples in order.

        Beside it go its settings. The jobs are removed where all of them are in the output.

        Args:
            notes: what the settings file says beside the settings.

        Returns:
            Whether the jobs were removed.
        """
        output = self._output
        try:
            with new_file(output) as out:
                for question_id in ids:
                    parts = [self._read(question_id, part) for _, part in sorted(self._samples[question_id].items())]
                    out.write(json.dumps(cut(joined(parts), 0, samples).record(), ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
                # Before the output takes its place: after a kill, `put_in_place` knows by them that it is whole.
                beside = {"settings": self.settings, **(notes or {}), "bytes": os.fstat(out.fileno()).st_size}
                write_text(settings_path(output), json.dumps(beside, ensure_ascii=False))
        except OSError as error:
            raise UserError(
                "write-failed",
                f"--output {output}: {system_reason(error)}; free space and repeat the command; no response is lost",
            ) from None
        held = sum(part.count for parts in self._samples.values() for part in parts.values())
        if held > len(ids) * samples:
            return False
        self.remove()
        return True

    def _read(self, question_id: str, part: _Samples) -> Responses:
        record: Record = {**self.read(part.start), "id": question_id}
        return _responses(record, f"{self.place}, byte {part.start}")


def put_in_place(output: Path) -> None:
    """Ends what a command that was killed in `finish` began: an output that is whole, which its settings' size tells,
    takes its place."""
    if output_settings(output, file_aside(output)) is not None:
        finish_file(output)
