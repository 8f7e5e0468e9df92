"""Runs with --stretch-positions: resumed bit for bit, a cache for each draw, true positions in evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal
from tiny_models import conversations, in_paragraphs, preference_groups, write_lines, write_model
from training_home import TIMES, Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

STRETCH = ("--stretch-positions", 200)
STILL = ("--lr", 1e-12, "--no-shuffle", "--global-batch-size", 10, "--train-iters", 2)
"""Two steps of all examples in which the weights stay where they are."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    write_lines(home.folder / "groups.jsonl", in_paragraphs(preference_groups(10)))
    write_lines(home.folder / "valid.jsonl", in_paragraphs(preference_groups(3, seed=4)))
    return home


def argv(home: Home, name: str, *flags: Any) -> list[str]:
    return home.argv(f"{name}/run", *flags)


def timeless(home: Home, save: str) -> list[dict[str, Any]]:
    lines = home.metrics(save) + home.metrics(save, "valid")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def cache(home: Home, name: str) -> Path:
    [path] = (home.folder / name / "reference").glob("*.safetensors")
    return path


def long_log_probs(home: Home, name: str, *flags: Any) -> list[float]:
    """The mean log-prob of the chosen answers at length in each step; the weights stay as they are."""
    assert run(main, argv(home, name, *STILL, *flags)) == 0
    return [line["logp_long_chosen"] for line in home.metrics(f"{name}/run")]


