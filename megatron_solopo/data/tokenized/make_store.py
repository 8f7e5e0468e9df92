"""Tokenizes a data file into a token store; `tokenize-data` writes it to --output, training to a cache at first use.

The file is cut into parts of a few megabytes, which depend on its bytes alone. Each worker tokenizes one part after
another, and the record batch that it becomes is appended to the result in the order of the parts. The result
therefore does not depend on the number of workers, memory does not depend on the size of the file, and killed work
resumes with the missing parts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_solopo import __version__
from megatron_solopo.atomic import put_folder
from megatron_solopo.data.files.inputs import as_file
from megatron_solopo.data.files.jobs import Jobs, differences
from megatron_solopo.data.files.records import Part, read_records, scan
from megatron_solopo.data.options import TokenizerOptions
from megatron_solopo.data.schema import read_conversations, read_groups
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.encoder import Encoder
from megatron_solopo.data.tokenized.token_store import (
    BOTH_PAIRS,
    DATA,
    DATASETS_FILES,
    FORMAT,
    MANIFEST,
    SHORT_PAIR,
    read_manifest,
)
from megatron_solopo.data.tokenized.token_table import SCHEMAS, TokenTable, record_batch
from megatron_solopo.data.tokenized.tokens import CONVERSATION, Report, TokenGroup, no_example
from megatron_solopo.data.workers import Work, map_in_order
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Scored, names_of_scored
from megatron_solopo.progress import ProgressBar, reporting

RESULT = "result"
"""The folder, in that of the unfinished work, which becomes the store."""

STREAM = f"{RESULT}/{DATA}"


@dataclass(frozen=True)
class Job:
    """What every worker does to its parts.

    Attributes:
        source: the file.
        scored: the segments that are tokenized; None: all that a group has, which serves every method.
        seq_length, overlong: see `Encoder`.
    """

    source: str
    tokenizer: TokenizerOptions
    objective: str
    seq_length: int | None = None
    overlong: str = "refuse"
    scored: Scored | None = None


class TokenizedPart(NamedTuple):
    """What a part becomes: what the jobs file notes (names, report, largest token), and the bytes of its batch."""

    number: int
    entry: dict[str, Any]
    data: bytes


def tokenize_part(job: Job, tokenizer: PreTrainedTokenizerBase, number: int, part: Part) -> TokenizedPart:
    encoder = Encoder(tokenizer, job.seq_length, job.overlong)
    read = read_conversations if job.objective == "sft" else read_groups
    groups: list[TokenGroup] = []
    for record in read(job.source, part):
        if job.objective == "sft":
            scored = CONVERSATION
        else:
            scored = job.scored or (SHORT_PAIR if record.long_messages is None else BOTH_PAIRS)
        try:
            group = encoder.encode(record, scored)
        except UserError as error:
            raise error.at(job.source) from None
        if group is not None:
            groups.append(group)
    each = ((int(np.max(ids)), group.id) for group in groups for ids in group.sequences())
    largest = max(each, key=lambda one: one[0], default=(-1, ""))
    entry = {"ids": [group.id for group in groups], "report": asdict(encoder.report), "largest": largest}
    data = record_batch(groups, job.objective).serialize().to_pybytes() if groups else b""
    return TokenizedPart(number, entry, data)


def work_of(job: Job, tokenizer: PreTrainedTokenizerBase) -> Work:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer: processes are what --workers counts
    return partial(tokenize_part, job, tokenizer)


@dataclass(frozen=True)
class Plan:
    """The source, tokenizer and parts of a store; ``settings`` hold everything that determines its content."""

    job: Job
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    parts: list[Part]

    @classmethod
    def of(cls, job: Job, tokenizer: PreTrainedTokenizerBase) -> Plan:
        """Reads the file once.

        Raises:
            UserError: it is missing, or no Parquet file.
        """
        with reporting("reading the file"):
            sha256, parts = scan(job.source)
        options = {
            "seq_length": job.seq_length,
            "overlong": job.overlong if job.seq_length else None,
            "scored": names_of_scored(job.scored) if job.scored else None,
        }
        settings = {
            "format": FORMAT,
            "version": __version__,
            "objective": job.objective,
            "options": options,
            "source": {"bytes": Path(job.source).stat().st_size, "sha256": sha256},
            "text": text_facts(job.tokenizer.folder, tokenizer),
        }
        return cls(job, tokenizer, settings, parts)

    @property
    def key(self) -> str:
        """16 hex digits over the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def make(plan: Plan, output: Path, jobs: Jobs, workers: int, name: str) -> tuple[dict[str, int], Report, int]:
    """Makes a store, or resumes where a killed process was; returns the manifest's counts, the report, and how many
    parts were done before.

    Args:
        jobs: opened on the folder of the unfinished work with the stream `STREAM`, which is removed at the end.
        name: of the source, for the manifest.

    Raises:
        UserError: a record that cannot be trained on, no example at all, or unfinished work of another plan.
    """
    jobs.begin(plan.settings)
    done = _tokenize(plan, jobs, workers, name)
    manifest, report = _manifest(plan, jobs)
    if not manifest["counts"]["examples"]:
        raise UserError("data-empty", no_example(name, len(report.dropped), plan.job.seq_length))
    result = jobs.stream(RESULT)
    for file, document in {**DATASETS_FILES, MANIFEST: manifest | {"file": name}}.items():
        (result / file).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    put_folder(result, output)
    jobs.remove()
    return manifest["counts"], report, done


