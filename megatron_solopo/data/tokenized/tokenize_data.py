"""``solopo tokenize-data``: a data file to a folder of token ids that training opens by mmap (token_store.py).

The file is cut into parts of some megabytes, which depend on its bytes alone. Every worker tokenises one part after the
other into a file of its own; then all are put together in order. So the result does not depend on the number of
workers, memory not on the size of the file, and a killed run resumes with the parts that are not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_solopo import __version__, template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.data.files.inputs import as_file, first_field
from megatron_solopo.data.files.progress import differences, held, refuse_other_settings, write_aside
from megatron_solopo.data.files.records import Part, read_records, scan, write_jsonl
from megatron_solopo.data.options import TokenizerOptions, add_tokenizer_options
from megatron_solopo.data.schema import read_conversations, read_groups
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.token_store import (
    ALL_ROLES,
    FORMAT,
    LAYOUTS,
    MANIFEST,
    SHORT_ROLES,
    indexed_dataset,
    overlong_records,
    read_manifest,
    sequences_of,
)
from megatron_solopo.data.tokenized.tokens import RESPONSE, Dropped, Encoder, Report, Shortened, digest_of, no_example
from megatron_solopo.data.workers import map_in_order
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.progress import ProgressBar, reporting

SETTINGS = "settings.json"
"""Of a folder that is not complete: what it was begun with."""


@dataclass(frozen=True)
class Job:
    """What every worker does to its parts."""

    source: str
    tokenizer: TokenizerOptions
    objective: str
    seq_length: int | None
    overlong: str
    parts: Path

    def part_file(self, number: int) -> Path:
        return self.parts / f"{number:06}.npz"


def tokenize_part(job: Job, tokenizer: PreTrainedTokenizerBase, number: int, part: Part) -> None:
    """Writes the part's file, aside first; a file that is there is whole."""
    encoder = Encoder(tokenizer, job.seq_length, job.overlong)
    read = read_conversations if job.objective == "sft" else read_groups
    ids: list[str] = []
    tokens: list[np.ndarray] = []
    lengths: list[list[int]] = []
    digests: list[bytes] = []
    largest: tuple[int, str] = (-1, "")
    for record in read(job.source, part):
        if job.objective == "sft":
            roles: tuple[str, ...] = (RESPONSE,)
        else:
            roles = SHORT_ROLES if record.long_messages is None else ALL_ROLES
        try:
            group = encoder.encode(record, roles)
        except UserError as error:
            raise UserError(f"{job.source}: {error}") from None
        if group is None:
            continue
        sequences = sequences_of(group, job.objective)
        ids.append(group.id)
        tokens += [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        lengths.append([len(sequence) for sequence in sequences])
        digests += [digest_of(sequence) for sequence in sequences]
        largest = max(largest, (max(max(sequence) for sequence in group.sequences()), group.id), key=lambda f: f[0])
    words = {"ids": ids, "report": asdict(encoder.report), "largest": largest}
    aside = job.part_file(number).with_suffix(f".{os.getpid()}.aside")
    with aside.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int32).reshape(-1, len(LAYOUTS[job.objective])),
            digests=np.frombuffer(b"".join(digests), dtype=np.uint8),
            words=np.frombuffer(json.dumps(words).encode(), dtype=np.uint8),
        )
    aside.replace(job.part_file(number))


def read_part(path: Path, *names: str) -> list[Any]:
    """Arrays of a part's file; ``words`` as the object that was written.

    Raises:
        UserError: the file is damaged; it is removed, so that the next run writes it anew.
    """
    try:
        with np.load(path) as file:
            found = [file[name] for name in names]
            return [json.loads(a.tobytes()) if n == "words" else a for n, a in zip(names, found, strict=True)]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        path.unlink()
        raise UserError(f"{path}: damaged ({error}); it was removed: run the same command again") from None


# One worker process. The tokenizer's own threads are off: processes are what --workers counts.

_job: Job
_tokenizer: PreTrainedTokenizerBase


def _start_worker(job: Job) -> None:
    global _job, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job, _tokenizer = job, job.tokenizer.load()


def _work(number: int, part: Part) -> int:
    tokenize_part(_job, _tokenizer, number, part)
    return number


def _tokenize_parts(job: Job, todo: dict[int, Part], workers: int) -> Iterator[int]:
    """Tokenises parts and yields the number of each when it is done, in order."""
    if workers == 1 or len(todo) == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = job.tokenizer.load()
        for number, part in todo.items():
            tokenize_part(job, tokenizer, number, part)
            yield number
        return
    yield from map_in_order(_work, todo.items(), min(workers, len(todo)), _start_worker, (job,))


# Putting parts together.


