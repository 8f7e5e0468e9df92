"""`solopo train --mock-data`: a recipe on one CPU process, its model cut to two layers, examples generated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import check_refusal

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "recipes" / "models"


def mock(folder: Path, model: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_solopo.cli", "train", "--mock-data", "--hf-path", str(model)]
    command += ["--train-data", "none.jsonl", "--save", "runs/x", *words]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "HOME": str(folder), **variables}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)


RUNS = [
    (
        "Qwen3-30B-A3B",
        "--train-epochs=1 --seq-length=32768 --bf16 --tensor-model-parallel-size=4 --sequence-parallel "
        "--expert-model-parallel-size=8 --recompute-granularity=full",
    ),
    (
        "Qwen2.5-7B-Instruct",
        "--train-iters=9 --preference-loss=orpo --seq-length=131072 --rope-scaling=yarn:4:32768 "
        "--stretch-positions=131072",
    ),
    ("Llama-3.1-8B-Instruct", "--train-iters=9 --objective=sft --no-share-prompts --context-parallel-size=8"),
]


@pytest.mark.parametrize(("model", "words"), RUNS, ids=[model for model, _ in RUNS])
def test_a_recipe_runs_on_a_cpu_and_leaves_nothing(model: str, words: str, tmp_path: Path) -> None:
    done = mock(tmp_path, MODELS / model, *words.split())
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b2/2\b|step +2\b", done.stdout + done.stderr), done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("solopo-mock", "runs"))] == []


def test_what_a_mock_run_refuses(tmp_path: Path) -> None:
    model = MODELS / "Qwen2.5-7B-Instruct"
    done = mock(tmp_path, model, "--train-iters=1", "--seq-length=131072")
    assert done.returncode == 2
    check_refusal(done.stderr, "seq-length-beyond-positions", "--seq-length 131072", "--rope-scaling")
    done = mock(tmp_path, model, "--train-iters=1", WORLD_SIZE="2")
    check_refusal(done.stderr, "option-conflict", "--mock-data")
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 28
