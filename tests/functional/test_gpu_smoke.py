"""The machine check as a user runs it; its CUDA parts are skipped by themselves where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def smoke(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_smoke.py", "--device", "cpu", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_check_that_needs_no_gpu_passes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "smoke.json"
    done = smoke(output)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    checks = json.loads(output.read_text())["checks"]
    assert {name: check["status"] for name, check in checks.items()} == {
        "platform": "passed",
        "attention": "passed",
        "context_attention": "passed",
        "oracle": "passed",
        "training": "passed",
        "transformer_engine": "skipped",
    }
    assert checks["attention"]["shared_tokens"] < checks["attention"]["separate_tokens"]


def test_a_place_that_cannot_be_written_is_refused_before_any_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = smoke(tmp_path / "file" / "smoke.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --output {tmp_path / 'file' / 'smoke.json'}: {tmp_path / 'file'} is a file")
