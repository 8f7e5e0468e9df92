"""`solopo plan` as a user runs it: what fits, its file, and the message where nothing fits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from refusals import check_refusal
from tiny_models import SHAPE
from transformers import LlamaConfig

from megatron_solopo.config import Config

MODEL = LlamaConfig(**SHAPE | dict(num_hidden_layers=4, max_position_embeddings=4096))


def plan(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    MODEL.save_pretrained(folder / "m")
    command = [sys.executable, "-m", "megatron_solopo.cli", "plan", "--model", "m/config.json", "--gpus", "2"]
    command += ["--reserve", "0", "--long-tokens", "4000", "--top", "2", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_best_layout_is_rehearsed_shown_and_written(tmp_path: Path) -> None:
    done = plan(tmp_path, "--output", "plan.yaml")
    assert done.returncode == 0, done.stderr
    [head] = [line for line in done.stdout.splitlines() if "peak GiB" in line]
    table = done.stdout.partition(head)[2].splitlines()[1:3]
    assert all(re.search(r" [+-]\d+\.\d% .*micro-batch \d+, recompute ", line) for line in table), done.stdout
    assert "refused by training" in done.stdout and "host memory of a node with 2 processes" in done.stdout
    config = Config.load(tmp_path / "plan.yaml")
    assert (config.data.seq_length, config.model.bf16, config.model.hf_path) == (4000, True, "m")


def test_where_nothing_fits_the_nearest_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    done = plan(tmp_path, "--gpu-memory", "0.001", "--output", "plan.yaml")
    assert done.returncode == 2 and not (tmp_path / "plan.yaml").exists()
    message = check_refusal(done.stderr, "plan-nothing-fits", "2 GPUs of 0.001 GiB", "lacks 0.")
    assert "--gpus" in message and "do not fit" in done.stdout
