"""The machine check as a user runs it; its CUDA parts are skipped by themselves where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_check_that_needs_no_gpu_passes(tmp_path: Path) -> None:
    output = tmp_path / "smoke.json"
    command = [sys.executable, "tools/gpu_smoke.py", "--device", "cpu", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
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
