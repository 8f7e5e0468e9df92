"""How an exported model talks: with the run's chat template, until the end of turn that it was trained with."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from refusals import check_refusal
from tiny_models import TEMPLATE
from training_home import Home, as_a_user, furnish
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.cli import run

REPLACED = TEMPLATE.replace("<user> ", "<user> w0 ")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """With a run that had a chat template, set as a file, and another end of turn."""
    home = furnish(tmp_path_factory.mktemp("home"))
    (home.folder / "chat.jinja").write_text(REPLACED)
    chat = ["--chat-template", home.folder / "chat.jinja", "--eos-token", "<user>"]
    done = as_a_user(home, home.argv("run", "--train-iters", 1, *chat, "--save-hf", home.folder / "run-hf"))
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def export(home: Home, target: Path) -> tuple[int, str]:
    """(status, stderr) of megatron-to-hf of the run."""
    from megatron_solopo.training.convert import main

    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = run(main, ["megatron-to-hf", "--load", str(home.folder / "run"), "--save-hf", str(target)])
    return status, err.getvalue()


@pytest.mark.parametrize("how", ["run", "command"])
def test_an_exported_model_ends_its_turns_as_it_was_trained_to(how: str, home: Home, tmp_path: Path) -> None:
    folder = home.folder / "run-hf"
    if how == "command":
        folder = tmp_path / "hf"
        status, stderr = export(home, folder)
        assert status == 0, stderr
    before = json.loads((home.folder / "hf" / "generation_config.json").read_text())
    written = json.loads((folder / "generation_config.json").read_text())
    assert before["eos_token_id"] == 2 and written == before | {"eos_token_id": [2, 1]}  # of <user>
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [2, 1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == REPLACED and tokenizer.eos_token == "<end>"


def test_a_chat_template_that_is_gone_is_refused_before_any_work(home: Home, tmp_path: Path) -> None:
    template = home.folder / "chat.jinja"
    aside = template.rename(tmp_path / "elsewhere")
    try:
        status, stderr = export(home, tmp_path / "hf")
    finally:
        aside.rename(template)
    assert status == 2 and stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    check_refusal(stderr, "file-missing", f"--load {home.folder / 'run'}: ", f"--chat-template {template} ")
