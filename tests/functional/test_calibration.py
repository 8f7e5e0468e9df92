"""A machine file calibrated by a run that was measured."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from training_home import ENVIRONMENT, Home, command, furnish

from megatron_solopo.planning import calibration, plan
from megatron_solopo.planning.forecast import forecast
from megatron_solopo.planning.machines import Achieved, Machine, load_machine

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Two processes have trained in the folder ``run``."""
    home = furnish(tmp_path_factory.mktemp("home"))
    flags = ["--preference-loss", "orpo", "--train-iters", 4, "--micro-batch-size", 1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    python, *argv = command(home.argv("run", *flags))
    done = subprocess.run([python, *launch, *argv], cwd=home.folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (home.folder / "cpu.yaml").write_text(CPU.text())
    return home


def test_the_forecast_of_a_run_is_its_median_step(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fit = calibration.calibrated
    monkeypatch.setattr(calibration, "calibrated", lambda *arguments: calls.append(arguments) or fit(*arguments))
    machine = calibration.calibrate(CPU, home.folder / "run")
    [(outcomes, config, world, packs, _, seconds, _)] = calls
    assert seconds == statistics.median(line["seconds"] for line in home.metrics("run")[1:])
    result = forecast(outcomes, config, world, packs, machine)
    assert result.low == result.high == pytest.approx(seconds)
    assert (world, packs) == (2, 2)  # four groups a step, one a pack
    tokens = [line["tokens"] for line in home.metrics("run")]
    assert min(tokens) / 2 < result.tokens < max(tokens) * 2  # one pack of one example stands for all four
    assert str(home.folder / "run") in machine.name


def test_a_plan_forecasts_with_the_rates_of_the_run(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout that was measured, with packs as long as the run's: other kernels, of another device, but as fast."""
    monkeypatch.chdir(home.folder)
    words = ["--model", "hf", "--gpus", "2", "--gpus-per-node", "2", "--machine", "cpu.yaml", "--calibrate", "run"]
    words += ["--reserve", "0", "--no-bf16", "--preference-loss", "orpo", "--global-batch-size", "4"]
    words += ["--micro-batch-size", "1", "--context-parallel-size", "1", "--tensor-model-parallel-size", "1"]
    words += ["--pipeline-model-parallel-size", "1", "--top", "1"]
    lengths = ["--long-tokens", "40", "--short-tokens", "16", "--response-tokens", "8"]
    assert plan.main([*words, *lengths]) == 0
    output = capsys.readouterr().out
    assert "calibrated by run" in output
    low, high = map(float, re.findall(r"^ *(\d+\.\d)-(\d+\.\d) ", output, re.M)[0])
    measured = statistics.median(line["seconds"] for line in home.metrics("run")[1:])
    assert low == high and measured / 3 < low + 0.05 and low - 0.05 < measured * 3, output


def test_a_run_on_a_cpu_calibrates_no_gpu(home: Home) -> None:
    with refused("machine-calibration", "--calibrate", str(home.folder / "run"), "on a CPU", "H100"):
        calibration.calibrate(load_machine("h100"), home.folder / "run")


def test_a_run_whose_data_is_gone_is_named(home: Home, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(home.folder / "run", moved, ignore=shutil.ignore_patterns("iter_*"))
    options = (moved / "config.yaml").read_text().replace("groups.jsonl", "gone.jsonl")
    (moved / "config.yaml").write_text(options)
    with refused("file-missing", f"--calibrate {moved}", "gone.jsonl"):
        calibration.calibrate(CPU, moved)


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with refused("file-missing", f"--calibrate: {tmp_path}", "metrics.jsonl"):
        calibration.calibrate(CPU, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "seconds": 1.0}\n')
    with refused("run-without-steps", "second step", str(tmp_path)):
        calibration.calibrate(CPU, tmp_path)
