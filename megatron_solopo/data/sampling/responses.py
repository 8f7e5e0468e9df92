"""Sampled responses on disk: the complete output, and the jobs file from which a stopped run resumes."""

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
    """A line of a responses file; ``finished[i]`` is whether ``responses[i]`` ended by itself.

    ``token_ids[i]`` are the sampled ids, without the end-of-turn token; None where tokenizing the text yields the same
    ids, or where only the text is known. ``token_ids`` is None where it would hold None for every response.
    """

    id: Name
    responses: list[str]
    finished: list[Flag]
    token_ids: list[list[Whole] | None] | None = None

    def record(self) -> Record:
        """Returns the JSON object of the line; it has ``token_ids`` only if any are known."""
        return {name: value for name, value in vars(self).items() if value is not None}


def cut(record: Responses, start: int, stop: int) -> Responses:
    """Returns the responses ``start`` to ``stop - 1`` of a line."""
    ids = record.token_ids[start:stop] if record.token_ids else []
    return Responses(
        record.id,
        record.responses[start:stop],
        record.finished[start:stop],
        ids if any(sampled is not None for sampled in ids) else None,
    )


def runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Splits ascending numbers into runs of consecutive ones."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        yield [number for _, number in run]


def joined(parts: Sequence[Responses]) -> Responses:
    """Joins the parts of one question's responses, in their order."""
    ids = [ids for part in parts for ids in part.token_ids or [None] * len(part.responses)]
    return Responses(
        parts[0].id,
        [text for part in parts for text in part.responses],
        [finished for part in parts for finished in part.finished],
        ids if any(sampled is not None for sampled in ids) else None,
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
    responses = validated(_RESPONSES, record, where, finished=all_finished)
    for name, values in (("finished", responses.finished), ("token_ids", responses.token_ids)):
        if values is not None and len(values) != len(responses.responses):
            raise UserError(
                "field-value",
                f"{where}: the field '{name}' must be a list as long as 'responses' ({len(responses.responses)})",
            )
    for index, ids in enumerate(responses.token_ids or ()):
        check_ids(ids, responses.responses[index], f"{where}: the field 'token_ids[{index}]'")
    return responses


def check_ids(ids: list[int] | None, text: str, where: str) -> None:
    """Refuses token ids that no response can have; only an empty response has no ids."""
    if ids is not None and (min(ids) < 0 if ids else text.strip()):
        raise UserError("field-value", f"{where} must be a non-empty list of token ids")


class InStep:
    """Responses of a file, looked up in the order of the contexts and read once.

    A file in that order, as ``sample-responses`` writes it, needs no memory; lines that precede the requested one are
    kept in memory until they are requested.

    Raises:
        UserError: a malformed responses file.
    """

    def __init__(self, path: str) -> None:
        self._remaining = {record.id for record in read_responses(path)}
        self._records = read_responses(path)
        self._waiting: dict[str, Responses] = {}

    def __call__(self, question_id: str) -> Responses | None:
        if question_id not in self._remaining:
            return None
        self._remaining.remove(question_id)
        while question_id not in self._waiting:
            record = next(self._records)
            self._waiting[record.id] = record
        return self._waiting.pop(question_id)

    def unasked(self) -> set[str]:
        """Returns the ids that were not requested."""
        return self._remaining


@dataclass(frozen=True, slots=True)
class _Samples:
    """Samples of a question in the jobs file: the byte where their line starts, and their number."""

    start: int
    count: int


def settings_path(output: Path) -> Path:
    """Returns the path of the settings file of an output, which records how its responses were sampled."""
    return output.with_name(output.name + ".settings.json")


@dataclass(frozen=True)
class _SettingsFile:
    settings: Record
    bytes: int


_SETTINGS_FILE = TypeAdapter(_SettingsFile)


def output_settings(output: Path, file: Path | None = None) -> Record | None:
    """Returns the settings with which a complete output was sampled; None if no settings file belongs to it.

    Args:
        file: the complete output, if it is not yet renamed to ``output``.
    """
    try:
        recorded = _SETTINGS_FILE.validate_json(settings_path(output).read_bytes())
        return recorded.settings if recorded.bytes == (file or output).stat().st_size else None
    except (OSError, ValidationError):
        return None


def check_output(output: Path, settings: Mapping[str, object]) -> None:
    """Refuses to extend a complete output that was sampled with other settings.

    Args:
        settings: the settings to compare; others of the output may differ.

    Raises:
        UserError: the settings differ, or the output has no settings file.
    """
    recorded = output_settings(output)
    if recorded is None:
        raise UserError(
            "file-exists",
            f"--output {output}: is complete already, and {settings_path(output).name} is missing or belongs to "
            "another file, so it cannot be extended; set another name, or sample again with --overwrite",
        )
    for name, before, after in differences({name: recorded.get(name) for name in settings}, settings):
        raise UserError(
            "output-other-settings",
            f"--output {output}: was sampled with {name} = {before!r}, now {after!r}; set another name, or sample "
            "again with --overwrite",
        )


class SampledJobs(Jobs):
    """Responses sampled so far, in ``OUTPUT.partial``; a job is a batch of samples of one question.

    A job is named ``[question, first, count]``: ``count`` samples of a question from number ``first`` on. Memory holds
    the offsets of the lines, not their responses.

    A complete output can be extended (`extend`); it is kept until the new one is complete.

    Raises:
        UserError: as `Jobs`.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._samples: dict[str, dict[int, _Samples]] = {}
        super().__init__(output.with_name(output.name + ".partial"))
        put_in_place(output)

    def begin_sampling(self, settings: Mapping[str, object], anew: bool = False) -> None:
        """Resumes the sampling of ``OUTPUT.partial``, or starts it.

        Args:
            settings: the settings that determine the responses.
            anew: drop the responses of a complete output, and those of an unfinished extension of it.

        Raises:
            UserError: as `Jobs.begin`; or the complete output cannot be extended (`check_output`).
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
        """Copies the responses of a complete output into the jobs file.

        Returns:
            False if the output holds all requested samples already; then nothing is copied.
        """
        if not self._extends:
            return True
        held = {record.id: len(record.responses) for record in read_responses(self._output)}
        if all(held.get(name, 0) >= samples for name in ids):
            if all(self._stop(name) <= held.get(name, 0) for name in self._samples):
                self.remove()  # a killed command left jobs that are in the output
            return False
        for record in read_responses(self._output):
            for run in runs(self.missing(record.id, len(record.responses))):
                self.add_samples(cut(record, run[0], run[-1] + 1), run[0])
        return True

    def _stop(self, question_id: str) -> int:
        """One more than the number of the last sample of a question."""
        return max(first + part.count for first, part in self._samples[question_id].items())

    def missing(self, question_id: str, samples: int) -> list[int]:
        """Returns the numbers of the samples that are not in the jobs file yet, ascending."""
        parts = self._samples.get(question_id, {})
        present = {first + index for first, part in parts.items() for index in range(part.count)}
        return [number for number in range(samples) if number not in present]

    def add_samples(self, responses: Responses, first: int = 0) -> None:
        """Writes responses as one line; ``first`` is the number of the first sample."""
        fields = {name: value for name, value in responses.record().items() if name != "id"}
        self.add([responses.id, first, len(responses.responses)], fields)

    def finish(self, ids: Sequence[str], samples: int, notes: Mapping[str, object] | None = None) -> bool:
        """Writes the output and its settings file, and removes the jobs if the output holds all of them.

        Questions are in the order of ``ids``, each with its first ``samples`` samples in order.

        Args:
            notes: further entries of the settings file.

        Raises:
            UserError: the output cannot be written.

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
                # Before the output is renamed: after a kill, `put_in_place` sees by them that it is complete.
                record = {"settings": self.settings, **(notes or {}), "bytes": os.fstat(out.fileno()).st_size}
                write_text(settings_path(output), json.dumps(record, ensure_ascii=False))
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
    """Completes a `finish` that was killed: renames the new output to its place if it is complete, that is, if it has
    the size that its settings file records."""
    if output_settings(output, file_aside(output)) is not None:
        finish_file(output)
