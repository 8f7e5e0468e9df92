"""``solopo prepare-data``: question sets to short and long contexts.

A first pass (first_pass.py) reads and checks everything and puts questions and distractors on disk; a second
(second_pass.py) builds the contexts, in any number of processes, and can be killed and repeated at any moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections import Counter
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo import __version__, template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.data.building.evidence import FINDERS
from megatron_solopo.data.building.first_pass import Ingested, ingest
from megatron_solopo.data.building.second_pass import (
    LEFT_OUT,
    SUMMARY,
    TRAIN,
    VALIDATION,
    BuildSettings,
    Summary,
    build_all,
    left_out_line,
)
from megatron_solopo.data.building.sources import add_source_option, load_source
from megatron_solopo.data.files.inputs import TABLES, fingerprint, place, read_records
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.hf_model import weight_facts
from megatron_solopo.data.memory import release_freed_memory
from megatron_solopo.data.options import (
    TokenizerOptions,
    add_prompt_options,
    add_tokenizer_options,
    check_jsonl,
    check_outputs,
    files_of,
    prompt_format_of,
)
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar, reporting

FIRST_PASS = "first pass"
"""A finished job; the others are batches of the second pass, named by the question they end before."""
DEFAULT_EVIDENCE_DOCUMENTS = 4


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo prepare-data",
        description="Build, for each question, a short and a long context that hold the same gold paragraphs. "
        "A killed run is resumed when the command is repeated.",
    )
    group = parser.add_argument_group("input and output")
    add_source_option(group)
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="question files (.jsonl, .json, .parquet, .csv), folders of them, or hub:NAME[:CONFIG][:SPLIT] for a "
        "data set of the Hugging Face hub (default split: train)",
    )
    group.add_argument(
        "--pool",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="further distractors, records of {title, text} or {text}; the pool always has the questions' paragraphs",
    )
    group.add_argument("--output", required=True, metavar="FILE", help="contexts, JSONL")
    group.add_argument(
        "--limit", type=int, metavar="N", help="use the first N questions; the pool keeps all of them (default: all)"
    )
    group.add_argument(
        "--exclude-ids",
        metavar="FILE",
        help="questions to leave out: a file with one id a line, or a file in a form of --data whose records have ids",
    )
    group.add_argument("--skipped-output", metavar="FILE", help="questions that are not used, JSONL of {id, reason}")
    group.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="fraction of the questions for --validation-output; near-duplicate questions stay together",
    )
    group.add_argument("--validation-output", metavar="FILE", help="contexts for validation, JSONL")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the output is the same (default: 1)"
    )
    group = parser.add_argument_group(
        "sizes: tokens of the whole prompt (98 % to 100 % of N), or documents, gold ones included"
    )
    for unit in ("tokens", "documents"):
        for which in ("short", "long"):
            group.add_argument(
                f"--{which}-{unit}", type=int, metavar="N", help=f"size of the {which} context in {unit}"
            )
    group = parser.add_argument_group("evidence")
    group.add_argument(
        "--gold-depth",
        default="uniform",
        metavar="D",
        help="place of the gold documents; uniform: anywhere (default); 0 to 1: together, from the start to the end",
    )
    group.add_argument(
        "--drop-gold-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="imperfect compression: leave this fraction of the gold documents out of the short contexts, at least one "
        "stays (default: 0)",
    )
    group.add_argument(
        "--evidence",
        choices=FINDERS,
        default="labels",
        help="which documents are gold: the data's labels (default), or those that BM25 or a model's log-prob of the "
        "answer finds; recall is printed where there are labels",
    )
    group.add_argument(
        "--evidence-documents",
        type=int,
        metavar="K",
        help=f"gold documents to find for each question (default: {DEFAULT_EVIDENCE_DOCUMENTS})",
    )
    group.add_argument("--evidence-model", metavar="DIR", help="Hugging Face folder, for --evidence log-prob")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of --evidence-model (default: auto)"
    )
    add_tokenizer_options(parser)
    add_prompt_options(parser)
    group = parser.add_argument_group("randomness")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed; with its id it determines a question's distractors and their order (default: 0)",
    )
    return parser


def _sizes(options: argparse.Namespace) -> tuple[tuple[int, int], bool]:
    tokens, documents = (
        (getattr(options, f"short_{unit}"), getattr(options, f"long_{unit}")) for unit in ("tokens", "documents")
    )
    in_tokens = tokens != (None, None)
    if in_tokens and documents != (None, None):
        raise UserError(
            "option-conflict",
            "set both --short-tokens and --long-tokens, or both --short-documents and --long-documents, not a mixture",
        )
    sizes = tokens if in_tokens else documents
    if None in sizes:
        raise UserError(
            "option-missing",
            "set both --short-tokens and --long-tokens, or both --short-documents and --long-documents",
        )
    unit = "tokens" if in_tokens else "documents"
    if not 0 < sizes[0] <= sizes[1]:
        raise UserError(
            "option-value",
            f"--short-{unit} {sizes[0]} --long-{unit} {sizes[1]}: set positive numbers, "
            "the short one not above the long one",
        )
    return sizes, in_tokens


def _gold_depth(value: str) -> float | None:
    if value == "uniform":
        return None
    try:
        depth = float(value)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise UserError("option-value", f"--gold-depth {value}: set uniform, or a number from 0 (start) to 1 (end)")
    return depth


def _check(options: argparse.Namespace) -> None:
    load_source(options.source)
    for flag, value in (
        ("--limit", options.limit),
        ("--workers", options.workers),
        ("--evidence-documents", options.evidence_documents),
    ):
        if value is not None and value < 1:
            raise UserError("option-value", f"{flag} {value}: must be at least 1")
    if not 0 <= options.drop_gold_fraction < 1:
        raise UserError(
            "option-value", f"--drop-gold-fraction {options.drop_gold_fraction}: must be at least 0 and below 1"
        )
    if (options.validation_fraction is None) != (options.validation_output is None):
        raise UserError("option-missing", "set --validation-fraction and --validation-output together, or neither")
    if options.validation_fraction is not None and not 0 < options.validation_fraction < 1:
        raise UserError(
            "option-value", f"--validation-fraction {options.validation_fraction}: must be above 0, below 1"
        )
    if options.evidence == "labels" and options.evidence_documents is not None:
        raise UserError(
            "option-unused",
            "--evidence-documents: the labels mark the gold documents; use it with --evidence bm25",
        )
    if options.evidence == "log-prob" and options.evidence_model is None:
        raise UserError("option-missing", "--evidence log-prob needs --evidence-model DIR")
    if options.evidence != "log-prob" and options.evidence_model is not None:
        raise UserError("option-unused", "--evidence-model: only --evidence log-prob runs a model; remove the option")
    if options.evidence == "log-prob" and options.workers > 1:
        raise UserError(
            "option-conflict",
            f"--workers {options.workers}: --evidence log-prob runs one model in one process; set --workers 1",
        )
    if options.device != "auto" and options.evidence != "log-prob":
        raise UserError(
            "option-unused", f"--device {options.device}: only --evidence log-prob runs a model; remove the option"
        )
    outputs = [
        ("--output", options.output),
        ("--validation-output", options.validation_output),
        ("--skipped-output", options.skipped_output),
    ]
    read = [(flag, place(name)) for flag in ("--data", "--pool") for name in getattr(options, flag[2:])]
    check_outputs(outputs, [*read, ("--exclude-ids", options.exclude_ids), *files_of(options)])
    for flag, path in outputs:
        check_jsonl(flag, path)


def _excluded(path: str | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    if not Path(path).is_file():
        raise UserError("file-missing", f"--exclude-ids {path}: no such file; name a file with one id a line")
    table = Path(path).suffix in TABLES
    text = "" if table else read_text("--exclude-ids", path).strip()
    ids = set()
    if not table and not text.startswith(("{", "[")):
        ids.update(filter(None, map(str.strip, text.splitlines())))
    else:
        for where, record in read_records([path]):
            record_id = record.get("id", record.get("_id"))
            if not isinstance(record_id, str | int):
                raise UserError(
                    "field-missing", f"--exclude-ids {where}: the record has no 'id' that is a text or a number"
                )
            ids.add(str(record_id))
    if not ids:
        raise UserError("data-empty", f"--exclude-ids {path}: holds no id; remove the option or fill the file")
    return frozenset(ids)


def _settings(
    options: argparse.Namespace, build: BuildSettings, excluded: frozenset[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    """Everything that decides the output's bytes."""
    how = dataclasses.asdict(build)
    del how["tokenizer"]  # file names; `text_facts` has their contents
    if build.evidence_model:
        how["evidence_weights"] = weight_facts(build.evidence_model)
    if digest := load_source(build.source).digest:
        how["source_code"] = digest
    return {
        **how,
        **text_facts(build.tokenizer.folder, tokenizer),
        "version": __version__,
        "input": fingerprint(options.data),
        "pool": fingerprint(options.pool),
        "exclude_ids": hashlib.sha256(json.dumps(sorted(excluded)).encode()).hexdigest(),
        "limit": options.limit,
        "validation_fraction": options.validation_fraction,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    sizes, in_tokens = _sizes(options)
    _check(options)
    excluded = _excluded(options.exclude_ids)
    build = BuildSettings(
        tokenizer=TokenizerOptions.of(options),
        prompt_format=prompt_format_of(options),
        sizes=sizes,
        in_tokens=in_tokens,
        source=options.source,
        seed=options.seed,
        gold_depth=_gold_depth(options.gold_depth),
        drop_gold_fraction=options.drop_gold_fraction,
        evidence=options.evidence,
        evidence_documents=options.evidence_documents or DEFAULT_EVIDENCE_DOCUMENTS,
        evidence_model=options.evidence_model,
        device=options.device,
    )
    start = time.monotonic()
    output = Path(options.output)
    folder = output.with_name(output.name + ".work")
    with Jobs(folder, (TRAIN, VALIDATION, LEFT_OUT)) as jobs:
        tokenizer = build.tokenizer.load(of_resumed=jobs.settings.get(template_kwargs.DATE))
        build = dataclasses.replace(build, tokenizer=build.tokenizer.dated(tokenizer))
        with reporting("reading the inputs"):
            jobs.begin(_settings(options, build, excluded, tokenizer), preparation=(FIRST_PASS,))
        prepared = _prepared(jobs, options, build, excluded, TokenCounter(tokenizer))
        read = time.monotonic() - start
        summary = _build(jobs, options, build, prepared, tokenizer)
    print("\n".join([*prepared.notes, *summary.lines()]))
    seconds = time.monotonic() - start
    print(
        f"wrote {summary.counts['kept']} questions to {_targets(options)} in {seconds:.1f} s "
        f"(reading and lengths {read:.1f} s, contexts {seconds - read:.1f} s)"
    )
    return 0


def _prepared(
    jobs: Jobs, options: argparse.Namespace, build: BuildSettings, excluded: frozenset[str], counter: TokenCounter
) -> Ingested:
    """Returns the result of the first pass, which runs now or ran in a killed run of the same settings."""
    if jobs.empty:
        ingested = ingest(
            jobs.place,
            source=options.source,
            inputs=options.data,
            pool=options.pool,
            prompt_format=build.prompt_format,
            count=counter.texts if build.in_tokens else None,
            labelled=options.evidence == "labels",
            exclude=excluded,
            limit=options.limit,
            validation_fraction=options.validation_fraction or 0.0,
            seed=options.seed,
        )
        lines = b"".join(left_out_line(question_id, reason) for question_id, reason in ingested.left_out)
        jobs.add(FIRST_PASS, {"found": dataclasses.asdict(ingested)}, {LEFT_OUT: lines})
        release_freed_memory()  # before processes of the second pass allocate theirs
    prepared = Ingested(**next(jobs.finished())["found"])
    print(f"{prepared.questions} questions, {prepared.paragraphs} distinct paragraphs to draw distractors from")
    return prepared


def _build(
    jobs: Jobs,
    options: argparse.Namespace,
    build: BuildSettings,
    prepared: Ingested,
    tokenizer: PreTrainedTokenizerBase,
) -> Summary:
    """Builds what a killed run has not built yet, and puts the files in their places."""
    summary, done = Summary(left_out=Counter(reason for _, reason in prepared.left_out)), 0
    for job in islice(jobs.finished(), 1, None):
        summary.merge(SUMMARY.validate_python(job["summary"]))
        done = job["job"]
    if done:
        print(f"resuming: {done} of {prepared.questions} questions were done before")
    batches = build_all(jobs.place, build, tokenizer, start=done, stop=prepared.questions, workers=options.workers)
    with ProgressBar(desc="contexts", total=prepared.questions, initial=done, unit="question") as bar:
        for batch in batches:
            summary.merge(batch.summary)
            bar.update(batch.stop - done)
            done = batch.stop
            jobs.add(done, {"summary": SUMMARY.dump_python(batch.summary)}, batch.parts)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in summary.left_out.most_common())
    if not summary.counts["kept"]:
        jobs.remove()  # there is nothing in it
        raise UserError(
            "questions-unusable",
            f"no question could be used ({reasons or 'the input is empty'}); change the sizes, the input or --pool",
        )
    if options.validation_fraction is not None:
        for side, kept in (
            ("validation", summary.counts["validation"]),
            ("training", summary.counts["kept"] - summary.counts["validation"]),
        ):
            if not kept:
                jobs.remove()
                raise UserError(
                    "validation-split-empty",
                    f"--validation-fraction {options.validation_fraction}: no question for {side} could be used "
                    f"({reasons}); set another fraction, or change the sizes, the input or --pool",
                )
    targets = {TRAIN: options.output, VALIDATION: options.validation_output, LEFT_OUT: options.skipped_output}
    jobs.put({name: target for name, target in targets.items() if target})
    jobs.remove()
    return summary


def _targets(options: argparse.Namespace) -> str:
    return " and ".join(filter(None, (options.output, options.validation_output)))
