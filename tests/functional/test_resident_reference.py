"""--reference resident trains as --reference cached does, without a cache, and resumes; --reference none is refused
where the loss has a reference."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from refusals import check_refusal
from training_home import TIMES, Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

# The cache is filled in the order of the file, four examples at a time, as these steps train on them.
IN_ORDER = ("--no-shuffle", "--train-iters", 4, "--save-interval", 2)
METHODS: dict[str, tuple[Any, ...]] = {
    "solo": (),
    "short reference": ("--alignment-reference", "short"),
    "longpo": ("--preference-loss", "longpo", "--context-mode", "long"),
    "weighted tails": ("--preference-loss", "ld_dpo", "--alignment-reference", "short"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def argv(home: Home, name: str, mode: str, *flags: Any) -> list[str]:
    valid = ("--valid-data", home.folder / "valid.jsonl", "--eval-interval", 2)
    return home.argv(f"{name}-{mode}/run", *IN_ORDER, *valid, "--reference", mode, *flags)


def timeless(home: Home, save: str) -> list[dict[str, Any]]:
    lines = home.metrics(save) + home.metrics(save, "valid")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("name", METHODS)
def test_the_run_is_that_of_the_cache_bit_for_bit(home: Home, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for mode in ("cached", "resident"):
        assert run(main, argv(home, name, mode, *METHODS[name])) == 0
    assert timeless(home, f"{name}-resident/run") == timeless(home, f"{name}-cached/run")
    assert (home.folder / f"{name}-cached" / "reference").is_dir()
    assert [path.name for path in (home.folder / f"{name}-resident").iterdir()] == ["run"]
    assert "resident reference: 0.00 GiB of host memory a process\n" in capfd.readouterr().err


@pytest.mark.parametrize("before", ["resident", "cached"])
def test_a_resumed_run_compares_with_the_starting_weights(home: Home, before: str) -> None:
    """Not with those of the checkpoint; also where the run had a cache before."""
    folder = home.folder / f"resumed-{before}"
    assert run(main, argv(home, "unbroken", before)) == 0
    unbroken = timeless(home, f"unbroken-{before}/run")
    shutil.copytree(home.folder / f"unbroken-{before}" / "run", folder / "run")
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(folder / "run" / "iter_0000004")
    shutil.rmtree(home.folder / f"unbroken-{before}")
    resume = ("--save", folder / "run", "--load", folder / "run")
    assert run(main, argv(home, "resumed", "resident", *resume)) == 0
    assert timeless(home, f"resumed-{before}/run") == unbroken
    assert [path.name for path in folder.iterdir()] == ["run"]


def test_no_reference_is_refused_where_the_loss_has_one(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, argv(home, "none", "none")) == 2
    check_refusal(
        capfd.readouterr().err, "option-conflict", "--reference none with --preference-loss dpo", "orpo or simpo"
    )


@pytest.mark.parametrize("flags", [("--preference-loss", "orpo"), ("--objective", "sft")])
def test_other_losses_have_none(home: Home, flags: tuple[Any, ...]) -> None:
    data = "chats.jsonl" if "sft" in flags else "groups.jsonl"
    without = home.argv(f"without-{flags[1]}/run", "--reference", "none", "--train-iters", 1, *flags, data=data)
    assert run(main, without) == 0
    assert [path.name for path in (home.folder / f"without-{flags[1]}").iterdir()] == ["run"]
