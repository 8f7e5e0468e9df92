"""Runs with --max-tokens-per-rank auto: the number in log, settings and dry run, and in a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.planning import budget
from megatron_solopo.training.run import main

GIB = 2**30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of a rehearsal in which 100 tokens need 1 GiB and 900 need 9; 2 GiB are there."""
    calls: list[Any] = []

    def rehearsed(*arguments: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        calls.append(arguments)
        return (100, GIB), (900, 9 * GIB)

    monkeypatch.setattr(budget, "_rehearsed", rehearsed)
    monkeypatch.setattr(budget, "_room", lambda device: 2 * GIB)
    return calls


def losses(home: Home, save: str) -> list[float]:
    return [line["loss"] for line in home.metrics(save)]


def number_of(run_folder: Path) -> Any:
    return yaml.safe_load((run_folder / "config.yaml").read_text())["training"]["max_tokens_per_rank"]


def test_a_run_chooses_a_number_and_keeps_it_when_it_is_resumed(
    home: Home, rehearsals: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Resumed with another memory the packs, and so the bits of the losses, are those of the unbroken run."""
    flags = ["--preference-loss", "simpo", "--global-batch-size", 4, "--train-iters", 4]
    auto = [*flags, "--max-tokens-per-rank", "auto"]
    assert run(main, home.argv("runs/whole", *flags, "--max-tokens-per-rank", 200)) == 0
    assert run(main, home.argv("runs/auto", *auto, "--save-interval", 2, "--keep-last", 2)) == 0
    assert number_of(home.folder / "runs/auto") == 200 and len(rehearsals) == 1
    assert "--max-tokens-per-rank auto: 200, of 2.0 GiB for a process" in capfd.readouterr().err
    assert losses(home, "runs/auto") == losses(home, "runs/whole")
    monkeypatch.setattr(budget, "_room", lambda device: 8 * GIB)
    resumed = [*auto, "--load", home.folder / "runs/auto", "--ckpt-step", 2]
    assert run(main, home.argv("runs/resumed", *resumed)) == 0
    assert "--max-tokens-per-rank auto: 200, as before in " in capfd.readouterr().err
    assert number_of(home.folder / "runs/resumed") == 200 and len(rehearsals) == 1
    assert losses(home, "runs/resumed") == losses(home, "runs/whole")[2:]
    # What needs another amount of memory gets another number.
    assert run(main, home.argv("runs/less", *resumed, "--recompute-granularity", "full")) == 0
    assert number_of(home.folder / "runs/less") == 800 and len(rehearsals) == 2


def test_a_dry_run_says_the_number_and_why(
    home: Home, rehearsals: list[Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = home.argv("runs/dry", "--preference-loss", "simpo", "--max-tokens-per-rank", "auto", "--dry-run")
    assert run(main, argv) == 0
    printed = capfd.readouterr().out
    assert "max_tokens_per_rank: 200" in printed
    assert "--max-tokens-per-rank auto: 200, of 2.0 GiB for a process: 100 tokens need 1.0 and 900 need 9.0" in printed
    monkeypatch.setattr(budget, "_room", lambda device: GIB // 2)
    assert run(main, argv) == 2
    assert "the largest example alone, 100 tokens of a process, needs 1.0 of 0.5 GiB" in capfd.readouterr().err