def test_a_resumed_run_draws_the_same_positions(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """In its second epoch too, and evaluates at true positions."""
    valid = ("--valid-data", home.folder / "valid.jsonl")
    flags = (*STRETCH, *valid, "--preference-loss", "orpo", "--train-iters", 6, "--save-interval", 2)
    assert run(main, argv(home, "orpo", *flags)) == 0
    assert (
        "positions: long prompts with a response span up to 200 positions; gaps are drawn anew"
        in capfd.readouterr().err
    )
    unbroken = timeless(home, "orpo/run")
    run_folder = home.folder / "orpo" / "run"
    (run_folder / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(run_folder / "iter_0000004")
    shutil.rmtree(run_folder / "iter_0000006")
    assert run(main, argv(home, "orpo", *flags, "--load", run_folder)) == 0
    assert timeless(home, "orpo/run") == unbroken
    for changed, named in (
        (("--stretch-positions", 180), "--stretch-positions: the checkpoint's run has 200, this one 180"),
        (("--stretch-fraction", 0.5), "--stretch-fraction: the checkpoint's run has 1.0, this one 0.5"),
    ):
        capfd.readouterr()
        assert run(main, argv(home, "orpo", *flags, "--load", run_folder, *changed)) == 2
        check_refusal(capfd.readouterr().err, "checkpoint-other-run", named)
    assert run(main, argv(home, "plain", *flags[2:], "--train-iters", 1)) == 0
    plain, stretched = (home.metrics(f"{name}/run", "valid")[0] for name in ("plain", "orpo"))
    assert plain["loss"] == stretched["loss"]
    plain, stretched = (home.metrics(f"{name}/run")[0] for name in ("plain", "orpo"))
    assert plain["tokens"] == stretched["tokens"] and plain["logp_chosen"] == stretched["logp_chosen"]
    assert abs(plain["logp_long_chosen"] - stretched["logp_long_chosen"]) > 1e-4


def test_epochs_draw_anew_unless_a_cache_has_the_log_probs(home: Home) -> None:
    """The reference on the short context alone does not depend on the positions."""
    first, second = long_log_probs(home, "anew", *STRETCH, "--preference-loss", "orpo")
    assert abs(first - second) > 1e-4
    first, second = long_log_probs(home, "cached", *STRETCH)
    assert first == pytest.approx(second, abs=1e-6)
    resident = long_log_probs(home, "resident", *STRETCH, "--reference", "resident")
    assert resident[0] == pytest.approx(first, abs=1e-5) and abs(resident[1] - first) > 1e-4
    line = home.metrics("resident/run")[1]  # the policy is the reference, which saw the same positions
    assert line["alignment_loss"] == pytest.approx(0, abs=1e-4) and line["po_loss"] == pytest.approx(0.693147, abs=1e-5)
    first, second = long_log_probs(home, "on-short", *STRETCH, "--alignment-reference", "short")
    assert abs(first - second) > 1e-4
    long_log_probs(home, "on-short-plain", "--alignment-reference", "short")
    assert cache(home, "on-short").name == cache(home, "on-short-plain").name


def test_prompts_of_conversations_are_stretched(home: Home) -> None:
    records = conversations(10)
    for record in records:
        record["messages"][0]["content"] = record["messages"][0]["content"].replace(" ", "\n\n")
    write_lines(home.folder / "chats.jsonl", records)
    flags = ("--objective", "sft", *STILL, *STRETCH)
    assert run(main, home.argv("sft/run", *flags, data="chats.jsonl")) == 0
    first, second = (line["loss"] for line in home.metrics("sft/run"))
    assert abs(first - second) > 1e-5


def test_each_draw_has_a_cache_and_a_wrong_one_is_refused(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """The model has large weights, so that its log-probs depend much on positions."""
    names, once = {}, ("--train-iters", 1, "--hf-path", write_model(home.folder / "large", noise=0.4))
    for name, flags in {
        "plain": (),
        "stretched": STRETCH,
        "other-length": ("--stretch-positions", 150),
        "other-seed": (*STRETCH, "--seed", 5),
        "other-share": (*STRETCH, "--stretch-fraction", 0.9),
    }.items():
        assert run(main, argv(home, f"key-{name}", *once, *flags)) == 0
        names[name] = cache(home, f"key-{name}")
        capfd.readouterr()
    assert len({path.name for path in names.values()}) == len(names)
    shutil.rmtree(home.folder / "key-stretched" / "run")
    assert run(main, argv(home, "key-stretched", *once, *STRETCH)) == 0
    assert "reference log-probs of" not in capfd.readouterr().err  # its cache serves it again
    shutil.rmtree(home.folder / "key-stretched" / "run")
    shutil.copy(names["plain"], names["stretched"])
    assert run(main, argv(home, "key-stretched", *once, *STRETCH)) == 2
    check_refusal(capfd.readouterr().err, "reference-cache-mismatch", names["stretched"].name, "long_chosen")


def test_a_run_keeps_its_reference_where_positions_depend_on_it(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--train-iters", 2, "--save-interval", 1)
    for name, more in (("kept", STRETCH), ("free", (*STRETCH, "--alignment-reference", "short"))):
        assert run(main, argv(home, name, *flags, *more)) == 0
        folder = home.folder / name / "run"
        (folder / "latest_checkpointed_iteration.txt").write_text("1\n")
        shutil.rmtree(folder / "iter_0000002")
        capfd.readouterr()
        status = run(main, argv(home, name, *flags, *more, "--load", folder, "--reference", "resident"))
        assert status == (2 if name == "kept" else 0)
        if status:
            named = "--reference: the checkpoint's run has cached, this one resident"
            check_refusal(capfd.readouterr().err, "checkpoint-other-run", named)


def test_what_the_model_does_not_reach_is_refused(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, argv(home, "far", "--stretch-positions", 300)) == 2
    named = ("--stretch-positions 300", "max_position_embeddings 256", "--rope-scaling")
    check_refusal(capfd.readouterr().err, "seq-length-beyond-positions", *named)
    assert run(main, argv(home, "near", "--stretch-positions", 20)) == 2
    check_refusal(capfd.readouterr().err, "stretch-too-short", "groups.jsonl", "--stretch-positions 20")
    scaled = ("--stretch-positions", 1000, "--stretch-fraction", 0.5, "--rope-scaling", "yarn:4:256", "--dry-run")
    assert run(main, argv(home, "scaled", *scaled)) == 0
    line = (
        "positions: long prompts with a response span up to 1,000 positions, 0.5 of the examples; gaps are drawn once"
    )
    assert line in capfd.readouterr().out
