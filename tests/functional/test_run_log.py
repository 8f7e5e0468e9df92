"""The log of a run: the console, metrics.jsonl from before step 1 to the end, and the permissions of its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training_home import ENVIRONMENT, ROOT, TIMES, Home, command, furnish

from megatron_solopo.cli import run
from megatron_solopo.evaluation.results import read_run
from megatron_solopo.training.run import main

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TIMED = {*TIMES, "compute_imbalance", "padding_share", "tokens"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def flags(home: Home, *more: Any) -> list[Any]:
    return ["--valid-data", home.folder / "valid.jsonl", "--preference-loss", "orpo", *more]


def console(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_a_run_is_evaluated_before_its_first_step(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """With the weights it starts from: a run whose steps change nothing ends where it started."""
    assert run(main, home.argv("runs/still", *flags(home, "--lr", 1e-30, "--train-iters", 2))) == 0
    before, after = home.metrics("runs/still", "valid")
    assert (before.pop("step"), after.pop("step")) == (0, 2) and before == after and before["groups"] == 3
    lines = console(capfd)
    assert read_run(str(home.folder / "runs/still")).metrics["orpo_clamped"].label == "clamped log-odds"  # for reports
    [start] = [line for line in lines if line.startswith("step 0 valid loss ")]
    assert start.endswith("(3 examples)") and lines.index(start) < lines.index(next(x for x in lines if "step 1/" in x))


def test_a_resumed_run_is_not_evaluated_again_before_its_first_step(home: Home) -> None:
    argv = home.argv("runs/parts", *flags(home, "--save-interval", 2, "--auto-resume"))
    assert run(main, argv) == 0
    expected = [(line["step"], line["loss"]) for line in home.metrics("runs/parts", "valid")]
    for iteration in (home.folder / "runs/parts").glob("iter_000000[45]"):
        iteration.rename(iteration.with_name("gone" + iteration.name))
    (home.folder / "runs/parts/latest_checkpointed_iteration.txt").write_text("2")
    assert run(main, argv) == 0
    assert [(line["step"], line["loss"]) for line in home.metrics("runs/parts", "valid")] == expected
    assert [step for step, _ in expected] == [0, 5]


def test_the_evaluation_before_the_first_step_can_be_switched_off(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(main, home.argv("runs/off", *flags(home, "--no-eval-on-start", "--train-iters", 1))) == 0
    assert [line["step"] for line in home.metrics("runs/off", "valid")] == [1]
    assert run(main, home.argv("runs/none", "--no-eval-on-start")) == 2
    assert "error: --eval-on-start would have no effect: it needs --valid-data" in console(capfd)[-1]


def test_a_console_line_shows_pace_rate_and_remaining_time(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/lines", *flags(home, "--log-interval", 2, "--clip-grad", 1e-3))) == 0
    lines = console(capfd)
    shown = [line for line in lines if re.match(r"step \d/5 ", line)]
    assert [line.split()[1] for line in shown] == ["1/5", "2/5", "4/5", "5/5"]
    for line in shown:
        number = r"[\d.e+-]+"
        assert re.fullmatch(
            rf"step ./5 loss {number} po {number} acc {number} margin {number} align {number} grad {number} "
            rf"\(clipped to 0.001\) lr {number} [\d,]+ tok/s {number} s/step data {number} s left \d+:\d\d:\d\d",
            line,
        ), line
    assert any(line.startswith("warning: every step (5) was clipped to --clip-grad 0.001") for line in lines)
    assert "4; values of a step are means over its examples" in lines[0]


def test_the_time_left_is_that_of_the_steps_with_what_happens_between_them() -> None:
    from unittest.mock import patch

    from megatron_solopo.config import OutputConfig
    from megatron_solopo.training import log

    messages: list[str] = []
    clock = iter([10.0 + 20 * n for n in range(50)])  # a step of 5 s every 20 s
    with patch.object(log.time, "monotonic", lambda: next(clock)), patch.object(log.RunLog, "_write"):
        one = log.RunLog(OutputConfig(log_interval=1), steps=100, first_step=10, active=True)
        one.message = messages.append
        for step in (11, 12, 13):
            one.step({"step": step, "split": "train", "loss": 1.0, "seconds": 5.0})
    left = [line.rpartition(" left ")[2] for line in messages]
    assert left == ["0:07:25", "0:18:20", "0:21:45"]  # 5, 12.5 and 15 s each


def test_memory_of_saves_is_logged_separately(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A save that needs 400 MiB more appears in its line, and not in the steps after it."""
    from megatron_solopo.training.checkpoint import Checkpoints

    save = Checkpoints.save

    def large(self: Checkpoints, iteration: int) -> None:
        held = bytearray(400 << 20)
        save(self, iteration)
        del held

    monkeypatch.setattr(Checkpoints, "save", large)
    more = ["--save-interval", 2, "--train-iters", 4, "--save-hf", home.folder / "memory-hf"]
    assert run(main, home.argv("runs/memory", *flags(home, *more))) == 0
    training = [line["memory_gib"] for line in home.metrics("runs/memory")]
    saves = home.metrics("runs/memory", "save")
    [export] = home.metrics("runs/memory", "export")
    assert [line["step"] for line in saves] == [2, 4] and all(line["seconds"] > 0 for line in saves)
    assert min(line["memory_gib"] for line in saves) > max(training) + 0.3
    assert training == sorted(training) and export["memory_gib"] < saves[0]["memory_gib"] - 0.3
    lines = console(capfd)
    assert f"step 2 save {saves[0]['seconds']:.3g} s peak memory {saves[0]['memory_gib']:.2f} GiB" in lines
    [last] = [line for line in lines if line.startswith("peak memory of the largest process: training ")]
    shown = re.search(r", save (\d+\.\d\d) GiB, export \d", last)  # the largest of all saves, rounded once
    assert shown and float(shown[1]) == pytest.approx(max(line["memory_gib"] for line in saves), abs=0.006)


