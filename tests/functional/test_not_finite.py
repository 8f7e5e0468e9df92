"""Steps that are not finite, as a user meets them: one example holds a token whose embedding is broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from refusals import check_refusal
from safetensors.torch import load_file, save_file
from tiny_models import preference_groups, write_lines
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

BROKEN = "w59"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    # The word occurs in one context only.
    groups = json.loads(re.sub(rf"\b{BROKEN}\b", "w1", json.dumps(preference_groups(10))))
    groups[3]["short_messages"][0]["content"] += f" {BROKEN}"
    write_lines(home.folder / "groups.jsonl", groups)
    path = Path(home.folder / "hf" / "model.safetensors")
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][4 + int(BROKEN[1:])] = float("nan")  # after four special tokens
    save_file(tensors, path, metadata={"format": "pt"})
    return home


def test_the_run_stops_and_names_the_example(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/stop", "--preference-loss", "simpo")) == 2
    check_refusal(capfd.readouterr().err, "loss-not-finite", "examples g3;", "--on-nonfinite skip")


def test_the_run_skips_and_counts(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--preference-loss", "simpo", "--on-nonfinite", "skip", "--train-iters", 6, "--global-batch-size", 2]
    assert run(main, home.argv("runs/skip", *flags)) == 0
    err = capfd.readouterr().err
    lines = home.metrics("runs/skip")
    skipped = [line for line in lines if "skipped" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and 1 <= len(skipped) <= 2
    assert all(line["loss"] is None and "g3" in line["skipped"] for line in skipped)
    assert all(line["loss"] > 0 for line in lines if "skipped" not in line)
    assert (
        f"skipped {len(skipped)} steps" in err and f"warning: step {skipped[0]['step']}: the loss is not finite" in err
    )


IN_ORDER = ["--preference-loss", "simpo", "--on-nonfinite", "skip", "--global-batch-size", 2, "--no-shuffle"]


def test_what_was_saved_before_the_run_stops_stays(home: Home) -> None:
    """Also where the save continues while the next step is computed."""
    flags = ["--preference-loss", "simpo", "--global-batch-size", 2, "--no-shuffle", "--save-interval", 1]
    assert run(main, home.argv("runs/async", *flags, "--async-save")) == 2
    folder = home.folder / "runs" / "async"
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000001"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1\n"


def test_a_run_that_ends_with_skipped_steps_reports_them(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/end", *IN_ORDER, "--train-iters", 2)) == 0
    err = capfd.readouterr().err
    assert re.search(r"^warning: every step after step 1 was skipped: the model is still that of step 1; ", err, re.M)
    assert re.search(r"^step 2/2 skipped left 0:00:00$", err, re.M)


def test_weights_that_training_broke_are_neither_saved_nor_exported(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    """An epsilon that float32 rounds to 0 makes 0 / 0 of every weight without gradient, in a step that is finite."""
    flags = ["--adam-eps", 1e-50, "--save-interval", 1, "--save-hf", home.folder / "broken-hf"]
    for name, last in (("early", 2), ("late", 1)):
        assert run(main, home.argv(f"runs/{name}", *IN_ORDER, *flags, "--train-iters", last)) == 2
        check_refusal(capfd.readouterr().err, "weights-not-finite", "step 1: ", "--adam-eps")
        assert not list((home.folder / "runs" / name).glob("iter_*")) and not (home.folder / "broken-hf").exists()
