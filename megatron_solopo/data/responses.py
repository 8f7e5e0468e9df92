"""Sampled responses on disk: the finished file, and the one that a killed run resumes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.data.records import read_jsonl
from megatron_solopo.data.schema import require
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class Responses:
    """A line of a responses file; ``finished[i]`` says whether ``responses[i]`` ended by itself.

    ``token_ids[i]`` are the ids that were sampled, without the end-of-turn token; None where only texts are known.
    """

    id: str
    responses: list[str]
    finished: list[bool]
    token_ids: list[list[int]] | None = None


def read_responses(path: str | Path) -> Iterator[Responses]:
    """Reads ``{id, responses, finished}`` lines; without ``finished`` every response counts as finished.

    Raises:
        UserError: naming ``file:line`` and the field, or an id that occurs twice.
    """
    seen: dict[str, str] = {}
    for where, record in read_jsonl(path):
        texts = require(record, "responses", list, where)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: the field 'responses' must be a list of texts")
        finished = record.get("finished", [True] * len(texts))
        if not isinstance(finished, list) or len(finished) != len(texts):
            raise UserError(f"{where}: the field 'finished' must be a list as long as 'responses' ({len(texts)})")
        question_id = str(require(record, "id", (str, int), where))
        if question_id in seen:
            raise UserError(
                f"{where}: the id {question_id!r} was used before at {seen[question_id]}; ids must be unique"
            )
        seen[question_id] = where
        token_ids = record.get("token_ids")
        if token_ids is not None and (not isinstance(token_ids, list) or len(token_ids) != len(texts)):
            raise UserError(f"{where}: the field 'token_ids' must be a list as long as 'responses' ({len(texts)})")
        yield Responses(question_id, texts, [bool(value) for value in finished], token_ids)


class PartialFile:
    """Responses written so far, next to the output, with the settings they were sampled under.

    Opening it drops an unfinished last line. ``done`` holds the questions that need not be sampled again.

    Raises:
        UserError: the file was made with other settings, or is not such a file.
    """

    def __init__(self, output: Path, settings: dict[str, object]) -> None:
        self.path = output.with_name(output.name + ".partial")
        self._records: dict[str, dict[str, object]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            if whole:
                self._load(settings)
        self._file = self.path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._write({"settings": settings})

    @property
    def done(self) -> set[str]:
        return set(self._records)

    def _load(self, settings: dict[str, object]) -> None:
        records = read_jsonl(self.path)
        where, first = next(records)
        made = require(first, "settings", dict, where)
        for name in settings.keys() | made.keys():
            if made.get(name) != settings.get(name):
                raise UserError(
                    f"{self.path}: begun with {name} = {made.get(name)!r}, now {settings.get(name)!r}; "
                    "repeat the first settings to resume, or delete the file to start again"
                )
        for where, record in records:
            self._records[str(require(record, "id", str, where))] = record

    def add(self, responses: Responses) -> None:
        record = dict(vars(responses))
        self._records[responses.id] = record
        self._write(record)

    def _write(self, record: dict[str, object]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self, output: Path, ids: Sequence[str]) -> None:
        """Writes the output in the order of ``ids`` and removes this file."""
        self._file.close()
        aside = output.with_name(output.name + ".complete")
        with aside.open("w", encoding="utf-8") as out:
            for question_id in ids:
                out.write(json.dumps(self._records[question_id], ensure_ascii=False) + "\n")
        aside.replace(output)
        self.path.unlink()