def _merge(job: Job, count: int, result: Path) -> tuple[dict[str, Any], Report]:
    """Writes all files of the result but the manifest; returns the manifest's part about them, and the report."""
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    builder = indexed_dataset().IndexedDatasetBuilder(str(result / "tokens.bin"), dtype=np.int32)
    digest, report, largest, total = hashlib.sha256(), Report(), (-1, ""), 0
    with (result / "digests.bin").open("wb") as digests, (result / "ids.jsonl").open("w", encoding="utf-8") as ids:
        for number in ProgressBar(range(count), desc="merging", unit="part", leave=False):
            tokens, lengths, own_digests, words = read_part(
                job.part_file(number), "tokens", "lengths", "digests", "words"
            )
            digest.update(tokens.tobytes())
            ends = lengths.sum(axis=1).cumsum()
            for document, of in zip(np.split(tokens, ends[:-1]) if len(ends) else (), lengths.tolist(), strict=True):
                builder.add_document(document, of)
            digests.write(own_digests.tobytes())
            ids.writelines(json.dumps(name, ensure_ascii=False) + "\n" for name in words["ids"])
            report.add(_report(words["report"]))
            largest = max(largest, tuple(words["largest"]), key=lambda found: found[0])
            total += tokens.size
    builder.finalize(str(result / "tokens.idx"))
    write_jsonl(result / "overlong.jsonl", overlong_records(report))
    files = {}
    for name in ("tokens.bin", "tokens.idx", "digests.bin", "ids.jsonl", "overlong.jsonl"):
        path = result / name
        if name != "tokens.bin":
            with path.open("rb") as file:
                digest_of_file = hashlib.file_digest(file, "sha256")
        files[name] = {
            "bytes": path.stat().st_size,
            "sha256": (digest if name == "tokens.bin" else digest_of_file).hexdigest(),
        }
    groups = len(builder.document_indices) - 1
    counts = {
        "groups": groups,
        "tokens": int(total),
        "dropped": len(report.dropped),
        "cut": len(report.cut),
        "ids_used": report.ids_used,
        "ids_mismatched": report.ids_mismatched,
        "control_tokens_as_text": len(report.spelled),
        "thoughts_not_closed": len(report.open),
    }
    found = {"counts": counts, "largest_token": {"id": largest[0], "group": largest[1]}, "files": files}
    return found, report


def _report(fields: dict[str, Any]) -> Report:
    return Report(
        [Dropped(*values) for values in fields["dropped"]],
        [Shortened(*values) for values in fields["cut"]],
        fields["ids_used"],
        fields["ids_mismatched"],
        fields.get("spelled", []),
        fields.get("open", []),
    )


