"""--add-special-tokens on a command line: rows, tokenizer, reference, resumption, conversion and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import preference_groups, write_lines
from training_home import Home, furnish
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo import config_load
from megatron_solopo.cli import run
from megatron_solopo.training import convert
from megatron_solopo.training.preflight import load_data
from megatron_solopo.training.run import main

TOKENS = "<think>,</think>"
FLAGS = ("--add-special-tokens", TOKENS, "--train-iters", 4, "--save-interval", 2)
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Chosen answers with a thought between the new tokens; the model and its tokenizer have 64 rows and ids."""
    home = furnish(tmp_path_factory.mktemp("home"))
    records = preference_groups(8)
    for record in records:
        record["chosen"] = f"<think> w1 </think> {record['chosen']}"
    write_lines(home.folder / "groups.jsonl", records)
    return home


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def with_means(before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The folder's matrices with two more rows, in the plainest way."""
    return before | {
        name: torch.cat((before[name], before[name].mean(0, keepdim=True).repeat(2, 1))) for name in MATRICES
    }


@pytest.fixture(scope="module")
def trained(home: Home) -> str:
    """The name of a finished run."""
    assert run(main, home.argv("runs/thinks", *FLAGS, "--save-hf", home.folder / "thinks")) == 0
    return "runs/thinks"


def test_the_exported_folder_has_the_tokens(home: Home, trained: str) -> None:
    """In transformers, and as the start of another run, where the option would add them a second time."""
    model = AutoModelForCausalLM.from_pretrained(home.folder / "thinks")
    tokenizer = AutoTokenizer.from_pretrained(home.folder / "thinks")
    assert model.config.vocab_size == 66 and tokenizer.convert_tokens_to_ids(TOKENS.split(",")) == [64, 65]
    ids = tokenizer("<think> w1 </think>", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[64, 5, 65]] and model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 3
    before = weights(home.folder / "hf")
    for name in MATRICES:
        assert weights(home.folder / "thinks")[name].shape == (66, before[name].shape[1])
    moved = weights(home.folder / "thinks")["lm_head.weight"][64:] - with_means(before)["lm_head.weight"][64:]
    assert (moved.abs().max(1).values > 1e-4).all()  # both were trained
    flags = ("--train-iters", 1)
    assert run(main, home.argv("others/on", *flags, hf="thinks")) == 0
    assert home.metrics("others/on")[0]["loss"] > 0


def test_the_exported_folder_is_compared_with_its_checkpoint(home: Home, trained: str) -> None:
    command = ["verify", "--hf-path", str(home.folder / "thinks"), "--load", str(home.folder / trained)]
    assert run(convert.main, command) == 0


def test_the_tokens_are_in_the_tokenizer_once(home: Home, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/twice", *FLAGS, hf="thinks")) == 2
    assert "--add-special-tokens <think>: the tokenizer of" in capsys.readouterr().err
    assert not (home.folder / "runs/twice").exists()


def test_the_reference_has_the_mean_rows(home: Home, trained: str, tmp_path: Path) -> None:
    """transformers with the two rows written by hand computes the cached log-probs."""
    hf = AutoModelForCausalLM.from_pretrained(home.folder / "hf")
    hf.resize_token_embeddings(66, mean_resizing=False)
    hf.load_state_dict(with_means(weights(home.folder / "hf")))
    config, _ = config_load.load(home.argv(trained, *FLAGS))
    (path,) = (home.folder / "runs/reference").glob("*.safetensors")
    table = load_file(path)["log_probs"].reshape(-1, 3)
    for row, group in zip(table, load_data(config).reference["train"].groups, strict=True):
        theirs = []
        for prompt in group.prompts:
            for completion in prompt.completions:
                ids = torch.tensor([*prompt.ids, *completion.ids])
                with torch.no_grad():
                    log_probs = hf(ids[None]).logits[0, :-1].log_softmax(-1)
                theirs.append(log_probs.gather(1, ids[1:, None])[len(prompt.ids) - 1 :].sum().double())
        torch.testing.assert_close(row.sort().values, torch.stack(theirs).sort().values, rtol=1e-5, atol=1e-4)


def test_a_resumed_run_is_the_unbroken_run(home: Home, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--load", home.folder / trained, "--ckpt-step", 2)
    assert run(main, home.argv("runs/resumed", *FLAGS, *load, "--save-hf", home.folder / "resumed")) == 0
    ours, theirs = weights(home.folder / "resumed"), weights(home.folder / "thinks")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert yaml.safe_load((home.folder / trained / "config.yaml").read_text())["model"]["add_special_tokens"] == TOKENS
    capsys.readouterr()
    other: list[Any] = [*FLAGS, "--add-special-tokens", "<think>,</think>,<more>", *load]
    assert run(main, home.argv("runs/other", *other)) == 2
    assert "has <think>,</think>, this one <think>,</think>,<more>" in capsys.readouterr().err


def test_a_converted_folder_has_the_mean_rows_and_trains_the_same(
    home: Home, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = home.folder / "megatron", home.folder / "back"
    command = ["hf-to-megatron", "--hf-path", home.folder / "hf", "--save", megatron, "--add-special-tokens", TOKENS]
    assert run(convert.main, list(map(str, command))) == 0
    assert run(convert.main, ["megatron-to-hf", "--load", str(megatron), "--save-hf", str(back)]) == 0
    ours, theirs = weights(back), with_means(weights(home.folder / "hf"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0 if name not in MATRICES else 1e-7)
        assert torch.equal(ours[name][:64], theirs[name][:64])
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 66
    assert AutoTokenizer.from_pretrained(back).convert_tokens_to_ids("</think>") == 65
    assert run(main, home.argv("others/converted", *FLAGS[2:], hf="megatron")) == 0
    assert [line["loss"] for line in home.metrics("others/converted")] == [
        line["loss"] for line in home.metrics(trained)
    ]
    capsys.readouterr()
    assert run(main, home.argv("runs/no", *FLAGS, hf="megatron")) == 2
    assert "convert-checkpoint hf-to-megatron" in capsys.readouterr().err


def test_a_checkpoint_of_the_run_exports_the_tokens(home: Home, trained: str) -> None:
    target = home.folder / "exported"
    assert run(convert.main, ["megatron-to-hf", "--load", str(home.folder / trained), "--save-hf", str(target)]) == 0
    files = {path.name: path.read_bytes() for path in (home.folder / "thinks").iterdir()}
    assert files == {path.name: path.read_bytes() for path in target.iterdir()}


def test_rows_that_no_token_uses_are_used_first(home: Home, tmp_path: Path) -> None:
    """A model with more rows than its tokenizer has ids, as Qwen2's: the matrices stay as they are."""
    from megatron_solopo.conversion.new_tokens import new_rows

    rows = new_rows(home.folder / "hf", 70, TOKENS)
    matrix = torch.randn(70, 8)
    grown = rows.grown(matrix)
    assert rows.rows == 70 and torch.equal(grown[66:], matrix[66:]) and torch.equal(grown[:64], matrix[:64])
    torch.testing.assert_close(grown[64:66], matrix[:64].mean(0).repeat(2, 1))
