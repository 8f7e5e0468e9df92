"""A rehearsed peak of memory is that of a real step, by the allocator's own events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "rehearsal.py"


@pytest.mark.parametrize(("model", "layout"), [("llama", "cp2"), ("moe", "dp2 ep2")])
def test_the_rehearsed_peak_is_the_measured_one(model: str, layout: str) -> None:
    """Kept activations and recomputation, in one process and in two; more layouts with the script by hand
    (docs/planning.md)."""
    command = [sys.executable, str(SCRIPT), "--models", model, "--layouts", "1", layout]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[-7] for row in rows] == ["none", "full", "none", "none", "full", "full"]
    for row in rows:
        assert abs(float(row[-3].rstrip("%"))) <= 2, done.stdout
