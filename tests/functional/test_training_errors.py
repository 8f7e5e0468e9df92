"""Wrong inputs of pretrain_solopo.py: each is answered with one line that names it, and exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refusal
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
    name: str, *flags: Any, damage: Callable[[Path], Any] = lambda folder: None, **more: Any
) -> Callable[[Home], dict[str, Any]]:
    """Resumes from a copy of the dpo run with something else than before."""

    def write(home: Home) -> dict[str, Any]:
        folder = Path(shutil.copytree(home.folder / "runs/dpo", home.folder / "runs" / name))
        damage(folder)
        (home.folder / "other.jsonl").write_text("".join(json.dumps(g) + "\n" for g in preference_groups(10, seed=7)))
        return {"save": f"runs/{name}", "flags": ["--load", folder, *flags]} | more

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


WRONG: dict[str, tuple[Callable[[Home], dict[str, Any]], str, list[str]]] = {
    "missing folder": (lambda home: {"hf": "nowhere"}, "folder-missing", ["--hf-path ", "/nowhere: "]),
    "no config.json": (_no_config, "model-config-missing", ["--hf-path ", "/no-config: "]),
    "config.json cut": (_broken_config, "model-config-unreadable", ["/broken-config/config.json: "]),
    "no weights": (
        _no_weights,
        "weights-missing",
        ["model.safetensors, model.safetensors.index.json, pytorch_model.bin or ", "--random-init"],
    ),
    "truncated weights": (_truncated, "file-damaged", ["/truncated/model.safetensors: "]),
    "index cut": (_broken_index, "file-damaged", ["/broken-index/model.safetensors.index.json: "]),
    "tensor missing": (_tensor_missing, "tensor-missing", ["/tensor-missing", "'model.norm.weight'"]),
    "tensor left over": (
        _tensor_left_over,
        "tensor-left-over",
        ["/left-over", "'model.layers.0.self_attn.q_proj.bias'", "llama"],
    ),
    "tensor of another shape": (
        _other_shape,
        "tensor-shape",
        ["/other-shape", "'model.norm.weight'", "(16,)", "(32,)"],
    ),
    "unknown architecture": (
        _unknown_architecture,
        "model-type-unsupported",
        ["'gpt2'", "supported are deepseek_v2, ", "mixtral, ", "smollm3"],
    ),
    "no chat template": (_no_template, "", ["chat template", "--chat-template"]),
    "token beyond the vocabulary": (_small_vocabulary, "token-beyond-vocabulary", ["example 'g", "token id ", " 40;"]),
    "missing data": (lambda home: {"data": "nowhere.jsonl"}, "", ["/nowhere.jsonl: "]),
    "empty data": (_empty, "", ["/empty.jsonl: "]),
    "cut data": (_half_line, "", ["/half.jsonl:3: "]),
    "no long context": (
        _data("no-long", lambda r: r[1].pop("long_messages")),
        "",
        ["group 'g1'", "long_messages", "--context-mode short"],
    ),
    "overlong": (
        _data("overlong", lambda r: r[2].update(chosen=" ".join(WORDS * 3))),
        "",
        ["example 'g2' ", "--seq-length 128", "--overlong drop"],
    ),
    "chosen is rejected": (_data("same", lambda r: r[0].update(rejected=r[0]["chosen"])), "", ["/same.jsonl:1: "]),
    "chosen has rejected's ids": (_data("ids", _same_ids), "", ["group 'g1'", "token ids"]),
    "id twice": (_data("twice", lambda r: r[1].update(id="g0")), "", ["/twice.jsonl:2: ", "'g0'"]),
    "context too long for the model": (
        lambda home: {"flags": ["--seq-length", 300]},
        "seq-length-beyond-positions",
        ["--seq-length 300 ", "max_position_embeddings 256 "],
    ),
    "scaling from another length": (
        lambda home: {"flags": ["--rope-scaling", "yarn:2:100"]},
        "rope-scaling-positions",
        ["--rope-scaling yarn:2:100: ", "max_position_embeddings 256; use 256"],
    ),
    "run folder in use": (lambda home: {"save": "runs/dpo"}, "run-exists", ["--save ", "/runs/dpo: ", "--load "]),
    "run folder is a file": (_occupied, "not-a-folder", ["--save ", "/file: "]),
    "run folder is the model": (lambda home: {"save": "hf"}, "folder-overlap", ["--save ", "/hf: ", "--hf-path"]),
    "two runs in one folder": (
        lambda home: {
            "save": "runs/dpo",
            "flags": ["--load", shutil.copytree(home.folder / "runs/dpo", home.folder / "runs/origin")],
        },
        "run-exists",
        ["--save ", "/runs/dpo: ", "--load ", "/runs/origin"],
    ),
    "nothing to load": (_empty_run, "checkpoint-missing", ["--load ", "/empty-run: "]),
    "export exists": (_existing_export, "folder-exists", ["--save-hf ", "/mine: ", "--overwrite"]),
    "export over no model": (_no_model, "folder-not-a-model", ["--save-hf ", "/adapter: "]),
    "export over the run folder": (
        _export("runs/wrong"),
        "folder-overlap",
        ["--save-hf ", "/wrong: ", "--save ", "/runs/wrong;"],
    ),
    "export around the run folder": (
        _export("runs"),
        "folder-overlap",
        ["--save-hf ", "/runs: ", "--save ", "/wrong;"],
    ),
    "export into a checkpoint": (
        _export("runs/wrong/iter_0000005/hf"),
        "folder-overlap",
        ["--save-hf ", "/hf: ", "/wrong/iter_0000005,"],
    ),
    "export over the first model": (_export("hf"), "folder-overlap", ["--save-hf ", "/hf: ", "--hf-path ", "/hf;"]),
    "export over the data": (_export("groups.jsonl"), "folder-overlap", ["--save-hf ", "--train-data ", ".jsonl;"]),
    "export over the reference cache": (
        _export("runs/reference"),
        "folder-overlap",
        ["--save-hf ", "/runs/reference: ", "--reference-cache ", "/runs/reference;"],
    ),
    "export of a broken file": (_broken_generation_config, "not-json", ["/greedy/generation_config.json: "]),
    "export over TensorBoard's folder": (
        lambda home: {"flags": ["--save-hf", home.folder / "new", "--tensorboard-dir", home.folder / "new/events"]},
        "folder-overlap",
        ["--save-hf ", "/new: ", "--tensorboard-dir ", "/new/events;"],
    ),
    "export over the current folder": (
        lambda home: {"flags": ["--save-hf", ".", "--overwrite"]},
        "folder-overlap",
        ["--save-hf .: ", "the folder that the command runs in, /"],
    ),
    "export without a name": (_export(""), "option-value", ["--save-hf: "]),
    "unknown option": (lambda home: {"flags": ["--learning-rat", "1"]}, "option-unknown", ["--learning-rat: "]),
    "option without effect": (
        lambda home: {"flags": ["--simpo-gamma", "1"]},
        "option-unused",
        ["--simpo-gamma ", "--preference-loss simpo"],
    ),
    "resume with other data": (
        _resume("data", data="other.jsonl"),
        "checkpoint-other-data",
        ["--train-data: ", "/groups.jsonl, ", "/other.jsonl: "],
    ),
    "resume with another length": (
        _resume("length", "--train-iters", 9),
        "checkpoint-other-run",
        ["--train-iters 9: ", " 5 steps, ", " 9; ", "--override-opt-param-scheduler"],
    ),
    "resume with another batch": (
        _resume("batch", "--global-batch-size", 2),
        "checkpoint-other-run",
        ["--global-batch-size: ", "run has 4, this one 2; "],
    ),
    "resume with another order": (
        _resume("order", "--seed", 7),
        "checkpoint-other-run",
        ["--seed: ", "run has 1234, this one 7; "],
    ),
    "resume with another rate": (
        _resume("rate", "--lr", 2e-3),
        "checkpoint-other-run",
        ["--lr: ", "run has 0.001, this one 0.002; ", "--override-opt-param-scheduler"],
    ),
    "resume with another Adam": (
        _resume("adam", "--adam-beta2", 0.5),
        "checkpoint-other-run",
        ["--adam-beta2: ", "run has 0.95, this one 0.5; "],
    ),
    "checkpoint of another model": (
        _resume("model", hf="wide"),
        "checkpoint-other-reference",
        ["--hf-path ", "/wide: "],
    ),
    "checkpoint cut": (
        _resume("cut", damage=_torn_checkpoint),
        "checkpoint-incomplete",
        ["iter_0000005 ", "__0_0.distcp has ", "no earlier complete checkpoint"],
    ),
    "checkpoint exchanged": (
        _resume("exchanged", damage=_exchanged),
        "checkpoint-incomplete",
        ["iter_0000005 ", "__0_0.distcp does not hold what was written", "no earlier complete checkpoint"],
    ),
    "checkpoint without metadata": (
        _resume("headless", damage=lambda f: (f / "iter_0000005/.metadata").unlink()),
        "checkpoint-incomplete",
        [".metadata is missing"],
    ),
    "checkpoint with a foreign file": (
        _resume("foreign", damage=lambda f: (f / "iter_0000005/__9_0.distcp").touch()),
        "checkpoint-incomplete",
        ["__9_0.distcp does not belong to it"],
    ),
    "checkpoint without mark": (
        _resume("unmarked", damage=lambda f: (f / "iter_0000005/manifest.json").unlink()),
        "checkpoint-incomplete",
        ["manifest.json is missing"],
    ),
    "checkpoint cut, an earlier one complete": (
        _resume("cut-again", damage=_torn_with_an_earlier_one),
        "checkpoint-incomplete",
        ["iteration 2 is complete", "/cut-again --ckpt-step 2"],
    ),
    "checkpoint of another step": (
        _resume("step", "--ckpt-step", 3),
        "checkpoint-incomplete",
        ["--ckpt-step 3: ", "/iter_0000003 ", "the folder is missing"],
    ),
    "checkpoint number torn": (
        _resume("number", damage=lambda f: (f / "latest_checkpointed_iteration.txt").write_text("")),
        "file-damaged",
        ["/latest_checkpointed_iteration.txt", "found ''", "iteration 5 is complete", "--ckpt-step 5"],
    ),
    "checkpoint gone": (
        _resume("gone", damage=lambda f: shutil.rmtree(f / "iter_0000005")),
        "checkpoint-incomplete",
        ["iter_0000005 ", "the folder is missing"],
    ),
}
"""Name -> (what writes the wrong input, code, parts of the message). "" is a code of data/, which its tests know."""


@pytest.fixture(scope="module")
def wrong(home: Home, dpo: str) -> dict[str, dict[str, Any]]:
    write_model(home.folder / "wide", LlamaConfig(**SHAPE | {"intermediate_size": 64}, tie_word_embeddings=False))
    return {name: write(home) for name, (write, *_) in WRONG.items()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_status_2(
    home: Home, wrong: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """The run and its dry run refuse the same, in the same words."""
    options = dict(wrong[name])
    argv = home.argv(options.pop("save", "runs/wrong"), *options.pop("flags", []), **options)
    _, code, named = WRONG[name]
    errors = []
    for dry in ([], ["--dry-run"]):
        capfd.readouterr()
        assert run(main, argv + dry) == 2
        err = capfd.readouterr().err
        errors += [line for line in err.splitlines() if line.startswith("error: ")]
        if code:
            check_refusal(err, code, *named)
        assert all(part in errors[-1] for part in named), err
    assert len(errors) == 2 and errors[0] == errors[1]


def test_wrong_input_as_a_user_sees_it(home: Home, wrong: Any) -> None:
    done = as_a_user(home, home.argv("runs/wrong", hf="no-weights"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
