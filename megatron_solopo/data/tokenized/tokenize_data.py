"""``solopo tokenize-data``: a data file to a folder of token ids that training opens by mmap (token_store.py).

The file is cut into parts of some megabytes, which depend on its bytes alone. Every worker tokenises one part after the
other, and what it made is appended to the result in the order of the parts. So the result does not depend on the number
of workers, memory not on the size of the file, and a killed run resumes with the parts that are not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_solopo import __version__, template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import put_folder
from megatron_solopo.data.files.inputs import as_file, first_field
from megatron_solopo.data.files.jobs import Jobs, differences
from megatron_solopo.data.files.records import Part, read_records, scan, write_jsonl
from megatron_solopo.data.options import TokenizerOptions, add_tokenizer_options
from megatron_solopo.data.schema import read_conversations, read_groups
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.token_store import (
    BOTH_PAIRS,
    FORMAT,
    LAYOUTS,
    MANIFEST,
    SHORT_PAIR,
    indexed_dataset,
    overlong_records,
    read_manifest,
    sequences_of,
)
from megatron_solopo.data.tokenized.tokens import (
    CONVERSATION,
    Dropped,
    Encoder,
    Report,
    Shortened,
    digest_of,
    no_example,
)
from megatron_solopo.data.workers import Work, map_in_order
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.progress import ProgressBar, reporting

RESULT = "result"
"""The folder, in that of the unfinished work, which becomes the output."""

TOKENS, DIGESTS = f"{RESULT}/tokens.bin", f"{RESULT}/digests.bin"


@dataclass(frozen=True)
class Job:
    """What every worker does to its parts."""

    source: str
    tokenizer: TokenizerOptions
    objective: str
    seq_length: int | None
    overlong: str


@dataclass(frozen=True)
class TokenizedPart:
    """What a part becomes.

    Attributes:
        known: what the jobs file notes: ids, the lengths of their sequences, the report and the largest token.
        tokens: all sequences, int32.
        digests: of each sequence.
    """

    number: int
    known: dict[str, Any]
    tokens: bytes
    digests: bytes


def tokenize_part(job: Job, tokenizer: PreTrainedTokenizerBase, number: int, part: Part) -> TokenizedPart:
    encoder = Encoder(tokenizer, job.seq_length, job.overlong)
    read = read_conversations if job.objective == "sft" else read_groups
    ids: list[str] = []
    tokens: list[bytes] = []
    lengths: list[list[int]] = []
    digests: list[bytes] = []
    largest: tuple[int, str] = (-1, "")
    for record in read(job.source, part):
        if job.objective == "sft":
            scored = CONVERSATION
        else:
            scored = SHORT_PAIR if record.long_messages is None else BOTH_PAIRS
        try:
            group = encoder.encode(record, scored)
        except UserError as error:
            raise UserError(f"{job.source}: {error}") from None
        if group is None:
            continue
        sequences = sequences_of(group, job.objective)
        ids.append(group.id)
        tokens += [np.asarray(sequence, dtype=np.int32).tobytes() for sequence in sequences]
        lengths.append([len(sequence) for sequence in sequences])
        digests += [digest_of(sequence) for sequence in sequences]
        largest = max(largest, (max(max(sequence) for sequence in group.sequences()), group.id), key=lambda f: f[0])
    known = {"ids": ids, "lengths": lengths, "report": asdict(encoder.report), "largest": largest}
    return TokenizedPart(number, known, b"".join(tokens), b"".join(digests))


def _work_of(job: Job) -> Work:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's own threads: processes are what --workers counts
    return partial(tokenize_part, job, job.tokenizer.load())


def tokenize_parts(job: Job, todo: dict[int, Part], workers: int) -> Iterator[TokenizedPart]:
    """Tokenises parts, here or in several processes, and yields each in order."""
    yield from map_in_order(_work_of, (job,), list(todo.items()), workers)


def _complete(jobs: Jobs, objective: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Report]:
    """Writes the files of the result that are not there yet; returns the manifest and the report."""
    result = jobs.stream(RESULT)
    builder = indexed_dataset().IndexedDatasetBuilder(os.devnull, dtype=np.int32)  # for the index; tokens.bin is there
    report, largest = Report(), (-1, "")
    with (result / "ids.jsonl").open("w", encoding="utf-8") as ids:
        for job in jobs.finished():
            for lengths in job["lengths"]:
                builder.sequence_lengths.extend(lengths)
                builder.document_indices.append(len(builder.sequence_lengths))
            ids.writelines(json.dumps(name, ensure_ascii=False) + "\n" for name in job["ids"])
            report.add(_report(job["report"]))
            largest = max(largest, tuple(job["largest"]), key=lambda found: found[0])
    builder.finalize(str(result / "tokens.idx"))
    write_jsonl(result / "overlong.jsonl", overlong_records(report))
    files = {}
    for name in ("tokens.bin", "tokens.idx", "digests.bin", "ids.jsonl", "overlong.jsonl"):
        with (result / name).open("rb") as file:
            files[name] = {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    groups = len(builder.document_indices) - 1
    counts = {
        "groups": groups,
        "tokens": sum(builder.sequence_lengths),
        "dropped": len(report.dropped),
        "cut": len(report.cut),
        "ids_used": report.ids_used,
        "ids_mismatched": report.ids_mismatched,
        "control_tokens_as_text": len(report.spelled),
        "thoughts_not_closed": len(report.open),
    }
    named = {"sequences": LAYOUTS[objective], "largest_token": {"id": largest[0], "group": largest[1]}}
    manifest = settings | named | {"counts": counts, "files": files}
    return manifest, report


def _report(fields: dict[str, Any]) -> Report:
    return Report(
        [Dropped(*values) for values in fields["dropped"]],
        [Shortened(*values) for values in fields["cut"]],
        fields["ids_used"],
        fields["ids_mismatched"],
        fields.get("spelled", []),
        fields.get("open", []),
    )


def _check_ids(job: Job, known: dict[str, Any], seen: set[str]) -> int:
    """Refuses an id that an earlier part has; returns the number of ids."""
    names = [*known["ids"], *(dropped[0] for dropped in known["report"]["dropped"])]
    for name in names:
        if name in seen and job.objective == "preference":  # conversations may share one, as they may in a file
            places = [where for where, record in read_records(job.source) if str(record.get("id")) == name]
            raise UserError(f"{places[1]}: the id {name!r} was used before at {places[0]}; ids must be unique")
        seen.add(name)
    return len(names)


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo tokenize-data",
        description="Tokenise a data file once, into a folder that --train-data and --valid-data take. A killed run "
        "continues where it was when the command is repeated.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="preference groups or conversations: JSONL, Parquet, a JSON array, CSV, a folder of such files or of "
        "save_to_disk, or hub:NAME[:CONFIG][:SPLIT]",
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
    options = build_parser().parse_args(argv)
    _check(options)
    output = Path(options.output)
    if output.name in ("", ".."):
        raise UserError(f"--output {options.output}: is no name for a new folder; give one, such as tokens")
    job = Job(
        source=options.data,
        tokenizer=TokenizerOptions.of(options),
        objective=options.objective,
        seq_length=options.seq_length,
        overlong=options.overlong or "refuse",
    )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give the name of a folder that is not there yet")
    work = output.with_name(output.name + ".partial")
    try:
        aside = work.with_name(work.name + ".jsonl")
        with Jobs(work, (TOKENS, DIGESTS)) as jobs, as_file(job.source, aside) as file:
            return _run(replace(job, source=file), job.source, output, jobs, options.workers)
    except OSError as error:
        if error.filename not in (None, str(output)) and not str(error.filename).startswith(str(work)):
            raise
        raise UserError(
            f"--output {output}: cannot be written ({system_reason(error)}); what is done is kept: mend that and run "
            "the same command again"
        ) from None


def _run(job: Job, source: str, output: Path, jobs: Jobs, workers: int) -> int:
    """The work on a file that holds what ``source`` names."""
    begin = time.monotonic()
    begun = _text_of(output) or jobs.settings.get("text", {})
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
    if output.is_dir() and any(output.iterdir()):
        manifest = read_manifest(output)
        if differing := differences({key: manifest.get(key) for key in settings}, settings):
            names = ", ".join(name for name, _, _ in differing)
            raise UserError(
                f"--output {output}: is there already, made with another {names}; give another name, or delete it"
            )
        jobs.remove()
        print(f"{output} is complete: {manifest['counts']['groups']} groups; nothing is left to do")
        return 0
    jobs.begin(settings)
    done = _tokenize(job, parts, jobs, workers)
    manifest, report = _complete(jobs, job.objective, settings | {"file": source})
    counts = manifest["counts"]
    if not counts["groups"]:
        raise UserError(no_example(job.source, counts["dropped"], job.seq_length))
    result = jobs.stream(RESULT)
    (result / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    put_folder(result, output)
    jobs.remove()
    print("\n".join(report.lines(job.seq_length)) or "nothing was left out")
    print(
        f"wrote {counts['groups']} groups of {counts['tokens']:,} tokens to {output} in "
        f"{time.monotonic() - begin:.1f} s with {workers} workers"
        + (f"; {done} of {len(parts)} parts were done before" if done else "")
    )
    return 0


def _text_of(folder: Path) -> dict[str, Any]:
    """`text_facts` of a complete folder, {} where there is none."""
    try:
        text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["text"]
        return text if isinstance(text, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _tokenize(job: Job, parts: list[Part], jobs: Jobs, workers: int) -> int:
    """Tokenises the parts that a killed run has not finished; returns how many it has."""
    seen: set[str] = set()
    with ProgressBar(desc="tokenizing", unit="group") as bar:
        for known in jobs.finished():
            bar.update(_check_ids(job, known, seen))
        done = len(jobs.lines)
        for part in tokenize_parts(job, {n: part for n, part in enumerate(parts) if n not in jobs}, workers):
            jobs.add(part.number, part.known, {TOKENS: part.tokens, DIGESTS: part.digests})
            bar.update(_check_ids(job, part.known, seen))
    return done
