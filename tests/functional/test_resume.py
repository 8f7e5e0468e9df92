"""Going on from a checkpoint: what is refused, what a refusal leaves alone, and what counts as done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SHAPE, write_model
from training_home import Home, furnish
from transformers import LlamaConfig

from megatron_solopo.cli import run
from megatron_solopo.training.run import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    write_model(home.folder / "wide", LlamaConfig(**SHAPE | {"intermediate_size": 64}, tie_word_embeddings=False))
    return home


@pytest.fixture(scope="module")
def simpo(home: Home) -> Path:
    """A run of five steps, a loss without reference, with checkpoints of steps 2, 4 and 5."""
    assert run(main, home.argv("runs/simpo", "--preference-loss", "simpo", "--save-interval", 2)) == 0
    return home.folder / "runs/simpo"


def error_of(capfd: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What a command that is refused says."""
    capfd.readouterr()
    assert run(main, argv) == 2
    told = capfd.readouterr().err
    [error] = [line for line in told.splitlines() if line.startswith("error: ")]
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_on(home: Home, name: str, *flags: Any, **given: Any) -> list[str]:
    """The command line that goes on from step 2 of runs/NAME."""
    return home.argv(f"runs/{name}", "--load", home.folder / "runs" / name, "--ckpt-step", 2, *flags, **given)


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_run_folder_as_it_was(
    home: Home, simpo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The metrics of steps 3 to 5 above all, and the settings they had."""
    folder = Path(shutil.copytree(simpo, home.folder / "runs/kept"))
    before = contents(folder)
    board = home.folder / "board"
    flags = ["--preference-loss", "simpo", "--tensorboard-dir", board]
    assert "cannot be read" in error_of(capfd, go_on(home, "kept", *flags, hf="wide"))
    assert contents(folder) == before and not board.exists()
