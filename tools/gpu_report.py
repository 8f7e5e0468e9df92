"""Writes the results of the GPU suite into the documentation: tables of docs/gpu.md and a baseline for each machine.

    python tools/gpu_report.py gpu_suite/results.jsonl    # keeps the results and writes tables and baseline
    python tools/gpu_report.py                            # writes them again from the kept results
    python tools/gpu_report.py --print FILE               # prints the tables of a file, also of a dry run

The results are kept as docs/gpu/MACHINE.jsonl; baselines are examples/benchmarks/baselines/MACHINE.json. Missing
figures are "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu import tables  # noqa: E402
from gpu.record import read  # noqa: E402

from megatron_solopo.errors import UserError  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
KEPT = ROOT / "docs" / "gpu"
BASELINES = ROOT / "examples" / "benchmarks" / "baselines"
START, END = "<!-- tables: tools/gpu_report.py -->", "<!-- end of tables -->"


def main(argv: list[str] | None = None) -> int:
    """Writes tables and baselines; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="*", metavar="FILE", help="results.jsonl of a machine")
    parser.add_argument("--print", action="store_true", help="print the tables of the files, write nothing")
    options = parser.parse_args(argv)
    results = {str(path): results_of(Path(path)) for path in options.results}
    if options.print:
        print(tables.markdown({machine_of(path, records): records for path, records in results.items()}), end="")
        return 0
    for path, records in results.items():
        environment = tables.figures_of(records).get("environment", {})
        if environment.get("dry_run", {"value": True})["value"]:
            raise UserError(
                "results-incomplete", f"{path}: of a dry run, or without the cell `environment`; --print shows it"
            )
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{machine_of(path, records)}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    machines = kept()
    for name, records in machines.items():
        BASELINES.mkdir(exist_ok=True)
        (BASELINES / f"{name}.json").write_text(baseline(name, records), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), machines), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}" + "".join(f", baselines/{name}.json" for name in machines))
    return 0


def results_of(path: Path) -> list[dict[str, Any]]:
    try:
        records = read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("file-unreadable", f"{path}: cannot be read ({error})") from None
    if not any("status" in record for record in records if isinstance(record, dict)):
        raise UserError("results-empty", f"{path}: no results of tools/gpu_suite.py")
    return records


def machine_of(path: str, records: list[dict[str, Any]]) -> str:
    machine = tables.figures_of(records).get("environment", {}).get("machine")
    return machine["value"] if machine else Path(path).stem


def kept() -> dict[str, list[dict[str, Any]]]:
    """Machine -> its results."""
    return {path.stem: read(path) for path in sorted(KEPT.glob("*.jsonl"))}


def baseline(machine: str, records: list[dict[str, Any]]) -> str:
    """Returns the figures of a machine as JSON, to compare later runs with."""
    statuses = {record["cell"]: record["status"] for record in records if "status" in record}
    document = {"machine": machine, "cells": statuses, "figures": tables.figures_of(records)}
    return json.dumps(document, indent=1) + "\n"


def page(text: str, machines: dict[str, list[dict[str, Any]]]) -> str:
    """docs/gpu.md with the tables of these machines between its marks."""
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError("page-markers-missing", f"docs/gpu.md: the lines {START} and {END} are missing")
    return f"{before}{START}\n\n{tables.markdown(machines)}\n{END}{after}"


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
