#!/usr/bin/env python3
"""Breaks the code in small ways, one at a time, and reports which test noticed.

    python tests/mutation/run.py [NAME ...] [--list]

Each mutant of mutants.py and mutants_files.py (or those whose name or file contains a NAME) is applied to a temporary
copy of the tree and its tests run there. Before the first mutant of a selection of tests, the selection must pass on
the unbroken copy. Prints a Markdown table. Exit status 1 when a mutant survives, when its text does not occur exactly
once in its file, or when its tests do not run at all.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from mutant import Mutant
from mutants import MUTANTS
from mutants_files import CONVERSION, DATA

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("megatron_solopo", "tests", "tools", "examples", "pretrain_solopo.py", "pyproject.toml")
PASSED, FAILED = 0, 1
"""pytest's exit statuses; any other means that tests did not run, which has no meaning for them."""


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def run_tests(folder: Path, tests: str) -> tuple[int, str]:
    """(pytest's exit status, its output); stops at the first failure."""
    # No bytecode: a mutant of the same size in the same second would run as the code before it.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *shlex.split(tests)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def first_failure(output: str) -> str:
    """``file::test`` of pytest's summary, without parameters."""
    match = re.search(r"^(?:FAILED|ERROR) (?:tests/)?([^\s\[]+)", output, re.M)
    return match.group(1) if match else "?"


def try_mutant(folder: Path, mutant: Mutant) -> tuple[str | None, str]:
    """(the test that caught it, or None; a remark)."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return None, f"its text occurs {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status, output = run_tests(folder, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if status == FAILED:
        return first_failure(output), ""
    return (
        None,
        "survived" if status == PASSED else f"its tests did not run (pytest's status {status})\n{output[-2000:]}",
    )


def table(mutants: Iterable[Mutant]) -> str:
    """The mutants in Markdown, each with its file and the tests that must fail."""
    rows = [f"| {m.name} | `{m.file}` | `{m.tests}` |\n" for m in mutants]
    return "".join(["| mutant | file | tests |\n|---|---|---|\n", *rows])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name or file; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants as a Markdown table; run nothing")
    options = parser.parse_args(argv)
    everything = [*MUTANTS, *CONVERSION, *DATA]
    chosen = [m for m in everything if not options.names or any(part in f"{m.name} {m.file}" for part in options.names)]
    if not chosen:
        print(f"no mutant is named like {', '.join(options.names)}", file=sys.stderr)
        return 2
    if options.list:
        print(table(chosen), end="")
        return 0
    wrong: list[str] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            status, output = run_tests(folder, tests)
            if status != PASSED:
                print(f"{tests}: does not pass before anything is broken\n{output[-3000:]}", file=sys.stderr)
                return 1
        print("| mutant | file | caught by |\n|---|---|---|", flush=True)
        for mutant in chosen:
            caught, why = try_mutant(folder, mutant)
            print(f"| {mutant.name} | `{mutant.file}` | {f'`{caught}`' if caught else '**nothing**'} |", flush=True)
            if caught is None:
                wrong.append(f"{mutant.name}: {why}")
    print(f"\n{len(chosen) - len(wrong)} of {len(chosen)} caught, {time.monotonic() - start:.0f} s")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
