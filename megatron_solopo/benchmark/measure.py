"""Measurements of a table: each case in processes of its own, in turn with the others."""

from __future__ import annotations

import json
import os
import platform as system
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_solopo.benchmark.cases import LONGEST, SOLOPO, Case, Setting, Table
from megatron_solopo.benchmark.jobs import Job, options_of, write_inputs
from megatron_solopo.benchmark.longest import Search, longest
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import loads

Figures = dict[str, Any]
Say = Callable[[str], None]

STATES_BYTES = 16
"""Of a parameter in float32: weight, gradient and Adam's two moments."""
STATES = 4
"""The default memory limit of `LONGEST`, in states."""


def in_a_process(job: Job) -> Figures:
    """Measures a job in a process of its own.

    Raises:
        UserError: it failed; the message has its last line.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    job.write(folder / "job.json")
    threads = str(job.setting.threads)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(folder / "datasets")}
    environment = os.environ | quiet | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", f"{__package__}.jobs", str(folder / "job.json"), str(folder / "result.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError("benchmark-failed", f"{job.case.name}: {lines[-1].removeprefix('error: ')}")
    return loads((folder / "result.json").read_text(encoding="utf-8"))


def measured(table: Table, profile: bool, say: Say) -> Figures:
    """Measures a table and returns its record, which JSON can hold.

    Args:
        profile: one more step of each case is profiled, in its last round.
        say: prints a line of progress.

    Raises:
        UserError: see `in_a_process`.
    """
    start = time.time()
    work = _longest if table.kind == LONGEST else _speed
    with tempfile.TemporaryDirectory(prefix="solopo-benchmark-") as folder:
        cases = work(table, Path(folder), profile, say)
    when = time.strftime("%Y-%m-%d", time.gmtime(start))
    record = {"table": asdict(table), "machine": machine(table.setting), "when": when, "cases": cases}
    return json.loads(json.dumps(record))  # as it is read back from its file


def as_json(table: Table) -> Figures:
    """Returns a table as JSON reads it back: a finished one with the same content is not measured again."""
    return json.loads(json.dumps(asdict(table)))


def machine(setting: Setting) -> Figures:
    """Returns what the machine is; ``kind`` names the machines whose ratios are compared."""
    import torch

    from megatron_solopo.environment import package_version, usable_cores

    if setting.device == "cuda":
        name = torch.cuda.get_device_name(0)
        kind = name.lower().replace(" ", "-")
    else:
        name = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "CPU")
        kind = f"cpu-{system.machine()}-{setting.threads}-threads"
    packages = {package: package_version(package) for package in ("torch", "megatron-core", "transformers", "trl")}
    return {"kind": kind, "name": name, "cores": usable_cores(), "threads": setting.threads, **packages}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _speed(table: Table, folder: Path, profile: bool, say: Say) -> list[Figures]:
    rounds: dict[Case, list[Figures]] = {case: [] for case in table.cases}
    for number in range(table.rounds):
        for place, case in enumerate(table.cases):
            last = number == table.rounds - 1
            job = Job(
                table.setting, case, str(folder / f"{number}-{place}"), steps=table.steps, profile=profile and last
            )
            figures = in_a_process(job)
            rounds[case].append(figures)
            seconds = ", ".join(f"{second:.2f}" for second in figures["seconds"])
            say(f"{table.name}: round {number + 1} of {table.rounds}: {case.name}: {seconds} s a step")
    kinds = rehearsed(table, folder / "rehearsed", say)
    return [
        {"name": case.name, "case": asdict(case), "rounds": each, "memory_gib": kinds.get(case)}
        for case, each in rounds.items()
    ]


def rehearsed(table: Table, folder: Path, say: Say) -> dict[Case, dict[str, float]]:
    """Returns the GiB by kind that the planner rehearses at the peak of a step, of the package's cases."""
    from megatron_solopo import config_load
    from megatron_solopo.benchmark.cases import SFT
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.planning.rehearse import example
    from megatron_solopo.planning.table import outcomes_of, tasks_of

    setting = table.setting
    cases = [case for case in table.cases if case.side == SOLOPO]
    tasks = []
    for place, case in enumerate(cases):
        job = Job(setting, case, str(folder / str(place)))
        write_inputs(job)
        config, _ = config_load.load(options_of(job))
        long = setting.short if case.mode == SFT and case.on_short else setting.long
        pack = [example(config.method, setting.short, long, setting.response, case.chosen, case.rejected)]
        pack *= min(setting.pairs, config.training.micro_batch_size)
        packs = -(-setting.pairs // len(pack))
        tasks += tasks_of(config, read_hf_config(str(job.model)), pack, packs, 1, setting.device)
    outcomes = outcomes_of(tasks) if tasks else []
    if isinstance(outcomes, str):
        say(f"{table.name}: memory by kind is {outcomes}")
        return {}
    return {
        case: {kind: size / 2**30 for kind, size in outcome.peak.held.items()}
        for case, outcome in zip(cases, outcomes, strict=True)
    }


def _longest(table: Table, folder: Path, profile: bool, say: Say) -> list[Figures]:
    """The longest context of each case; the limit of all is that of the first."""
    records, limit = list[Figures](), table.limit
    for place, case in enumerate(table.cases):
        tries: dict[int, Figures] = {}

        def peak(length: int, case: Case = case, place: int = place, tries: dict[int, Figures] = tries) -> float:
            setting = replace(table.setting, long=length, short=max(64, length // 8))
            tries[length] = in_a_process(Job(setting, case, str(folder / f"{place}-{length}"), steps=1))
            say(f"{table.name}: {case.name}: {length:,} tokens, {tries[length]['peak_gib']:.3f} GiB")
            return tries[length]["peak_gib"] * 2**30

        if not limit:
            peak(table.setting.long)
            limit = STATES * STATES_BYTES * tries[table.setting.long]["parameters"]
        say(f"{table.name}: limit {limit / 2**30:.3f} GiB")
        known = {length: figures["peak_gib"] * 2**30 for length, figures in tries.items()}
        search: Search = longest(peak, limit, table.setting.long, known)
        records.append(
            {
                "name": case.name,
                "case": asdict(case),
                "longest": search.length,
                "too_long": search.too_long,
                "limit_gib": limit / 2**30,
                "tries": {str(length): figures["peak_gib"] for length, figures in sorted(tries.items())},
                "parameters": next(iter(tries.values()))["parameters"],
            }
        )
    return records


def kept(folder: Path, table: Table) -> Figures | None:
    """Returns the record of a table that an earlier start finished, if it was the same table."""
    path = folder / f"{table.name}.json"
    if not path.is_file():
        return None
    try:
        record = loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("file-unreadable", f"{path}: {error}; delete it, and the table is measured again") from None
    before = record.get("table", {})
    # A case of an earlier version lacks the fields that it did not know, which had their defaults.
    defaults = json.loads(json.dumps(asdict(Case())))
    before = before | {"cases": [defaults | case for case in before.get("cases", ())]}
    return record if before == as_json(table) else None
