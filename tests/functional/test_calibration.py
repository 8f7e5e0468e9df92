"""A machine file calibrated by a run that was measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from training_home import as_a_user, furnish

from megatron_solopo.planning import calibration
from megatron_solopo.planning.forecast import forecast
from megatron_solopo.planning.machines import Achieved, Machine

CPU = Machine(
    name="a core",
    gpus_per_node=1,
    memory_gib=4,
    tflops={"float32": 0.1},
    memory_gb_per_s=10,
    node_gb_per_s=1,
    network_gb_per_s=1,
    achieved=Achieved(products=[0.01, 0.1], attention=[0.01, 0.1], memory=[0.01, 0.1], collectives=[0.01, 0.1]),
    collective_us=[1, 2],
    launch_us=[1, 2],
)


def test_the_forecast_of_a_run_is_its_median_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = furnish(tmp_path)
    flags = ["--preference-loss", "orpo", "--train-iters", 4, "--micro-batch-size", 1]
    done = as_a_user(home, home.argv("run", *flags))
    assert done.returncode == 0, done.stderr
    calls: list[tuple[Any, ...]] = []
    fit = calibration.calibrated
    monkeypatch.setattr(calibration, "calibrated", lambda *arguments: calls.append(arguments) or fit(*arguments))
    machine = calibration.calibrate(CPU, home.folder / "run")
    [(outcomes, config, world, packs, _, seconds, _)] = calls
    assert seconds == statistics.median(line["seconds"] for line in home.metrics("run")[1:])
    result = forecast(outcomes, config, world, packs, machine)
    assert result.low == result.high == pytest.approx(seconds)
    assert (world, packs) == (1, 4)  # four groups a step, one a pack
    tokens = [line["tokens"] for line in home.metrics("run")]
    assert min(tokens) * 0.8 < result.tokens < max(tokens) * 1.2
    assert str(home.folder / "run") in machine.name


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with refused("file-missing", str(tmp_path), "metrics.jsonl"):
        calibration.calibrate(CPU, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "seconds": 1.0}\n')
    with refused("run-without-steps", "second step", str(tmp_path)):
        calibration.calibrate(CPU, tmp_path)