def test_memory_where_the_system_does_not_reset_its_peak() -> None:
    """A peak is known if it is the highest so far; else the highest so far is logged."""
    from unittest.mock import patch

    from megatron_solopo.training import memory

    class Machine:
        device, peak = None, 3.0  # loading the model took 3

        def reset_peak_memory(self) -> bool:
            return False

        def peak_memory_gib(self) -> float:
            return self.peak

    machine = Machine()
    with patch.object(memory, "max_over_processes", lambda value, device: value):
        peaks = memory.PeakMemory(machine)
        assert peaks.of() == 3
        machine.peak = 4.0
        assert peaks.of() == 4
        with peaks.apart("save"):
            machine.peak = 9.0
        assert (peaks.of(), peaks.of("save")) == (4, 9)
        with peaks.apart("export"):
            pass
        assert (peaks.of(), peaks.of("export")) == (4, 9)
        machine.peak = 10.0
        assert (peaks.of(), peaks.of("save"), peaks.activities) == (10, 9, ["training", "save", "export"])


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027], indirect=True, ids=oct)
def test_every_file_of_a_run_has_the_mode_of_the_umask(home: Home, umask: int) -> None:
    """The reference cache too, which other people's runs read."""
    name = f"modes{umask:o}"
    more = ["--save-hf", home.folder / name / "hf", "--save-interval", 1, "--train-iters", 2, "--async-save"]
    assert run(main, home.argv(f"{name}/run", "--valid-data", home.folder / "valid.jsonl", *more)) == 0
    files = [path for path in (home.folder / name).rglob("*") if path.is_file()]
    assert len(list((home.folder / name / "reference").iterdir())) == 2 and len(files) > 10
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(files, oct(0o666 & ~umask))


def test_a_form_of_the_alignment_without_transfer_is_reported(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    for more, count in (([], 1), (["--alignment-reference", "short"], 0)):
        assert run(main, home.argv(f"runs/note{count}", "--train-iters", 1, *more)) == 0
        notes = [line for line in console(capfd) if line.startswith("note: --preference-loss dpo with --alignment-ref")]
        assert len(notes) == count


@pytest.mark.parametrize(
    "layout",
    [[], *([f"--{name}-size", 2] for name in ("pipeline-model-parallel", "tensor-model-parallel", "context-parallel"))],
    ids=["data", "pipeline", "tensor", "context"],
)
def test_two_processes_log_what_one_does(home: Home, layout: list[Any]) -> None:
    more = flags(home, "--alignment-target", "both", "--train-iters", 2, "--save-interval", 1, "--lr", 1e-4)
    name = layout[0].split("-")[2] if layout else "data"
    if not (home.folder / "runs/one").exists():
        done = subprocess.run(command(home.argv("runs/one", *more)), env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    argv = [*TWO, str(ROOT / "pretrain_solopo.py"), *home.argv(f"runs/{name}", *more, *layout)]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for split, steps in (("valid", [0, 2]), ("train", [1, 2]), ("save", [1, 2])):
        ours, theirs = (home.metrics(f"runs/{run}", split) for run in (name, "one"))
        assert [line["step"] for line in ours] == steps
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() - TIMES == other.keys() - TIMES
            for key in mine.keys() - {*TIMED, "split"}:
                assert mine[key] == pytest.approx(other[key], rel=2e-5, abs=1e-6), (split, key)
    assert done.stderr.count("step 0 valid") == done.stderr.count("peak memory of the largest process") == 1
    assert Path(home.folder / "runs" / name / "metrics.jsonl").stat().st_size > 0
