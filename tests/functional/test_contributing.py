"""CONTRIBUTING.md, followed: its files are written and its diffs applied in a copy of the package, its commands run."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
SECTION = re.compile(r"^## (Add [^\n]*)\n(.*?)(?=^## |\Z)", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it names ("" where none), its text."""

    kind: str
    file: str
    text: str


SECTIONS = {
    title: [Block(kind, file or "", text) for kind, file, text in BLOCK.findall(body)]
    for title, body in SECTION.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with the model and the data that the page names."""
    shutil.copytree(ROOT / "megatron_solopo", tmp_path / "megatron_solopo", ignore=shutil.ignore_patterns("*.pyc"))
    write_model(tmp_path / "MODEL")
    write_model(tmp_path / "CWM", AutoConfig.for_model("cwm", **SHAPE, head_dim=8, sliding_window=8))
    write_lines(tmp_path / "groups.jsonl", preference_groups(6))
    return tmp_path


def apply_diff(path: Path, diff: str) -> None:
    """Applies a hunk without line numbers. Its old lines, the last perhaps quoted in part, must occur exactly once."""
    lines = diff.rstrip("\n").split("\n")
    old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    whole = path.read_text(encoding="utf-8")
    assert whole.count(old) == 1, old
    path.write_text(whole.replace(old, new), encoding="utf-8")


def run_console(text: str, tree: Path) -> None:
    """Runs the commands of a console session in the tree; ``...`` in what they print matches anything."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M):
        words = shlex.split(command)
        if words[0] == "solopo":
            words[:1] = [sys.executable, "-m", "megatron_solopo.cli"]
        done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
        printed = done.stdout + "".join(line + "\n" for line in done.stderr.splitlines() if line[:7] != "warning")
        refused = expected.startswith("error: ")
        assert done.returncode == (2 if refused else 0), f"{command}\n{done.stdout}\n{done.stderr}"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, printed, flags), f"{command}\n{printed}"


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_the_page_work(title: str, tree: Path) -> None:
    blocks = SECTIONS[title]
    assert [block.kind for block in blocks if block.kind == "console"], "a section runs what it adds"
    for block in blocks:
        path = tree / block.file
        if block.kind == "console":
            run_console(block.text, tree)
        elif block.kind == "diff":
            apply_diff(path, block.text)
        else:
            assert not path.exists(), block.file
            path.write_text(block.text, encoding="utf-8")


def test_the_page_has_the_five_additions() -> None:
    assert list(SECTIONS) == [
        "Add a loss",
        "Add a model family",
        "Add a source of questions",
        "Add a context-parallel method",
        "Add a command",
    ]
