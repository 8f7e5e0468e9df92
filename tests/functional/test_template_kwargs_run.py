"""--chat-template-kwargs of a training run: its data, its identity and its exported folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import TEMPLATE, write_model
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids
from megatron_solopo.training.convert import main as convert
from megatron_solopo.training.run import main

OFF = '{"enable_thinking": false}'
TWO = ["--train-iters", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The model's template has an empty thought when thinking is switched off, as Qwen3's."""
    home = furnish(tmp_path_factory.mktemp("home"))
    thought = "<assistant> {% if enable_thinking is defined and not enable_thinking %}w58 w59 {% endif %}{% endif %}"
    write_model(home.folder / "hf", noise=0.02, template=TEMPLATE.replace("<assistant> {% endif %}", thought))
    assert run(main, home.argv("runs/off", *TWO, "--chat-template-kwargs", OFF, "--save-hf", home.folder / "off")) == 0
    return home


def ending(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, [{"role": "user", "content": "w1"}]))[-3:]


def test_exported_folders_hold_the_runs_values(home: Home) -> None:
    """Those of the run and those that convert-checkpoint makes of it."""
    arguments = ["megatron-to-hf", "--load", str(home.folder / "runs/off"), "--save-hf", str(home.folder / "converted")]
    assert run(convert, arguments) == 0
    for name in ("off", "converted"):
        written = json.loads((home.folder / name / "tokenizer_config.json").read_text())
        assert written["chat_template_kwargs"] == {"enable_thinking": False}
        assert ending(home.folder / name) == ["<assistant>", "w58", "w59"]
    assert ending(home.folder / "hf") == ["<user>", "w1", "<assistant>"]


def test_other_values_are_another_run_and_another_reference(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/off", "--train-iters", "3", "--load", home.folder / "runs/off")) == 2
    assert "the checkpoint was trained on other examples (data, tokenizer or template" in capsys.readouterr().err
    assert run(main, home.argv("runs/on", *TWO)) == 0
    assert len(list((home.folder / "runs/reference").glob("*.safetensors"))) == 2
    assert home.metrics("runs/on")[0]["tokens"] < home.metrics("runs/off")[0]["tokens"]