def _tokenize(plan: Plan, jobs: Jobs, workers: int, name: str) -> int:
    """Tokenizes the parts that are not finished; returns how many were."""
    job, seen = plan.job, set[str]()
    with ProgressBar(desc=f"tokenizing {name}", unit="example") as bar:
        for entry in jobs.finished():
            bar.update(_check_ids(job, entry, seen))
        done = len(jobs.lines)
        todo = [(number, part) for number, part in enumerate(plan.parts) if number not in jobs]
        for part in map_in_order(work_of, (job, plan.tokenizer), todo, workers):
            schema = b"" if part.number else SCHEMAS[job.objective].serialize().to_pybytes()
            jobs.add(part.number, part.entry, {STREAM: schema + part.data})
            bar.update(_check_ids(job, part.entry, seen))
    return done


def _check_ids(job: Job, entry: dict[str, Any], seen: set[str]) -> int:
    """Refuses an id that an earlier part has; returns the number of ids."""
    names = [*entry["ids"], *(dropped[0] for dropped in entry["report"]["dropped"])]
    for name in names:
        if name in seen and job.objective == "preference":  # conversations may share one, as they may in a file
            places = [where for where, record in read_records(job.source) if str(record.get("id")) == name]
            raise UserError(
                "id-twice", f"{places[1]}: the id {name!r} was used before at {places[0]}; ids must be unique"
            )
        seen.add(name)
    return len(names)


def _manifest(plan: Plan, jobs: Jobs) -> tuple[dict[str, Any], Report]:
    report, largest = Report(), (-1, "")
    for entry in jobs.finished():
        report.add(Report.of(entry["report"]))
        largest = max(largest, tuple(entry["largest"]), key=lambda one: one[0])
    path = jobs.stream(STREAM)
    if not path.stat().st_size:  # a file without a record has no part
        return {"counts": {"examples": 0}}, report
    table = TokenTable(path, plan.job.objective)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    counts = {
        "examples": len(table),
        "tokens": table.tokens,
        "dropped": len(report.dropped),
        "cut": len(report.cut),
        "control_tokens_as_text": len(report.spelled),
        "thoughts_not_closed": len(report.open),
    }
    manifest = plan.settings | {
        "counts": counts,
        "data": {"bytes": path.stat().st_size, "index_sha256": table.index_sha256()},
        "largest_token": {"id": largest[0], "example": largest[1]},
        "report": asdict(report),
    }
    return manifest, report


def cache_folder(option: str | None) -> Path:
    """Returns the folder of --data-cache, or else the user's cache folder."""
    if named := option or os.environ.get("SOLOPO_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "megatron_solopo")
    except RuntimeError:  # a container's user may have no home
        raise UserError("option-missing", "--data-cache: no home folder to keep token ids in; set a folder") from None


def cached_store(
    job: Job, tokenizer: PreTrainedTokenizerBase, cache: Path, workers: int, expected: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Returns the store of a data file in a cache, written now where the cache has none, and its settings.

    Processes that need the same store wait for the one that writes it.

    Args:
        job: ``source`` is what `inputs.read_records` reads.
        expected: the settings on rank 0; a store with other settings is refused.

    Raises:
        UserError: see `make`; the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f"records-{os.getpid()}.jsonl"
        with as_file(job.source, aside) as file:
            plan = Plan.of(replace(job, source=file), tokenizer)
            for name, before, now in differences(expected or plan.settings, plan.settings):
                raise UserError(
                    "ranks-differ", f"{job.source}: {name} is {now!r}, on rank 0 it is {before!r}; copy rank 0's"
                )
            folder = cache / f"{Path(job.source).stem}-{plan.key}"
            with _alone(folder.with_name(folder.name + ".lock")):
                if not is_complete(folder, plan.settings):
                    with Jobs(folder.with_name(folder.name + ".partial"), (STREAM,)) as jobs:
                        make(plan, folder, jobs, workers, job.source)
            return folder, plan.settings
    except OSError as error:
        if not str(error.filename or "").startswith(str(cache)):
            raise
        raise UserError(
            "write-failed",
            f"--data-cache {cache}: cannot be written ({error.strerror}); set another folder, or free space",
        ) from None


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder is the store of these settings."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    return not differences({key: manifest.get(key) for key in settings}, settings)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in the block with the same file."""
    with path.open("ab") as file:
        with reporting(f"waiting for another process that makes {path.with_suffix('')}"), contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # not every network file system has locks
        yield
