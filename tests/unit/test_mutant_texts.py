"""Mutants quote the code as it is: what was rewritten must not leave a mutant that changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_each_mutant_occurs_once_in_its_file_and_has_tests() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "mutation"))
    try:
        from mutants import MUTANTS
        from mutants_files import CONVERSION, DATA
    finally:
        sys.path.pop(0)
    wrong = []
    for mutant in (*MUTANTS, *CONVERSION, *DATA):
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        tests = [word.partition("::")[0] for word in mutant.tests.split() if word.startswith("tests/")]
        if count != 1 or not all((ROOT / name).exists() for name in tests):
            wrong.append(f"{mutant.name}: {count} times in {mutant.file}, tests {mutant.tests}")
    assert not wrong, wrong
