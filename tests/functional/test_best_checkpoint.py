"""--save-best, --early-stop and --eval-generate of a run: what is kept, when it ends, and what a resumed run knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal
from tiny_models import preference_groups, write_lines
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.conversion.manifest import iterations
from megatron_solopo.training.run import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    asked = [
        {"id": f"q{number}", "question": "w1", "answers": ["w2"], "short_tokens": 1, "long_tokens": 2}
        | {name: group[name] for name in ("short_messages", "long_messages")}
        for number, group in enumerate(preference_groups(2, seed=9))
    ]
    write_lines(home.folder / "held-out.jsonl", asked)
    return home


def argv(home: Home, save: str, *flags: Any) -> list[str]:
    """A run whose validation loss falls, and rises again."""
    valid = ("--valid-data", home.folder / "valid.jsonl", "--eval-interval", 1, "--save-best", "loss")
    rate = ("--train-iters", 8, "--lr", 0.02, "--lr-decay-style", "constant", "--lr-warmup-fraction", 0)
    return home.argv(save, "--preference-loss", "orpo", *valid, *rate, *flags)


def losses(home: Home, save: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in home.metrics(save, "valid")}


def kept(home: Home, save: str) -> dict[str, Any]:
    return json.loads((home.folder / save / "best.json").read_text())


@pytest.fixture(scope="module")
def best(home: Home) -> int:
    """The best step of a run that keeps one checkpoint besides."""
    assert run(main, argv(home, "runs/best", "--keep-last", 1)) == 0
    values = losses(home, "runs/best")
    return min(values, key=values.__getitem__)


def test_the_best_checkpoint_is_kept_besides_the_last(home: Home, best: int) -> None:
    assert 0 < best < 8
    value = losses(home, "runs/best")[best]
    assert kept(home, "runs/best") == {"step": best, "metric": "loss", "value": value, "stopped": None}
    assert list(iterations(home.folder / "runs/best")) == [best, 8]


def test_a_run_without_a_better_evaluation_ends(home: Home, best: int, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--keep-last", 1, "--early-stop", 2, "--save-hf", home.folder / "early-hf", "--auto-resume")
    values = losses(home, "runs/best")
    ends = next(n for n in range(2, 9) if min(values[n], values[n - 1]) >= min(values[step] for step in range(n - 1)))
    assert ends < 8
    assert run(main, argv(home, "runs/early", *flags)) == 0
    shown = capfd.readouterr().err
    assert f"early stop after step {ends} of 8: best is loss" in shown and "no better one in 2 evaluations" in shown
    assert losses(home, "runs/early") == {step: values[step] for step in range(ends + 1)}
    assert kept(home, "runs/early")["stopped"] == ends
    assert {kept(home, "runs/early")["step"], ends} - {0} == set(iterations(home.folder / "runs/early"))
    weights = (home.folder / "early-hf" / "model.safetensors").read_bytes()
    # The command again: it reads its evaluations and ends at once.
    assert run(main, argv(home, "runs/early", *flags)) == 0
    assert f"early stop after step {ends} of 8" in capfd.readouterr().err
    assert len(home.metrics("runs/early")) == ends
    assert (home.folder / "early-hf" / "model.safetensors").read_bytes() == weights


def test_a_resumed_run_knows_its_best(home: Home, best: int) -> None:
    save = home.folder / "runs/resumed"
    assert run(main, argv(home, "runs/resumed", "--train-iters", 8, "--save-interval", 3)) == 0
    unbroken = kept(home, "runs/resumed")
    assert unbroken["step"] == best
    (save / "best.json").unlink()
    step = next(number for number in iterations(save) if number >= best)
    assert run(main, argv(home, "runs/resumed", "--save-interval", 3, "--load", save, "--ckpt-step", step)) == 0
    assert kept(home, "runs/resumed") == unbroken
    assert best in iterations(save) and losses(home, "runs/resumed") == losses(home, "runs/best")


def test_held_out_questions_are_answered_and_logged(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    held_out = ("--eval-generate", home.folder / "held-out.jsonl", "--eval-max-new-tokens", 3)
    flags = ("--train-iters", 2, "--eval-interval", 2, "--save-best", "sub_em_long", *held_out)
    assert run(main, home.argv("runs/answers", "--preference-loss", "orpo", *flags)) == 0
    lines = home.metrics("runs/answers", "generate")
    assert [line["step"] for line in lines] == [0, 2] and all(line["answers"] == 4 for line in lines)
    assert re.search(r"^step 2 generate .*sub-EM short \d\.\d{3} sub-EM long \d\.\d{3}$", capfd.readouterr().err, re.M)
    written = (home.folder / "runs/answers/answers/step_0000002.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in written]
    assert [record["length"] for record in records] == ["short", "long"] * 2
    assert lines[-1]["sub_em_long"] == sum(record["sub_em"] for record in records[1::2]) / 2


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--save-best", "loss"), "option-unused", ["--save-best", "--valid-data or --eval-generate"]),
        (("--early-stop", 2), "option-unused", ["--early-stop", "--save-best"]),
        (("--eval-max-new-tokens", 2), "option-unused", ["--eval-max-new-tokens", "--eval-generate"]),
        (("--valid-data", "{valid}", "--save-best", "sub_em_long"), "metric-unknown", ["--save-best sub_em_long"]),
        (
            ("--eval-generate", "{held_out}", "--eval-max-new-tokens", 3, "--save-best", "loss"),
            "metric-unknown",
            ["--save-best loss", "sub_em_long"],
        ),
        (("--eval-generate", "{held_out}", "--seq-length", 70, "--overlong", "drop"), "prompt-too-long", ["'q"]),
        (("--eval-generate", "{valid}"), "field-missing", ["valid.jsonl:1", "question"]),
    ],
)
def test_wrong_options_are_refused_by_name(
    home: Home, capfd: pytest.CaptureFixture[str], flags: tuple[Any, ...], code: str, named: list[str]
) -> None:
    files = {"valid": home.folder / "valid.jsonl", "held_out": home.folder / "held-out.jsonl"}
    words = [str(flag).format(**files) for flag in flags]
    assert run(main, home.argv("runs/wrong", "--preference-loss", "orpo", *words)) == 2
    check_refusal(capfd.readouterr().err, code, *named)
    assert not Path(home.folder / "runs/wrong" / "metrics.jsonl").exists()
