"""--rope-scaling on a command line: the run, its reference, its resumption and its exported folder."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
import yaml
from refusals import check_refusal
from safetensors.torch import load_file
from tiny_models import WORDS, preference_groups, write_lines
from training_home import Home, furnish
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_solopo import config_load
from megatron_solopo.cli import run
from megatron_solopo.training.preflight import load_data
from megatron_solopo.training.run import main

FLAGS = ("--seq-length", 512, "--rope-scaling", "yarn:2:256", "--train-iters", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Long contexts of 300 to 400 words, beyond the model's 256 positions."""
    home = furnish(tmp_path_factory.mktemp("home"))
    records = preference_groups(4)
    for number, record in enumerate(records):
        record["long_messages"][0]["content"] = " ".join(WORDS[(7 * i + number) % 60] for i in range(300 + 30 * number))
    write_lines(home.folder / "groups.jsonl", records)
    return home


@pytest.fixture(scope="module")
def extended(home: Home) -> str:
    """The name of a finished run."""
    assert run(main, home.argv("runs/yarn", *FLAGS, "--save-hf", home.folder / "longer")) == 0
    return "runs/yarn"


def test_the_reference_is_transformers_of_the_extended_config(home: Home, extended: str) -> None:
    """The folder's weights with the scaling written into config.json by hand, at positions up to 400."""
    by_hand = shutil.copytree(home.folder / "hf", home.folder / "by-hand")
    document = json.loads((by_hand / "config.json").read_text())
    theta = document.pop("rope_parameters")["rope_theta"]
    document |= {"rope_theta": theta, "max_position_embeddings": 512}
    document["rope_scaling"] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    (by_hand / "config.json").write_text(json.dumps(document))
    hf = AutoModelForCausalLM.from_pretrained(by_hand, dtype=torch.float32)
    config, _ = config_load.load(home.argv(extended, *FLAGS))
    (path,) = (home.folder / "runs/reference").glob("*.safetensors")
    cached, longest = load_file(path)["log_probs"].reshape(-1, 3), 0
    for row, group in zip(cached, load_data(config).reference["train"].groups, strict=True):
        theirs = []
        for prompt in group.prompts:
            for completion in prompt.completions:
                ids = torch.tensor([*prompt.ids, *completion.ids])
                with torch.no_grad():
                    log_probs = hf(ids[None]).logits[0, :-1].log_softmax(-1)
                theirs.append(log_probs.gather(1, ids[1:, None])[len(prompt.ids) - 1 :].sum().double())
                longest = max(longest, len(ids))
        torch.testing.assert_close(row.sort().values, torch.stack(theirs).sort().values, rtol=1e-5, atol=1e-4)
    assert longest > 390


def test_the_exported_folder_is_the_longer_model(home: Home, extended: str, capsys: pytest.CaptureFixture[str]) -> None:
    read = AutoConfig.from_pretrained(home.folder / "longer")
    assert read.max_position_embeddings == 512
    assert read.rope_parameters == {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 10000.0,
    }
    assert run(main, home.argv("runs/again", *FLAGS, hf="longer")) == 2
    check_refusal(capsys.readouterr().err, "rope-scaling-already-set", "--rope-scaling yarn:2:256: ", "'yarn'")
    flags = ["--seq-length", 512, "--dry-run"]
    assert run(main, home.argv("runs/again", *flags, hf="longer")) == 0
    assert "positions: 512 (RoPE yarn)" in capsys.readouterr().out


def test_the_scaling_is_part_of_the_run(home: Home, extended: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is written to config.yaml; another scaling has another reference and does not resume this run's checkpoint."""
    assert yaml.safe_load((home.folder / extended / "config.yaml").read_text())["model"]["rope_scaling"] == "yarn:2:256"
    load = ["--load", home.folder / extended]
    for wrong, named in (("linear:2:256", "linear:2:256"), ("yarn:4:256", "yarn:4:256")):
        flags: list[Any] = [*FLAGS, "--rope-scaling", wrong, *load]
        assert run(main, home.argv(extended, *flags)) == 2
        parts = ["--rope-scaling: ", f"run has yarn:2:256, this one {named}; "]
        check_refusal(capsys.readouterr().err, "checkpoint-other-run", *parts)
    before = set((home.folder / "runs/reference").iterdir())
    assert run(main, home.argv("runs/linear", *FLAGS, "--rope-scaling", "linear:2:256")) == 0
    assert len(set((home.folder / "runs/reference").iterdir()) - before) == 1


def test_without_it_the_same_run_is_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/none", "--seq-length", 512)) == 2
    parts = ["--seq-length 512 ", "max_position_embeddings 256 ", "--rope-scaling"]
    check_refusal(capsys.readouterr().err, "seq-length-beyond-positions", *parts)