def _check_ids(job: Job, number: int, seen: set[str]) -> int:
    """Refuses an id that an earlier part has; returns the number of ids."""
    (words,) = read_part(job.part_file(number), "words")
    names = [*words["ids"], *(dropped[0] for dropped in words["report"]["dropped"])]
    for name in names:
        if name in seen and job.objective == "preference":  # conversations may share one, as they may in a file
            places = [where for where, record in read_records(job.source) if str(record.get("id")) == name]
            raise UserError(f"{places[1]}: the id {name!r} was used before at {places[0]}; ids must be unique")
        seen.add(name)
    return len(names)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="solopo tokenize-data",
        description="Tokenise a data file once, into a folder that --train-data and --valid-data take. A killed run "
        "continues where it was when the command is repeated.",
    )
    parser.add_argument(
        "--train-data",
        required=True,
        metavar="FILE",
        help="preference groups or conversations: JSONL, Parquet, a JSON array, CSV, or hub:NAME[:CONFIG][:SPLIT]",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write")
    add_tokenizer_options(parser)
    parser.add_argument(
        "--objective", choices=sorted(LAYOUTS), default="preference", help="what the file holds (default: preference)"
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="longest prompt plus response in tokens, on both contexts (default: no limit; training has its own)",
    )
    parser.add_argument(
        "--overlong",
        choices=("refuse", "drop", "cut"),
        help="what is longer: refuse the file, drop and list it, or cut text out of its distractors (default: refuse)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one for each core)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: give a number of at least 1")
    if options.seq_length is not None and options.seq_length < 2:
        raise UserError(f"--seq-length {options.seq_length}: give a number of at least 2")
    if options.overlong is not None and options.seq_length is None:
        raise UserError(f"--overlong {options.overlong} would have no effect: it needs --seq-length")
    if options.overlong == "cut" and options.objective == "sft":
        raise UserError("--overlong cut with --objective sft: conversations have no documents to cut; take drop")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = _parser().parse_args(argv)
    _check(options)
    output = Path(options.output)
    if output.name in ("", ".."):
        raise UserError(f"--output {options.output}: is no name for a new folder; give one, such as tokens")
    partial = output.with_name(output.name + ".partial")
    job = Job(
        source=options.train_data,
        tokenizer=TokenizerOptions.of(options),
        objective=options.objective,
        seq_length=options.seq_length,
        overlong=options.overlong or "refuse",
        parts=partial / "parts",
    )
    try:
        return _run(job, output, partial, options.workers)
    except OSError as error:
        if error.filename not in (None, str(output)) and not str(error.filename).startswith(str(partial)):
            raise
        raise UserError(
            f"--output {output}: cannot be written ({system_reason(error)}); what is done is kept: mend that and run "
            "the same command again"
        ) from None


def _run(job: Job, output: Path, partial: Path, workers: int) -> int:
    with as_file(job.source, partial.with_name(partial.name + ".jsonl")) as file:
        return _run_on(replace(job, source=file), job.source, output, partial, workers)


def _run_on(job: Job, source: str, output: Path, partial: Path, workers: int) -> int:
    """The work on a file that holds what ``source`` names."""
    begin = time.monotonic()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give the name of a folder that is not there yet")
    begun = _begun_text(output) or _begun_text(partial)
    tokenizer = job.tokenizer.load(begun.get(template_kwargs.DATE), first_field(job.source, template_kwargs.DATE))
    job = replace(job, tokenizer=job.tokenizer.dated(tokenizer))
    with reporting("reading the file"):
        sha256, parts = scan(job.source)
    settings = {
        "format": FORMAT,
        "version": __version__,
        "objective": job.objective,
        "options": {"seq_length": job.seq_length, "overlong": job.overlong if job.seq_length else None},
        "source": {"bytes": Path(job.source).stat().st_size, "sha256": sha256},
        "text": text_facts(job.tokenizer.folder, tokenizer),
    }
    named = {"file": source, "sequences": LAYOUTS[job.objective]}
    if output.is_dir() and any(output.iterdir()):
        manifest = read_manifest(output)
        if told := differences({key: manifest.get(key) for key in settings}, settings):
            names = ", ".join(name for name, _, _ in told)
            raise UserError(
                f"--output {output}: is there already, made with another {names}; give another name, or delete it"
            )
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{output} is complete: {manifest['counts']['groups']} groups; nothing is left to do")
        return 0
    with held(partial):
        _begin(partial, settings)
        return _make(job, output, partial, workers, parts, settings, named, begin)


def _begun_text(folder: Path) -> dict[str, Any]:
    """`text_facts` of a folder that is complete or begun, {} where there is none."""
    for name in (MANIFEST, SETTINGS):
        try:
            text = json.loads((folder / name).read_text(encoding="utf-8"))["text"]
            return text if isinstance(text, dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _make(
    job: Job,
    output: Path,
    partial: Path,
    workers: int,
    parts: list[Part],
    settings: dict[str, Any],
    named: dict[str, Any],
    begin: float,
) -> int:
    done = {number for number in range(len(parts)) if job.part_file(number).is_file()}
    seen: set[str] = set()
    with ProgressBar(desc="tokenizing", unit="group") as bar:
        for number in sorted(done):
            bar.update(_check_ids(job, number, seen))
        todo = {number: part for number, part in enumerate(parts) if number not in done}
        for number in _tokenize_parts(job, todo, workers) if todo else ():
            bar.update(_check_ids(job, number, seen))
    result = partial / "result"
    found, report = _merge(job, len(parts), result)
    counts = found["counts"]
    if not counts["groups"]:
        raise UserError(no_example(job.source, counts["dropped"], job.seq_length))
    manifest = settings | named | found
    (result / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    result.replace(output)
    shutil.rmtree(partial)
    print("\n".join(report.lines(job.seq_length)) or "nothing was left out")
    print(
        f"wrote {counts['groups']} groups of {counts['tokens']:,} tokens to {output} in "
        f"{time.monotonic() - begin:.1f} s with {workers} workers"
        + (f"; {len(done)} of {len(parts)} parts were done before" if done else "")
    )
    return 0


def _begin(partial: Path, settings: dict[str, Any]) -> None:
    """The folder of what is not complete yet, new or with the same settings; one without a finished part is new."""
    parts, path = partial / "parts", partial / SETTINGS
    parts.mkdir(parents=True, exist_ok=True)
    for aside in parts.glob("*.aside"):
        aside.unlink()
    begun = any(parts.iterdir())
    if begun and path.is_file():
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            made = {}
        refuse_other_settings(partial, made, settings)
        return
    if begun:
        raise UserError(f"{partial}: holds no settings.json, so it cannot be resumed; delete the folder")
    write_aside(path, settings)
