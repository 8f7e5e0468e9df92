"""pretrain_solopo.py as a user runs it: one process, a tiny Hugging Face folder, a few steps."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, WORDS, conversations, preference_groups, write_lines, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from megatron_solopo import config as configuration
from megatron_solopo.cli import run
from megatron_solopo.training.run import main

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds", "tokens_per_second", "memory_gib")

EVERY_STEP = {
    "step",
    "split",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "groups",
    "tokens",
    "tokens_per_second",
    "padding_share",
    "seconds",
    "memory_gib",
}
PREFERENCE = {
    "po_loss",
    "alignment_loss",
    "reward_chosen",
    "reward_rejected",
    "reward_long_chosen",
    "margin",
    "accuracy",
    "short_long_gap_nats_per_token",
    "logp_chosen",
    "logp_rejected",
}


@dataclass(frozen=True)
class Home:
    """A user's folder: the model in ``hf``, data beside it, and what runs leave there."""

    folder: Path

    def argv(self, save: str, *flags: Any, data: str = "groups.jsonl", hf: str = "hf") -> list[str]:
        """A command line of five short steps; a later flag overrides an earlier one."""
        given = [
            "--hf-path",
            self.folder / hf,
            "--train-data",
            self.folder / data,
            "--save",
            self.folder / save,
            "--device",
            "cpu",
            "--seq-length",
            128,
            "--train-iters",
            5,
            "--global-batch-size",
            4,
            "--micro-batch-size",
            2,
            "--lr",
            1e-3,
            *flags,
        ]
        return list(map(str, given))

    def metrics(self, save: str, split: str = "train") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / save / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == split]

    def listing(self) -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in self.folder.rglob("*")}


def command(home: Home, argv: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "pretrain_solopo.py"), *argv]


