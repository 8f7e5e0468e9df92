"""Wrong inputs of pretrain_solopo.py: each is answered with one line that names it, and exit status 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, WORDS, preference_groups, write_lines, write_model
from training_home import Home, as_a_user, furnish
from transformers import LlamaConfig

from megatron_solopo.cli import run
from megatron_solopo.training.run import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def dpo(home: Home) -> str:
    """A finished run with checkpoints."""
    assert run(main, home.argv("runs/dpo")) == 0
    return "runs/dpo"


# Each writes what is wrong below `home` and returns the flags that name it.


def _copy(home: Home, name: str) -> Path:
    return Path(shutil.copytree(home.folder / "hf", home.folder / name))


def _no_config(home: Home) -> dict[str, Any]:
    (_copy(home, "no-config") / "config.json").unlink()
    return {"hf": "no-config"}


def _broken_config(home: Home) -> dict[str, Any]:
    (_copy(home, "broken-config") / "config.json").write_text('{"model_type": "llama",')
    return {"hf": "broken-config"}


def _no_weights(home: Home) -> dict[str, Any]:
    (_copy(home, "no-weights") / "model.safetensors").unlink()
    return {"hf": "no-weights"}


def _truncated(home: Home) -> dict[str, Any]:
    path = _copy(home, "truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    return {"hf": "truncated"}


def _broken_index(home: Home) -> dict[str, Any]:
    folder = _copy(home, "broken-index")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    return {"hf": "broken-index"}


def _tensor_missing(home: Home) -> dict[str, Any]:
    path = _copy(home, "tensor-missing") / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)
    return {"hf": "tensor-missing"}


def _tensor_left_over(home: Home) -> dict[str, Any]:
    path = _copy(home, "left-over") / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    return {"hf": "left-over"}


def _other_shape(home: Home) -> dict[str, Any]:
    path = _copy(home, "other-shape") / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(16)}, path)
    return {"hf": "other-shape"}


def _unknown_architecture(home: Home) -> dict[str, Any]:
    path = _copy(home, "gpt2") / "config.json"
    path.write_text(
        json.dumps(
            {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        )
    )
    return {"hf": "gpt2"}


def _no_template(home: Home) -> dict[str, Any]:
    write_model(home.folder / "no-template", template=None)
    return {"hf": "no-template"}


def _small_vocabulary(home: Home) -> dict[str, Any]:
    write_model(home.folder / "small-vocabulary", LlamaConfig(**SHAPE | {"vocab_size": 40}, tie_word_embeddings=False))
    return {"hf": "small-vocabulary"}


def _data(name: str, change: Callable[[list[dict]], Any]) -> Callable[[Home], dict[str, Any]]:
    def write(home: Home) -> dict[str, Any]:
        records = preference_groups(3)
        change(records)
        write_lines(home.folder / f"{name}.jsonl", records)
        return {"data": f"{name}.jsonl"}

    return write


def _half_line(home: Home) -> dict[str, Any]:
    path = write_lines(home.folder / "half.jsonl", preference_groups(3))
    path.write_text(path.read_text()[:-30])
    return {"data": "half.jsonl"}


def _empty(home: Home) -> dict[str, Any]:
    (home.folder / "empty.jsonl").touch()
    return {"data": "empty.jsonl"}


def _occupied(home: Home) -> dict[str, Any]:
    (home.folder / "file").touch()
    return {"save": "file"}


def _existing_export(home: Home) -> dict[str, Any]:
    (home.folder / "mine").mkdir()
    return {"flags": ["--save-hf", home.folder / "mine"]}


def _no_model(home: Home) -> dict[str, Any]:
    (home.folder / "adapter").mkdir()
    (home.folder / "adapter" / "adapter_model.safetensors").write_text("mine")
    return {"flags": ["--save-hf", home.folder / "adapter", "--overwrite"]}


def _broken_generation_config(home: Home) -> dict[str, Any]:
    (_copy(home, "greedy") / "generation_config.json").write_text('{"do_sample": false,}')
    return {"hf": "greedy", "flags": ["--save-hf", home.folder / "new"]}


def _export(name: str) -> Callable[[Home], dict[str, Any]]:
    """A run in runs/wrong, exported into another folder of the home."""
    return lambda home: {"flags": ["--save-hf", name and home.folder / name, "--overwrite"]}


def _empty_run(home: Home) -> dict[str, Any]:
    (home.folder / "empty-run").mkdir()
    return {"flags": ["--load", home.folder / "empty-run"]}


def _resume(
    name: str, *flags: Any, damage: Callable[[Path], Any] = lambda folder: None, **given: Any
) -> Callable[[Home], dict[str, Any]]:
    """Going on from a copy of the dpo run with something else than before."""

    def write(home: Home) -> dict[str, Any]:
        folder = Path(shutil.copytree(home.folder / "runs/dpo", home.folder / "runs" / name))
        damage(folder)
        (home.folder / "other.jsonl").write_text("".join(json.dumps(g) + "\n" for g in preference_groups(10, seed=7)))
        return {"save": f"runs/{name}", "flags": ["--load", folder, *flags]} | given

    return write


def _torn_checkpoint(folder: Path) -> None:
    largest = max((folder / "iter_0000005").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def _exchanged(folder: Path) -> None:
    """The same size, other bytes."""
    path = folder / "iter_0000005" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


def _torn_with_an_earlier_one(folder: Path) -> None:
    shutil.copytree(folder / "iter_0000005", folder / "iter_0000002")
    manifest = folder / "iter_0000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"iteration": 5', '"iteration": 2'))
    _torn_checkpoint(folder)


def _same_ids(records: list[dict]) -> None:
    records[1].update(chosen="unseen", rejected="unknown")  # words beyond the vocabulary are one token


WRONG: dict[str, tuple[Callable[[Home], dict[str, Any]], str]] = {
    "missing folder": (lambda home: {"hf": "nowhere"}, r"--hf-path \S+/nowhere: no such folder"),
    "no config.json": (_no_config, r"--hf-path \S+: the folder holds no config.json"),
    "config.json cut": (_broken_config, r"config.json: not readable"),
    "no weights": (
        _no_weights,
        r"no model.safetensors, model.safetensors.index.json, pytorch_model.bin or .*--random-init",
    ),
    "truncated weights": (_truncated, r"model.safetensors: not a complete safetensors file"),
    "index cut": (_broken_index, r"model.safetensors.index.json: not valid JSON"),
    "tensor missing": (_tensor_missing, r"the tensor 'model.norm.weight' is missing"),
    "tensor left over": (_tensor_left_over, r"the tensor 'model.layers.0.self_attn.q_proj.bias' is not part of llama"),
    "tensor of another shape": (
        _other_shape,
        r"'model.norm.weight' has the shape \(16,\), config.json makes it \(32,\)",
    ),
    "unknown architecture": (
        _unknown_architecture,
        r"model_type 'gpt2' is not supported; supported are llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
    ),
    "no chat template": (_no_template, r"the tokenizer has no chat template; give one with --chat-template"),
    "token beyond the vocabulary": (
        _small_vocabulary,
        r"example 'g\d': token id \d+ is beyond the model's vocabulary of 40",
    ),
    "missing data": (lambda home: {"data": "nowhere.jsonl"}, r"nowhere.jsonl: no such file"),
    "empty data": (_empty, r"empty.jsonl: no usable example"),
    "cut data": (_half_line, r"half.jsonl:3: not valid JSON"),
    "no long context": (
        _data("no-long", lambda r: r[1].pop("long_messages")),
        r"group 'g1': no long_messages; .*--context-mode short",
    ),
    "overlong": (
        _data("overlong", lambda r: r[2].update(chosen=" ".join(WORDS * 3))),
        r"example 'g2' has \d+ tokens, above --seq-length 128; .*--overlong drop",
    ),
    "chosen is rejected": (
        _data("same", lambda r: r[0].update(rejected=r[0]["chosen"])),
        r"same.jsonl:1: chosen and rejected are the same text",
    ),
    "chosen has rejected's ids": (_data("ids", _same_ids), r"group 'g1': chosen and rejected are the same token ids"),
    "id twice": (_data("twice", lambda r: r[1].update(id="g0")), r"twice.jsonl:2: the id 'g0' was used before"),
    "context too long for the model": (
        lambda home: {"flags": ["--seq-length", 300]},
        r"--seq-length 300 is beyond .*max_position_embeddings 256",
    ),
    "scaling from another length": (
        lambda home: {"flags": ["--rope-scaling", "yarn:2:100"]},
        r"--rope-scaling yarn:2:100: ORIGINAL is 100, config.json has max_position_embeddings 256; give 256",
    ),
    "run folder in use": (
        lambda home: {"save": "runs/dpo"},
        r"--save \S+: holds checkpoints of an earlier run; .*--load",
    ),
    "run folder is a file": (_occupied, r"--save \S+/file: is not a folder"),
    "run folder is the model": (
        lambda home: {"save": "hf"},
        r"--save \S+/hf: is --hf-path too, .*; choose another folder",
    ),
    "two runs in one folder": (
        lambda home: {
            "save": "runs/dpo",
            "flags": ["--load", shutil.copytree(home.folder / "runs/dpo", home.folder / "runs/origin")],
        },
        r"--save \S+/runs/dpo: holds checkpoints of another run than --load \S+/runs/origin",
    ),
    "nothing to load": (_empty_run, r"--load \S+: no complete checkpoint there"),
    "export exists": (_existing_export, r"--save-hf \S+/mine: exists already; .*--overwrite"),
    "export over no model": (_no_model, r"--save-hf \S+/adapter: holds no model, and only models are replaced"),
    "export over the run folder": (
        _export("runs/wrong"),
        r"--save-hf \S+/wrong: would take the place of --save \S+/runs/wrong; choose a folder that does not hold it",
    ),
    "export around the run folder": (_export("runs"), r"--save-hf \S+/runs: would take the place of --save \S+/wrong;"),
    "export into a checkpoint": (
        _export("runs/wrong/iter_0000005/hf"),
        r"--save-hf \S+/hf: lies in the checkpoint \S+/wrong/iter_0000005,",
    ),
    "export over the first model": (_export("hf"), r"--save-hf \S+/hf: would take the place of --hf-path \S+/hf;"),
    "export over the data": (_export("groups.jsonl"), r"--save-hf \S+: would take the place of --train-data \S+;"),
    "export over the reference cache": (
        _export("runs/reference"),
        r"--save-hf \S+/runs/reference: would take the place of --reference-cache \S+/runs/reference;",
    ),
    "export of a broken file": (
        _broken_generation_config,
        r"/greedy/generation_config.json: not a JSON object;",
    ),
    "export over boards": (
        lambda home: {"flags": ["--save-hf", home.folder / "new", "--tensorboard-dir", home.folder / "new/boards"]},
        r"--save-hf \S+/new: would take the place of --tensorboard-dir \S+/new/boards;",
    ),
    "export over the current folder": (
        lambda home: {"flags": ["--save-hf", ".", "--overwrite"]},
        r"--save-hf .: would take the place of the folder that the command runs in, /\S+; choose",
    ),
    "export without a name": (_export(""), r"--save-hf: the name of the folder is empty;"),
    "unknown option": (lambda home: {"flags": ["--learning-rat", "1"]}, r"--learning-rat: unknown option"),
    "option without effect": (
        lambda home: {"flags": ["--simpo-gamma", "1"]},
        r"--simpo-gamma would have no effect: it needs --preference-loss simpo",
    ),
    "resume with other data": (
        _resume("data", data="other.jsonl"),
        r"--train-data: the checkpoint's run has \S+, this one \S+: the checkpoint was trained on other examples",
    ),
    "resume with another length": (
        _resume("length", "--train-iters", 9),
        r"--train-iters 9: the checkpoint's run has 5 steps, this one 9; give .* or extend the run with --override-opt",
    ),
    "resume with another batch": (
        _resume("batch", "--global-batch-size", 2),
        r"--global-batch-size: the checkpoint's run has 4, this one 2; give the same as before, or start anew",
    ),
    "resume with another order": (
        _resume("order", "--seed", 7),
        r"--seed: the checkpoint's run has 1234, this one 7",
    ),
    "resume with another rate": (
        _resume("rate", "--lr", 2e-3),
        r"--lr: the checkpoint's run has 0.001, this one 0.002; .*, or change it from here on with --override-opt-",
    ),
    "resume with another Adam": (
        _resume("adam", "--adam-beta2", 0.5),
        r"--adam-beta2: the checkpoint's run has 0.95, this one 0.5; give the same as before, or start anew",
    ),
    "checkpoint of another model": (
        _resume("model", hf="wide"),
        r"--hf-path \S+/wide: its files are not those that the run started from",
    ),
    "checkpoint cut": (
        _resume("cut", damage=_torn_checkpoint),
        r"iter_0000005 cannot be used: __0_0.distcp has [\d,]+ bytes, [\d,]+ were written; .*no earlier",
    ),
    "checkpoint exchanged": (
        _resume("exchanged", damage=_exchanged),
        r"cannot be used: __0_0.distcp does not hold what was written; .*no earlier complete checkpoint",
    ),
    "checkpoint without metadata": (
        _resume("headless", damage=lambda f: (f / "iter_0000005/.metadata").unlink()),
        r"cannot be used: .metadata is missing",
    ),
    "checkpoint with a foreign file": (
        _resume("foreign", damage=lambda f: (f / "iter_0000005/__9_0.distcp").touch()),
        r"cannot be used: __9_0.distcp does not belong to it",
    ),
    "checkpoint without mark": (
        _resume("unmarked", damage=lambda f: (f / "iter_0000005/manifest.json").unlink()),
        r"cannot be used: manifest.json is missing, so its writing was not finished",
    ),
    "checkpoint cut, an earlier one complete": (
        _resume("cut-again", damage=_torn_with_an_earlier_one),
        r"cannot be used: .*; iteration 2 is complete: .* --load \S+/cut-again --ckpt-step 2",
    ),
    "checkpoint of another step": (
        _resume("step", "--ckpt-step", 3),
        r"--ckpt-step 3: the checkpoint \S+/iter_0000003 cannot be used: the folder is missing",
    ),
    "checkpoint number torn": (
        _resume("number", damage=lambda f: (f / "latest_checkpointed_iteration.txt").write_text("")),
        r"must hold the number of an iteration, found ''; iteration 5 is complete: .*--ckpt-step 5",
    ),
    "checkpoint gone": (
        _resume("gone", damage=lambda f: shutil.rmtree(f / "iter_0000005")),
        r"iter_0000005 cannot be used: the folder is missing",
    ),
}


@pytest.fixture(scope="module")
def wrong(home: Home, dpo: str) -> dict[str, dict[str, Any]]:
    write_model(home.folder / "wide", LlamaConfig(**SHAPE | {"intermediate_size": 64}, tie_word_embeddings=False))
    return {name: write(home) for name, (write, _) in WRONG.items()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_status_2(
    home: Home, wrong: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """The run and its dry run refuse the same, in the same words."""
    given = dict(wrong[name])
    argv = home.argv(given.pop("save", "runs/wrong"), *given.pop("flags", []), **given)
    for dry in ([], ["--dry-run"]):
        capfd.readouterr()
        assert run(main, argv + dry) == 2
        err = capfd.readouterr().err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert re.search(WRONG[name][1], errors[0]), errors[0]


def test_wrong_input_as_a_user_sees_it(home: Home, wrong: Any) -> None:
    done = as_a_user(home, home.argv("runs/wrong", hf="no-weights"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
