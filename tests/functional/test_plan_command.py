"""`solopo plan` as a user runs it: what fits, its file, and the message where nothing fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from refusals import check_refusal
from tiny_models import SHAPE
from transformers import LlamaConfig

from megatron_solopo.cli import dispatch, run
from megatron_solopo.config import Config

# As wide as its --mlp-tiles auto are long: a rehearsal takes the time of its operations, and narrow tiles are many.
MODEL = LlamaConfig(**SHAPE | dict(hidden_size=512, num_hidden_layers=4, max_position_embeddings=4096))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model in ``m``."""
    MODEL.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*words: str) -> int:
    of_model = ["--model", "m/config.json", "--gpus", "2", "--reserve", "0", "--long-tokens", "4000", "--top", "2"]
    return run(dispatch, ["plan", *of_model, *words])


def test_the_best_layout_is_rehearsed_shown_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--output", "plan.yaml") == 0
    output = capsys.readouterr().out
    [head] = [line for line in output.splitlines() if "peak GiB" in line]
    table = output.partition(head)[2].splitlines()[1:3]
    assert all(re.search(r" [+-]\d+\.\d% .*micro-batch \d+, recompute ", line) for line in table), output
    assert "refused by training" in output and "host memory of a node with 2 processes" in output
    config = Config.load(folder / "plan.yaml")
    assert (config.data.seq_length, config.model.bf16, config.model.hf_path) == (4000, True, "m")


def test_where_nothing_fits_the_nearest_is_named_with_what_it_lacks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--gpu-memory", "0.001", "--output", "plan.yaml") == 2 and not (folder / "plan.yaml").exists()
    output, errors = capsys.readouterr()
    message = check_refusal(errors, "plan-nothing-fits", "2 GPUs of 0.001 GiB", "lacks 0.")
    assert "--gpus" in message and "do not fit" in output