def as_a_user(home: Home, argv: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.run(
        command(home, argv), cwd=home.folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    write_model(folder / "hf", noise=0.02)
    write_lines(folder / "groups.jsonl", preference_groups(10))
    write_lines(folder / "valid.jsonl", preference_groups(3, seed=4))
    write_lines(folder / "chats.jsonl", conversations(24))
    return Home(folder)


@pytest.fixture(scope="module")
def sft(home: Home) -> subprocess.CompletedProcess[str]:
    """An sft run of 60 steps on an easy set."""
    done = as_a_user(
        home,
        home.argv(
            "sft",
            "--objective",
            "sft",
            "--train-iters",
            60,
            "--global-batch-size",
            8,
            "--micro-batch-size",
            8,
            "--lr",
            2e-2,
            "--tensorboard-dir",
            home.folder / "board",
            "--save-hf",
            home.folder / "sft-hf",
            "--valid-data",
            home.folder / "chats.jsonl",
            "--eval-interval",
            30,
            data="chats.jsonl",
        ),
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def dpo(home: Home) -> str:
    """A SoLo-DPO run of five steps with a checkpoint after every second."""
    flags = [
        "--valid-data",
        home.folder / "valid.jsonl",
        "--eval-interval",
        2,
        "--save-interval",
        2,
        "--save-hf",
        home.folder / "dpo-hf",
    ]
    assert run(main, home.argv("runs/dpo", *flags)) == 0
    return "runs/dpo"


def test_the_loss_falls_on_an_easy_set(home: Home, sft: Any) -> None:
    lines = home.metrics("sft")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] > 2.5 and lines[-1]["loss"] < 0.5
    assert "step 60/60 loss" in sft.stderr and sft.stdout == ""
    valid = home.metrics("sft", "valid")
    assert [line["step"] for line in valid] == [30, 60] and valid[-1]["loss"] < 0.5
    assert lines[0]["tokens"] > 0 and lines[0]["padding_share"] == 0


def test_learning_rate_warms_up_and_decays(home: Home, sft: Any) -> None:
    rates = [line["lr"] for line in home.metrics("sft")]
    assert rates[:6] == pytest.approx([2e-2 * k / 6 for k in range(1, 7)])
    assert rates[6:] == sorted(rates[6:], reverse=True) and 0 < rates[-1] < 1e-3


def test_the_fields_of_a_metrics_line(home: Home, sft: Any, dpo: str) -> None:
    assert all(set(line) == EVERY_STEP | {"nll"} for line in home.metrics("sft"))
    assert all(set(line) == EVERY_STEP | PREFERENCE for line in home.metrics(dpo))
    assert all(set(line) == {"step", "split", "loss"} | PREFERENCE for line in home.metrics(dpo, "valid"))
    assert [line["step"] for line in home.metrics(dpo, "valid")] == [2, 4, 5]


def test_tensorboard_says_what_the_metrics_file_says(home: Home, sft: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(home.folder / "board"))
    board.Reload()
    for split, names in (("train", EVERY_STEP - {"step", "split"}), ("valid", {"loss", "nll"})):
        for name in names:
            events = [(event.step, event.value) for event in board.Scalars(f"{split}/{name}")]
            assert events == [
                (line["step"], pytest.approx(line[name], rel=1e-6)) for line in home.metrics("sft", split)
            ]


def test_the_exported_folder_generates_what_was_taught(home: Home, sft: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(home.folder / "sft-hf")
    tokenizer = AutoTokenizer.from_pretrained(home.folder / "sft-hf")
    assert json.loads((home.folder / "sft-hf" / "config.json").read_text())["vocab_size"] == SHAPE["vocab_size"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w3 w3 w3 w3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).split()[:3] == ["w3", "w3", "<end>"]


def test_config_yaml_starts_the_same_run_again(home: Home, dpo: str) -> None:
    path = home.folder / dpo / "config.yaml"
    again, _ = configuration.load(["--config", str(path)])
    first, _ = configuration.load(home.argv(dpo))
    assert again.as_dict()["method"] == first.as_dict()["method"]
    assert dataclasses.replace(again.training, eval_interval=0) == first.training
    assert (
        run(
            main,
            [
                "--config",
                str(path),
                "--save",
                str(home.folder / "runs/again"),
                "--save-hf",
                str(home.folder / "again-hf"),
            ],
        )
        == 0
    )
    assert losses(home, "runs/again") == pytest.approx(losses(home, dpo), rel=1e-5)
    assert set(yaml.safe_load(path.read_text())) == {"model", "data", "method", "parallel", "training", "output"}
    versions = yaml.safe_load((path.parent / "versions.yaml").read_text())
    assert {"torch", "megatron-core", "transformers", "python"} <= set(versions) and versions["processes"] == 1


def losses(home: Home, save: str) -> list[float]:
    return [line["loss"] for line in home.metrics(save)]


def test_a_dry_run_tells_and_touches_nothing(home: Home, dpo: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = home.listing()
    flags = ["--tensorboard-dir", home.folder / "b", "--save-hf", home.folder / "new-hf", "--dry-run"]
    assert run(main, home.argv("runs/new", *flags)) == 0
    assert home.listing() == before
    out = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(home.folder / "hf")
    assert f"{model.num_parameters():,} parameters" in out and "vocabulary 64 padded to 128" in out
    assert "5 steps of 4 examples, 20 in all (2.00 epochs)" in out
    assert "preference_loss: dpo" in out and "beta: 0.1" in out and "alignment_weight: 3.0" in out
    assert "1 process on cpu" in out and "the whole model, 1/1" in out
    for path in ("runs/new/metrics.jsonl", "runs/new/iter_0000005", "new-hf/", "b/", "runs/reference"):
        assert path in out, path
    tokens = sum(line["tokens"] for line in home.metrics(dpo)) / 2  # its five steps are two passes
    assert f"10 examples, {round(tokens):,} tokens a pass" in out


def test_reference_log_probs_are_computed_once(home: Home, dpo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache outlives the run; what it holds is used, and a damaged file is computed again."""
    files = sorted((home.folder / "runs" / "reference").iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 2  # training and validation examples
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert run(main, home.argv("runs/second", "--valid-data", home.folder / "valid.jsonl", "--train-iters", 2)) == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert sorted((home.folder / "runs" / "reference").iterdir()) == files
    train = next(path for path in files if load_file(path)["log_probs"].shape[0] == 10)
    good = load_file(train)["log_probs"]
    # Shifted by 1 nat, the table moves rewards by beta: what the file holds is what counts.
    save_file({"log_probs": good + torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)}, train)
    assert run(main, home.argv("runs/third", "--train-iters", 1)) == 0
    assert home.metrics("runs/third")[0]["reward_chosen"] == pytest.approx(-0.1, abs=1e-6)
    for damage in (before[train][0][:-100], b"", b"not a tensor"):
        train.write_bytes(damage)
        assert run(main, home.argv("runs/fourth", "--train-iters", 1)) == 0
        shutil.rmtree(home.folder / "runs/fourth")
        torch.testing.assert_close(load_file(train)["log_probs"], good, rtol=0, atol=1e-4)
    # Another method scores other responses, another precision gives other numbers: other files.
    for flags in (["--alignment-target", "both"], ["--bf16"]):
        count = len(list(train.parent.iterdir()))
        assert run(main, home.argv("runs/fifth", "--train-iters", 1, *flags)) == 0
        shutil.rmtree(home.folder / "runs/fifth")
        assert len(list(train.parent.iterdir())) == count + 1


def test_a_killed_run_goes_on(home: Home, dpo: str) -> None:
    """SIGKILL at an arbitrary moment; the same command with --load ends where the unbroken run ends."""
    flags = ["--train-iters", 12, "--save-interval", 1]
    assert run(main, home.argv("runs/unbroken", *flags)) == 0
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    process = subprocess.Popen(
        command(home, home.argv("runs/killed", *flags)), cwd=home.folder, env=environment, stderr=subprocess.DEVNULL
    )
    latest, deadline = home.folder / "runs/killed" / "latest_checkpointed_iteration.txt", time.monotonic() + 300
    while time.monotonic() < deadline and not (latest.is_file() and int(latest.read_text() or 0) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= int(latest.read_text()) < 12
    assert run(main, home.argv("runs/killed", *flags, "--load", home.folder / "runs/killed")) == 0
    assert [line["step"] for line in home.metrics("runs/killed")] == list(range(1, 13))
    assert losses(home, "runs/killed") == pytest.approx(losses(home, "runs/unbroken"), rel=1e-5)


# Wrong inputs. Each writes what is wrong below `home` and returns the flags that name it.


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
    (_copy(home, "broken-index") / "model.safetensors.index.json").write_text("{")
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


def _same_ids(records: list[dict]) -> None:
    records[1].update(chosen="unseen", rejected="unknown")  # words beyond the vocabulary are one token


WRONG: dict[str, tuple[Callable[[Home], dict[str, Any]], str]] = {
    "missing folder": (lambda home: {"hf": "nowhere"}, r"--hf-path \S+/nowhere: no such folder"),
    "no config.json": (_no_config, r"--hf-path \S+: the folder holds no config.json"),
    "config.json cut": (_broken_config, r"config.json: not readable"),
    "no weights": (_no_weights, r"no model.safetensors and no model.safetensors.index.json; .*--random-init"),
    "truncated weights": (_truncated, r"model.safetensors: not a complete safetensors file"),
    "index cut": (_broken_index, r"model.safetensors.index.json: not valid JSON"),
    "tensor missing": (_tensor_missing, r"the tensor 'model.norm.weight' is missing"),
    "tensor left over": (_tensor_left_over, r"the tensor 'model.layers.0.self_attn.q_proj.bias' is not part of llama"),
    "tensor of another shape": (_other_shape, r"model.norm.weight give shape \(16,\), config.json wants \(32,\)"),
    "unknown architecture": (_unknown_architecture, r"model_type 'gpt2' is not supported; supported are llama, qwen2"),
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
    "run folder in use": (
        lambda home: {"save": "runs/dpo"},
        r"--save \S+: holds checkpoints of an earlier run; .*--load",
    ),
    "run folder is a file": (_occupied, r"--save \S+/file: is not a folder"),
    "nothing to load": (_empty_run, r"--load \S+: no complete checkpoint there"),
    "export exists": (_existing_export, r"--save-hf \S+/mine: exists already; .*--force"),
    "unknown option": (lambda home: {"flags": ["--learning-rat", "1"]}, r"--learning-rat: unknown option"),
    "option without effect": (
        lambda home: {"flags": ["--simpo-gamma", "1"]},
        r"--simpo-gamma would have no effect: it needs --preference-loss simpo",
    ),
    "resume with other data": (
        _resume("data", data="other.jsonl"),
        r"--load: the checkpoint was trained on other examples",
    ),
    "resume with another length": (
        _resume("length", "--train-iters", 9),
        r"--load: the checkpoint's run has steps 5, this one 9",
    ),
    "resume with another batch": (
        _resume("batch", "--global-batch-size", 2),
        r"--load: the checkpoint's run has global_batch_size 4, this one 2",
    ),
    "resume with another order": (
        _resume("order", "--seed", 7),
        r"--load: the checkpoint's run has seed 1234, this one 7",
    ),
    "resume with another rate": (
        _resume("rate", "--lr", 2e-3),
        r"--load: the checkpoint's run has lr 0.001, this one 0.002",
    ),
    "resume with another model": (_resume("model", hf="wide"), r"iter_0000005 cannot be read"),
    "checkpoint cut": (_resume("cut", damage=_torn_checkpoint), r"iter_0000005 cannot be read"),
    "checkpoint gone": (
        _resume("gone", damage=lambda f: shutil.rmtree(f / "iter_0000005")),
        r"names iteration 5, but iter_0000005 is missing",
    ),
}
ONLY_IN_A_RUN = ("tensor missing", "tensor left over", "tensor of another shape", "resume", "checkpoint")
"""Weights and checkpoints are not read by a dry run."""


@pytest.fixture(scope="module")
def wrong(home: Home, dpo: str) -> dict[str, dict[str, Any]]:
    write_model(home.folder / "wide", LlamaConfig(**SHAPE | {"intermediate_size": 64}, tie_word_embeddings=False))
    return {name: write(home) for name, (write, _) in WRONG.items()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_status_2(
    home: Home, wrong: dict[str, dict[str, Any]], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    given = dict(wrong[name])
    argv = home.argv(given.pop("save", "runs/wrong"), *given.pop("flags", []), **given)
    modes = [[]] if name.startswith(ONLY_IN_A_RUN) else [[], ["--dry-run"]]
    for dry in modes:
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
