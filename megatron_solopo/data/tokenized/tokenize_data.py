"""``solopo tokenize-data``: a data file to a token store (token_store.py), a folder of the user's choice."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.data.files.inputs import as_file, first_field
from megatron_solopo.data.files.jobs import Jobs, differences
from megatron_solopo.data.options import TokenizerOptions, add_tokenizer_options
from megatron_solopo.data.tokenized.make_store import STREAM, Job, Plan, make
from megatron_solopo.data.tokenized.token_store import MANIFEST, read_manifest
from megatron_solopo.data.tokenized.token_table import COLUMNS
from megatron_solopo.errors import UserError, system_reason


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo tokenize-data",
        description="Tokenize a data file once, into a folder that --train-data and --valid-data accept. A killed run "
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
        "--objective", choices=sorted(COLUMNS), default="preference", help="what the file holds (default: preference)"
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="longest prompt plus response in tokens, on both contexts (default: no limit; training applies one too)",
    )
    parser.add_argument(
        "--overlong",
        choices=("refuse", "drop", "cut"),
        help="examples beyond --seq-length; refuse: the file; drop: leave them out and list them; cut: shorten their "
        "contexts by distractor text (default: refuse)",
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
        raise UserError("option-value", f"--workers {options.workers}: must be at least 1")
    if options.seq_length is not None and options.seq_length < 2:
        raise UserError("option-value", f"--seq-length {options.seq_length}: must be at least 2")
    if options.overlong is not None and options.seq_length is None:
        raise UserError("option-unused", f"--overlong {options.overlong} would have no effect: it needs --seq-length")
    if options.overlong == "cut" and options.objective == "sft":
        raise UserError(
            "option-conflict",
            "--overlong cut with --objective sft: conversations have no documents to cut; use --overlong drop",
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    _check(options)
    output = Path(options.output)
    if output.name in ("", ".."):
        raise UserError("option-value", f"--output {options.output}: names no new folder; set one, such as tokens")
    job = Job(
        source=options.data,
        tokenizer=TokenizerOptions.of(options),
        objective=options.objective,
        seq_length=options.seq_length,
        overlong=options.overlong or "refuse",
    )
    if output.exists() and not output.is_dir():
        raise UserError("not-a-folder", f"--output {output}: is a file; set the name of a new folder")
    work = output.with_name(output.name + ".partial")
    try:
        aside = work.with_name(work.name + ".jsonl")
        with Jobs(work, (STREAM,)) as jobs, as_file(job.source, aside) as file:
            return _run(replace(job, source=file), job.source, output, jobs, options.workers)
    except OSError as error:
        if error.filename not in (None, str(output)) and not str(error.filename).startswith(str(work)):
            raise
        raise UserError(
            "write-failed",
            f"--output {output}: cannot be written ({system_reason(error)}); finished parts are kept: correct that and "
            "run the same command again",
        ) from None


def _run(job: Job, source: str, output: Path, jobs: Jobs, workers: int) -> int:
    """The work on a file that holds what ``source`` names."""
    start = time.monotonic()
    earlier = _text_of(output) or jobs.settings.get("text", {})
    date = template_kwargs.DATE
    plan = Plan.of(job, job.tokenizer.load(earlier.get(date), first_field(job.source, date)))
    if output.is_dir() and any(output.iterdir()):
        manifest = read_manifest(output)
        if differing := differences({key: manifest.get(key) for key in plan.settings}, plan.settings):
            names = ", ".join(name for name, _, _ in differing)
            raise UserError(
                "output-other-settings",
                f"--output {output}: exists already, with another {names}; choose another name, or delete it",
            )
        jobs.remove()
        print(f"{output} is complete: {manifest['counts']['examples']} examples; nothing is left to do")
        return 0
    counts, report, done = make(plan, output, jobs, workers, source)
    print("\n".join(report.lines(job.seq_length)) or "nothing was left out")
    print(
        f"wrote {counts['examples']} examples of {counts['tokens']:,} tokens to {output} in "
        f"{time.monotonic() - start:.1f} s with {workers} workers"
        + (f"; {done} of {len(plan.parts)} parts were done before" if done else "")
    )
    return 0


def _text_of(folder: Path) -> dict[str, Any]:
    """`text_facts` of a complete folder, {} where there is none."""
    try:
        text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["text"]
        return text if isinstance(text, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
