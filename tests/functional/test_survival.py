"""Runs that are killed, stopped and started again; full disks. SOLOPO_KILLS=20 kills 20 times instead of 3."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import ForkedRun
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_home import Home, furnish

KILLS = int(os.environ.get("SOLOPO_KILLS", "3"))
LATEST = "latest_checkpointed_iteration.txt"
TIMES = ("seconds", "tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def begin(home: Home, argv: list[str], processes: int = 1) -> ForkedRun:
    return ForkedRun(argv, processes, home.folder / "stderr.txt")


def finish(home: Home, argv: list[str], processes: int = 1) -> str:
    """Runs to the end; returns what the run told."""
    run = begin(home, argv, processes)
    assert run.wait() == [0] * processes, run.text()[-3000:]
    return run.text()


def timeless(home: Home, save: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home.folder / save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def content(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds: weights, optimizer, schedule, step."""
    dcp_to_torch_save(checkpoint, checkpoint.with_suffix(".pt"))
    return torch.load(checkpoint.with_suffix(".pt"), weights_only=False)


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def wait_for(moment: Callable[[], Any], run: ForkedRun, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert run.alive() and time.monotonic() < deadline, f"the moment did not come\n{run.text()[-3000:]}"
        time.sleep(0.0005)


def reach(kind: str, draw: random.Random, folder: Path, run: ForkedRun) -> None:
    """Waits until a moment to kill has come."""
    if kind == "saving":  # a save takes about as long as the random wait
        seen = set(folder.glob("iter_*.partial-*"))
        wait_for(lambda: set(folder.glob("iter_*.partial-*")) - seen, run)
        time.sleep(draw.uniform(0, 0.06))
    elif kind == "training":
        goal = lines(folder) + draw.randint(3, 5)
        wait_for(lambda: lines(folder) >= goal, run)
        time.sleep(draw.uniform(0, 0.1))
    else:
        time.sleep(draw.uniform(0, 5))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_is_the_unbroken_run(home: Home, processes: int) -> None:
    """Bit for bit: every line of metrics but the times, all that a checkpoint holds, and the exported weights."""
    save, unbroken = f"killed-{processes}", f"unbroken-{processes}"
    flags: list[Any] = ["--train-iters", 6 * KILLS + 10, "--save-interval", 2, "--keep-last", 2]
    flags += ["--valid-data", home.folder / "valid.jsonl", "--eval-interval", 5]
    finish(home, home.argv(unbroken, *flags, "--save-hf", home.folder / f"{unbroken}-hf"), processes)
    argv = home.argv(save, *flags, "--save-hf", home.folder / f"{save}-hf", "--auto-resume")
    draw = random.Random(processes)
    moments = itertools.cycle(["training", "saving", "saving", "starting"])
    for number, kind in zip(range(KILLS), moments, strict=False):
        run = begin(home, argv + ["--async-save"] * (number % 2), processes)
        reach(kind, draw, home.folder / save, run)
        run.send(signal.SIGKILL)  # a process that writes in the background lives on
        assert run.wait() == [-signal.SIGKILL] * processes
        latest = home.folder / save / LATEST
        reached = latest.read_text().strip() if latest.is_file() else "none"
        print(f"kill {number + 1} of {KILLS} while {kind}: {lines(latest.parent)} lines, latest checkpoint {reached}")
    assert "going on after step" in finish(home, argv, processes)
    assert "nothing is left" in finish(home, argv, processes)
    assert timeless(home, save) == timeless(home, unbroken)
    last = f"iter_{6 * KILLS + 10:07d}"
    ours, theirs = (content(home.folder / name / last) for name in (save, unbroken))
    assert same(ours, theirs) and any("exp_avg_sq" in name for name in ours)
    weights = [home.folder / f"{name}-hf" / "model.safetensors" for name in (save, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(list((home.folder / save).glob("iter_???????"))) == 2 and not list(
        (home.folder / save).glob("*.partial*")
    )
