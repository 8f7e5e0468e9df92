"""metrics.jsonl where a number is not finite, or where there is none yet: JSON for every reader, ours too."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pandas
import pytest
from evaluation_files import write_evaluation, write_run
from refusals import refused

from megatron_solopo.config import OutputConfig
from megatron_solopo.evaluation import report, results
from megatron_solopo.training.log import RunLog
from megatron_solopo.training.monitoring import WINDOW, Watch


def line(step: int, **values: Any) -> dict[str, Any]:
    usual = {"loss": 1.0, "grad_norm": 2.0, "margin": 0.5, "clip_grad": 1.0, "clipped": 1, "seconds": 0.5, "groups": 2}
    return {"step": step, "split": "train"} | usual | values


LINES = [line(step) for step in range(1, WINDOW + 2)]
LINES[2] |= {"margin": math.nan, "grad_norm": math.inf, "loss": -math.inf}
LINES[3] = {"step": 4, "split": "train", "skipped": "why", "loss": None, "groups": 2}


def run_log(folder: Path, first_step: int = 0) -> RunLog:
    log = RunLog(OutputConfig(save=str(folder)), 99, first_step, True)
    log.begin()
    return log


@pytest.fixture
def folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    log = run_log(tmp_path / "run")
    for each in LINES:
        log.step(each)
    log.close()
    return tmp_path / "run"


def test_what_is_not_finite_is_null_for_every_reader(folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    written = [json.loads(each, parse_constant=refuse) for each in text.splitlines()]
    assert [written[2][name] for name in ("margin", "grad_norm", "loss")] == [None] * 3
    table = pandas.read_json(io.StringIO(text), lines=True)
    assert table["margin"].dtype == float and table["margin"].isna().sum() == 2 and len(table) == len(LINES)


def test_null_is_not_finite_for_our_readers(folder: Path, tmp_path: Path) -> None:
    run = results.read_run(str(folder))
    assert [results.finite(run.train[2][name]) for name in ("margin", "grad_norm", "loss", "seconds")] == [
        False
    ] * 3 + [True]
    text = report.write_report(tmp_path / "r.md", [run])[0].read_text()
    assert "The loss was not finite in run (2 steps)" in text
    log = run_log(folder, first_step=len(LINES))
    whole, resumed = Watch(10), Watch(10)
    for each in LINES:
        whole.read(each)
    resumed.replay(log.earlier)
    log.close()
    after = line(len(LINES) + 1, grad_norm=50.0)
    assert resumed.read(after) == whole.read(after) != {}
    assert (resumed.skipped, resumed.skipped_in_a_row) == (whole.skipped, whole.skipped_in_a_row) == (1, 0)


def test_a_run_without_a_step_is_left_out_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, empty = write_run(tmp_path / "whole", 20), tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    arguments = ["--output", str(tmp_path / "r.md"), "--runs", f"late={empty}", str(whole), str(whole)]
    assert report.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"warning: {empty / 'metrics.jsonl'}: no steps in it yet; " in out and "this run is left out" in out
    text = (tmp_path / "r.md").read_text()
    assert "late" not in text and "means over seeds" in text  # one that occurs twice counts twice
    with refused("run-without-steps", "empty/metrics.jsonl: "):
        report.main(["--output", str(tmp_path / "r.md"), "--runs", str(empty)])
    evaluation = str(write_evaluation(tmp_path / "e.json", {8: 0.5}))
    assert report.main(["--output", str(tmp_path / "r.md"), "--runs", str(empty), "--evaluations", evaluation]) == 0
    assert "## Training" not in (tmp_path / "r.md").read_text()


def test_tensorboard_has_every_nth_step_and_every_evaluation(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils import tensorboard

    events = str(tmp_path / "events")
    output = OutputConfig(
        save=str(tmp_path), tensorboard_dir=events, tensorboard_log_interval=3, tensorboard_queue_size=7
    )
    log = RunLog(output, 99, 0, True)
    with mock.patch.object(tensorboard, "SummaryWriter", side_effect=tensorboard.SummaryWriter) as writer:
        log.begin()
    for step in range(1, 8):
        log.step(line(step))
        log.step({"step": step, "split": "valid", "loss": 1.0})
    log.close()
    assert writer.call_args.kwargs["max_queue"] == 7
    written = EventAccumulator(events)
    written.Reload()
    steps = {name: [event.step for event in written.Scalars(name)] for name in ("train/loss", "valid/loss")}
    assert steps == {"train/loss": [3, 6], "valid/loss": list(range(1, 8))}
