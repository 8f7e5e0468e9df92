"""``solopo benchmark``: speed and memory of training, against its FLOP floor, a baseline and TRL."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.benchmark.cases import (
    LONG,
    LONGEST,
    MODELS,
    MODES,
    PLAIN,
    SFT,
    SPEED,
    SUITES,
    TRL,
    Case,
    Setting,
    Table,
    on_machine,
)
from megatron_solopo.config import flag
from megatron_solopo.environment import memory_gib, usable_cores
from megatron_solopo.errors import UserError, require
from megatron_solopo.terminal import write_line

SHARED, SEPARATE = "shared", "separate"
FULL, NONE = "full", "none"
CLOCKS = ("seconds", "cpu")
OF_SUITES, OF_LENGTHS, OF_TIMES = ("tables",), ("memory_limit",), ("floor", "profile", "rounds", "steps", "clock")
"""Options that have an effect on a suite, on the longest context and on times alone."""


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo benchmark",
        description="Trains generated pairs on a model with random weights, each case in processes of its own, in turn "
        "with the others (A B A B), and writes medians and spread of time, memory and ratios as JSON, Markdown and a "
        "figure. Either a suite, or a table of all combinations of the options under 'table'.",
    )
    add = parser.add_argument_group("suite").add_argument
    add("--suite", choices=list(SUITES), help="tables with fixed sizes: quick takes minutes, full over an hour")
    add("--tables", nargs="+", metavar="NAME", help="of the suite, these alone")
    add = parser.add_argument_group("table").add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or a Hugging Face folder whose config.json is read")
    add("--vocab-size", type=_at_least(256), default=32000, help="of one of these models (default: %(default)s)")
    add("--modes", nargs="+", choices=MODES, default=["solo"], help="context modes, or sft (default: solo)")
    add("--losses", nargs="+", default=["dpo"], metavar="LOSS", help="preference losses (default: dpo)")
    add(
        "--prompts",
        nargs="+",
        choices=(SHARED, SEPARATE),
        default=[SHARED],
        help="computed once for their responses, or for each (default: shared)",
    )
    add("--recompute", nargs="+", choices=(NONE, FULL), default=[NONE], help="of activations (default: none)")
    add(
        "--responses",
        nargs="+",
        type=_counts,
        default=[(1, 1)],
        metavar="KxM",
        help="chosen x rejected responses of a group, such as 1x1 4x4 (default: 1x1)",
    )
    add("--options", default="", metavar="TEXT", help="further options of solopo train for all its cases, quoted")
    add("--against", choices=(TRL,), help="adds TRL's DPOTrainer on the long context; mode long is compared with it")
    add("--floor", action="store_true", help="adds plain training on one sequence, long and short: the FLOP floor")
    add("--long-tokens", type=_at_least(64), default=4096, help="of the long prompt (default: %(default)s)")
    add("--short-tokens", type=_at_least(16), default=512, help="of the short prompt (default: %(default)s)")
    add("--response-tokens", type=_at_least(2), default=64, help="of each response (default: %(default)s)")
    add("--pairs", type=_at_least(1), default=1, help="a step (default: %(default)s)")
    add("--bf16", action="store_true", help="parameters in bfloat16 instead of float32")
    add("--rounds", type=_at_least(1), default=3, help="processes of each case (default: %(default)s)")
    add("--steps", type=_at_least(1), default=2, help="timed steps of a process (default: %(default)s)")
    add(
        "--longest-context",
        action="store_true",
        help="instead of time: the longest context of each case within --memory-limit, from --long-tokens upwards",
    )
    add(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="above the process's memory before the model is built; default: four times weights, gradients and "
        "moments in float32",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--threads", type=_at_least(1), help="of each process; default: the cores of this machine")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda where there is one")
    add(
        "--clock",
        choices=CLOCKS,
        default="seconds",
        help="of ratios: seconds of the clock, or cpu: processor time, for machines that compute something else too "
        "(default: seconds)",
    )
    add("--profile", action="store_true", help="name the three largest costs of a step of each case")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="results.json, results.md, results.png, and a file of each finished table, which is not measured again",
    )
    add("--overwrite", action="store_true", help="measure finished tables again")
    add("--page", metavar="FILE.md", help="also write the tables between the marks of this page")
    add("--baseline", metavar="FILE", help="compare ratios with these; exit status 1 where one has regressed")
    add("--tolerance", type=float, default=0.05, help="share that a ratio may be worse (default: %(default)s)")
    add("--write-baseline", metavar="FILE", help="write the ratios as a baseline")
    return parser


def _at_least(least: int) -> Any:
    def whole(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError
        return number

    whole.__name__ = f"whole number of at least {least}"
    return whole


def _counts(text: str) -> tuple[int, int]:
    """Returns (chosen, rejected) of "4x8"."""
    chosen, rejected = map(int, text.split("x"))
    if chosen < 1 or rejected < 1:
        raise ValueError
    return chosen, rejected


_counts.__name__ = "number of chosen x number of rejected, such as 4x8"


def tables_of(options: Any, explicit: set[str]) -> list[Table]:
    """Returns the tables that a command line asks for.

    Raises:
        UserError: options that contradict each other or would have no effect.
    """
    of_tables = {
        "model", "vocab_size", "modes", "losses", "prompts", "recompute", "responses", "options", "against", "floor",
        "long_tokens", "short_tokens", "response_tokens", "pairs", "bf16", "rounds", "steps", "longest_context",
        "memory_limit",
    }  # fmt: skip
    if options.suite:
        if unused := sorted(of_tables & explicit):
            raise UserError(
                "option-conflict", f"{flag(unused[0])}: --suite has sizes of its own; leave one of both out"
            )
        tables = SUITES[options.suite]
        for name in options.tables or []:
            if name not in (known := [table.name for table in tables]):
                raise UserError("option-value", f"--tables {name}: the suite has {', '.join(known)}")
        return [table for table in tables if not options.tables or table.name in options.tables]
    if not options.model:
        raise UserError("option-missing", "set --suite quick, --suite full or --model")
    if unused := sorted(set(OF_SUITES) & explicit):
        raise UserError("option-conflict", f"{flag(unused[0])}: needs --suite")
    sft_alone = set(options.modes) == {SFT}
    for names, refused, why in (
        (OF_LENGTHS, not options.longest_context, "needs --longest-context"),
        (OF_TIMES, options.longest_context, "--longest-context measures no time"),
        (("losses", "prompts", "responses"), sft_alone, "--modes sft has neither pairs nor shared prompts"),
        (("short_tokens",), options.longest_context, "--longest-context makes it an eighth of the long prompt"),
        (("short_tokens",), not options.floor and set(options.modes) <= {LONG, SFT}, "no mode reads the short prompt"),
    ):
        if refused and (unused := sorted(set(names) & explicit)):
            raise UserError("option-conflict", f"{flag(unused[0])}: {why}; leave it out")
    if options.against and options.responses != [(1, 1)]:
        raise UserError("option-conflict", "--responses: TRL's trainer takes pairs; leave --against or this out")
    if options.model not in MODELS and "vocab_size" in explicit:
        raise UserError("option-conflict", f"--vocab-size: {options.model} has a vocabulary of its own")
    return [_table(options)]


def _table(options: Any) -> Table:
    """Returns the table of all combinations."""
    cases = list[Case]()
    more = tuple(shlex.split(options.options))
    for recompute in (word == FULL for word in options.recompute):
        for mode in options.modes:
            if mode == SFT:
                cases.append(Case(mode=SFT, recompute=recompute, options=more))
                continue
            cases += [
                Case(
                    mode=mode,
                    loss=loss,
                    share=prompts == SHARED,
                    recompute=recompute,
                    chosen=chosen,
                    rejected=rejected,
                    options=more,
                )
                for loss in options.losses
                for prompts in options.prompts
                for chosen, rejected in options.responses
            ]
        cases += [Case(TRL, LONG, recompute=recompute)] if options.against else []
    if options.floor:
        cases = [*PLAIN, *(case for case in cases if case not in PLAIN)]
    setting = Setting(
        model=options.model,
        vocab_size=options.vocab_size,
        long=options.long_tokens,
        short=options.short_tokens,
        response=options.response_tokens,
        pairs=options.pairs,
        bf16=options.bf16,
    )
    kind = LONGEST if options.longest_context else SPEED
    limit = int((options.memory_limit or 0) * 2**30)
    return Table(
        "table", f"{Path(options.model).name}", setting, tuple(cases), kind, options.rounds, options.steps, limit
    )


def main(argv: list[str] | None = None) -> int:
    """Measures; returns 1 where a ratio has regressed against --baseline, else 0."""
    parser = build_parser()
    options = parser.parse_args(argv)
    tables = tables_of(options, parser.explicit)
    if "tolerance" in parser.explicit and not options.baseline:
        raise UserError("option-conflict", "--tolerance: needs --baseline")
    for package in ("matplotlib", "pandas", "tabulate"):
        require("solopo benchmark", package, "report")
    from megatron_solopo.benchmark.measure import machine, measured
    from megatron_solopo.benchmark.ratios import compared, ratios_of, read_baseline, write_baseline
    from megatron_solopo.benchmark.report import page_parts
    from megatron_solopo.parallel.platform import choose

    threads = options.threads or max(1, int(usable_cores()))
    tables = on_machine(tables, threads, choose(options.device))
    check(tables, options)
    kind = machine(tables[0].setting)["kind"]
    baseline = read_baseline(Path(options.baseline), kind, options.clock) if options.baseline else None
    if options.page:
        page_parts(Path(options.page))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    records = [_record(table, output, options, measured) for table in tables]
    for name in _write(records, output, options):
        print(f"wrote {name}")
    ratios = [ratio for record in records for ratio in ratios_of(record, options.clock)]
    if options.write_baseline:
        write_baseline(Path(options.write_baseline), kind, options.clock, ratios)
    if baseline is None:
        return 0
    lines, failed = compared(baseline, ratios, options.tolerance)
    print("\n".join(lines))
    return int(failed)


def check(tables: Sequence[Table], options: Any) -> None:
    """Refuses what every case would fail at, before the first one.

    Raises:
        UserError: names the option.
    """
    from megatron_solopo import config_load
    from megatron_solopo.benchmark.jobs import Job, model_fields, options_of
    from megatron_solopo.benchmark.trl import check_installed

    available = memory_gib()["available"]
    for table in tables:
        model_fields(table.setting)
        for case in table.cases:
            if case.side == TRL:
                check_installed("--against trl" if not options.suite else f"--suite {options.suite}")
            else:
                config_load.load(options_of(Job(table.setting, case, "unused")))
        if table.limit / 2**30 > available:
            raise UserError(
                "memory-limit",
                f"--memory-limit {table.limit / 2**30:g}: this machine has {available:g} GiB available; lower it",
            )


def _record(table: Table, output: Path, options: Any, measured: Any) -> dict[str, Any]:
    """Returns the record of a table: that of an earlier start, or a new one, which is written."""
    from megatron_solopo.benchmark.measure import kept

    if not options.overwrite and (record := kept(output, table)) is not None:
        write_line(f"{table.name}: measured before ({output / table.name}.json); --overwrite measures it again")
        return record
    record = measured(table, options.profile, write_line)
    write_text(output / f"{table.name}.json", json.dumps(record, indent=1) + "\n")
    return record


def _write(records: Sequence[dict[str, Any]], output: Path, options: Any) -> list[Path]:
    """Writes JSON, Markdown and figure of all tables; returns the files."""
    from dataclasses import asdict

    from megatron_solopo.benchmark.ratios import ratios_of
    from megatron_solopo.benchmark.report import draw, markdown, write_page

    ratios = [asdict(ratio) for record in records for ratio in ratios_of(record, options.clock)]
    document = {"clock": options.clock, "ratios": ratios, "tables": records}
    text = markdown(records, options.clock)
    files = [output / f"results.{ending}" for ending in ("json", "md", "png")]
    write_text(files[0], json.dumps(document, indent=1) + "\n")
    write_text(files[1], f"# Benchmark\n\n{text}")
    draw(files[2], records)
    if options.page:
        write_page(Path(options.page), text)
        files.append(Path(options.page))
    return files
