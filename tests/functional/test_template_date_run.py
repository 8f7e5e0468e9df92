"""A training run whose chat template prints the date: started on one day, it resumes, exports and answers on others."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from option_lines import last_wins
from tiny_models import TEMPLATE, write_model
from training_home import Home, furnish
from transformers.utils import chat_template_utils

from megatron_solopo import template_kwargs
from megatron_solopo.cli import run
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids
from megatron_solopo.training import reference
from megatron_solopo.training.convert import main as convert
from megatron_solopo.training.run import main

CHAT = [{"role": "user", "content": "w40"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    write_model(home.folder / "hf", noise=0.02, template="w{{ strftime_now('%d') | int }} " + TEMPLATE)
    return home


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets this machine's clock, and transformers', to a day of a month."""

    def set_to(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, zone: Any = None) -> datetime.datetime:
                return cls(2026, 1, day, 12)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(template_kwargs, "today", lambda: f"2026-01-{day:02}", raising=False)

    return set_to


def recorded(folder: Path) -> str:
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["chat_template_date"]


def first_word(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    return tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, CHAT))[0]


def test_a_run_is_the_same_run_on_another_day(home: Home, on: Callable[[int], None], capfd) -> None:
    folder = home.folder
    whole = home.argv("whole/run", "--train-iters", 4)
    parts = home.argv("parts/run", "--train-iters", 4, "--save-interval", 2, "--save-hf", folder / "parts/hf")
    on(1)
    assert run(main, whole) == 0
    assert run(main, [*parts, "--auto-resume"]) == 0
    back = ["--load", str(folder / "parts/run"), "--ckpt-step", "2", "--overwrite"]
    for day, more in ((2, ["--auto-resume"]), (3, back)):
        on(day)
        assert run(main, [*parts, *more]) == 0, capfd.readouterr().err
    assert recorded(folder / "parts/run") == "2026-01-01"
    assert len(list((folder / "parts/reference").glob("*.safetensors"))) == 1
    losses = [[line["loss"] for line in home.metrics(f"{name}/run")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    # The outputs of the run carry the day to every command that reads them, and to what convert-checkpoint writes.
    on(9)
    argv = ["megatron-to-hf", "--load", folder / "parts/run", "--save-hf", folder / "converted"]
    assert run(convert, list(map(str, argv))) == 0
    for name in ("parts/hf", "converted"):
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        assert settings["chat_template_date"] == "2026-01-01" and first_word(folder / name) == "w1"
    assert first_word(folder / "hf") == "w9"
    # Another day is another run, by name; and a new run has the day of its start.
    another = ["--auto-resume", "--train-iters", "6", "--chat-template-date", "2026-01-03"]
    assert run(main, last_wins([*parts, *another])) == 2
    assert "trained on other examples" in capfd.readouterr().err
    assert run(main, home.argv("new/run", "--train-iters", 1)) == 0
    assert recorded(folder / "new/run") == "2026-01-09"


def test_a_start_that_died_before_its_first_checkpoint_keeps_its_day(
    home: Home, on: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reference log-probs are those of the next start, which computes none again."""
    argv = home.argv("killed/run", "--train-iters", 1, "--auto-resume")
    on(4)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_solopo.training.step.train_step", die)
        assert run(main, argv) == 130
    on(5)
    monkeypatch.setattr(reference, "_fill", lambda *a, **k: pytest.fail("computed again"))
    assert run(main, argv) == 0
    assert recorded(home.folder / "killed/run") == "2026-01-04"


def test_the_dry_run_shows_the_day(home: Home, on: Callable[[int], None], capfd) -> None:
    on(6)
    assert run(main, [*home.argv("dry/run"), "--dry-run"]) == 0
    assert "chat_template_date: '2026-01-06'" in capfd.readouterr().out
