"""pretrain_solopo.py as a user runs it: one process, a tiny Hugging Face folder, a few steps."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import time
from typing import Any

import numpy
import pytest
import torch
import yaml
from option_lines import last_wins
from refusals import check_refusal
from safetensors.torch import load_file
from tiny_models import SHAPE, preference_groups, write_lines
from training_home import ENVIRONMENT, Home, as_a_user, command, furnish
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo import config_load
from megatron_solopo.cli import run
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.manifest import find_checkpoint, iterations
from megatron_solopo.training.run import main

EVERY_STEP = set(
    "step split epoch loss lr grad_norm groups tokens tokens_per_second padding_share compute_imbalance seconds "
    "memory_gib clip_grad clipped data_seconds data_rank".split()
)
PREFERENCE = set(
    "po_loss alignment_loss reward_chosen reward_rejected reward_long_chosen margin accuracy "
    "short_long_gap_nats_per_token logp_chosen logp_rejected logp_long_chosen".split()
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


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
    assert [line["step"] for line in valid] == [0, 30, 60] and valid[-1]["loss"] < 0.5
    assert lines[0]["tokens"] > 0 and lines[0]["padding_share"] == 0


def test_training_draws_no_random_numbers(home: Home) -> None:
    """Checkpoints hold no random state because none is used: a run leaves the generators as its seed set them."""
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    assert run(main, home.argv("drawn/run", "--seed", 7, "--context-mode", "short", "--train-iters", 2)) == 0
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
    drawn = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.get_rng_state())


def test_learning_rate_warms_up_and_decays(home: Home, sft: Any) -> None:
    rates = [line["lr"] for line in home.metrics("sft")]
    assert rates[:6] == pytest.approx([2e-2 * k / 6 for k in range(1, 7)])
    assert rates[6:] == sorted(rates[6:], reverse=True) and 0 < rates[-1] < 1e-3


def test_the_fields_of_a_metrics_line(home: Home, sft: Any, dpo: str) -> None:
    assert all(set(line) - {"warnings"} == EVERY_STEP | {"nll"} for line in home.metrics("sft"))
    [warned] = [line for line in home.metrics("sft") if "warnings" in line]  # all of its first 20 steps are clipped
    assert (warned["step"], warned["warnings"]) == (20, ["clipped"])
    assert all(set(line) == EVERY_STEP | PREFERENCE for line in home.metrics(dpo))
    assert all(set(line) == {"step", "split", "loss", "groups"} | PREFERENCE for line in home.metrics(dpo, "valid"))
    assert [line["step"] for line in home.metrics(dpo, "valid")] == [0, 2, 4, 5]


def test_tensorboard_equals_the_metrics_file(home: Home, sft: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(home.folder / "board"))
    board.Reload()
    for split, names in (
        ("train", EVERY_STEP - {"step", "split"}),
        ("valid", {"loss", "nll", "groups"}),
        ("save", {"seconds", "memory_gib"}),
    ):
        for name in names:
            events = [(event.step, event.value) for event in board.Scalars(f"{split}/{name}")]
            assert events == [
                (line["step"], pytest.approx(line[name], rel=1e-6)) for line in home.metrics("sft", split)
            ]


def test_a_run_folder_may_hold_its_exports(home: Home) -> None:
    """Its checkpoints stay what was marked, and old ones go by themselves."""
    save = home.folder / "runs/both"
    flags = ["--save-hf", save / "hf", "--save-hf-interval", 2, "--save-interval", 2, "--keep-last", 2, "--auto-resume"]
    for _ in range(2):
        assert run(main, home.argv("runs/both", *flags)) == 0
    assert iterations(save) == [4, 5] and iterations(save / "hf") == [2, 4]
    for step in (4, 5):
        find_checkpoint(save, step)
    for folder in (save / "hf", save / "hf/iter_0000002", save / "hf/iter_0000004"):
        assert TensorReader(folder).names() == TensorReader(home.folder / "hf").names()


def test_an_export_killed_behind_its_last_rename_is_completed(home: Home) -> None:
    """By the same command, which reads it in the run folder, and by a run that replaces it."""
    folder, earlier = home.folder / "ended-hf", home.folder / "ended-hf.replaced"
    flags = ["--train-iters", 3, "--save-hf", folder, "--save-hf-interval", 2, "--auto-resume"]
    assert run(main, home.argv("runs/ended", *flags)) == 0
    earlier.mkdir()
    (folder / "iter_0000002").rename(earlier / "iter_0000002")
    note = home.folder / "runs/ended/export.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"complete": False}))
    assert run(main, home.argv("runs/ended", *flags)) == 0
    assert iterations(folder) == [2] and not earlier.exists()
    earlier.mkdir()
    (folder / "iter_0000002").rename(earlier / "iter_0000001")
    assert run(main, home.argv("runs/replacing", *flags, "--overwrite")) == 0
    assert iterations(folder) == [2] and not earlier.exists()


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
    again, _ = config_load.load(["--config", str(path)])
    first, _ = config_load.load(home.argv(dpo))
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


def test_a_dry_run_warns_that_this_machine_cannot_compute_it(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's login node may still describe the run; the run itself is refused there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["--device", "auto", "--transformer-impl", "transformer_engine", "--bf16"]
    assert run(main, home.argv("runs/te", *flags)) == 2
    message = check_refusal(capsys.readouterr().err, "cuda-missing", "--transformer-impl transformer_engine: ")
    assert run(main, home.argv("runs/te", *flags, "--dry-run")) == 0
    assert f"warning: this machine cannot run it: {message}\n" in capsys.readouterr().out
    monkeypatch.setattr("megatron_solopo.planning.table.memory_of_run", lambda *plan: [])
    assert run(main, home.argv("runs/te", "--dry-run", "--device", "auto")) == 0
    out = capsys.readouterr().out
    assert "cannot run it" not in out and "--device cuda describes the run of GPUs" in out


def test_a_dry_run_without_a_gpu_rehearses_the_run_of_a_gpu(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference whose weights are drawn on the device is part of it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["--device", "cuda", "--preference-loss", "dpo"]
    assert run(main, home.argv("runs/cuda", *flags)) == 2
    message = check_refusal(capsys.readouterr().err, "cuda-missing", "--device cuda: ")
    assert run(main, home.argv("runs/cuda", *flags, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "# ranks (1 process on cuda)\n" in out and f"warning: this machine cannot run it: {message}\n" in out
    assert "a process at its peak, rehearsed" in out and "of the CUDA context and NCCL" in out


def test_a_dry_run_describes_the_run_and_touches_nothing(
    home: Home, dpo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = home.listing()
    flags = ["--tensorboard-dir", home.folder / "b", "--save-hf", home.folder / "new-hf", "--dry-run"]
    assert run(main, home.argv("runs/new", *flags)) == 0
    assert home.listing() == before
    out = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(home.folder / "hf")
    assert f"{model.num_parameters():,} parameters" in out and "vocabulary 64 padded to 128" in out
    assert "5 steps of 4 examples, 20 in all (2.00 epochs)" in out
    assert "preference_loss: dpo" in out and "beta: 0.1" in out and "alignment_weight: 3.0" in out
    assert "1 process on cpu" in out and "the whole model" in out
    table = out.partition("# memory\n")[2].splitlines()
    assert re.fullmatch(r"a process at its peak, rehearsed, with the largest pack: 2 examples, \d+ tokens", table[0])
    assert re.match(r"ranks +(.*)activations(.*) +peak +at$", table[1])
    assert re.match(r" +0 .* [\d.]+ MiB  (forward|backward|update): aten", table[2]), table[2]
    for path in ("runs/new/metrics.jsonl", "runs/new/iter_0000005", "new-hf/", "b/", "runs/reference"):
        assert path in out, path
    tokens = sum(line["tokens"] for line in home.metrics(dpo)) / 2  # its five steps are two passes
    assert f"10 examples, {round(tokens):,} tokens a pass" in out


def test_reference_log_probs_are_computed_once(home: Home, dpo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache outlives the run; what it holds is used, and a damaged file is computed again."""
    from megatron_solopo.data.tokenized.batches import make_schedule
    from megatron_solopo.training.reference import _write

    files = sorted((home.folder / "runs" / "reference").iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 2  # training and validation examples
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert run(main, home.argv("runs/second", "--valid-data", home.folder / "valid.jsonl", "--train-iters", 2)) == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert sorted((home.folder / "runs" / "reference").iterdir()) == files
    train = next(path for path in files if len(load_file(path)["done"]) == 10)
    good = load_file(train)["log_probs"]
    # Shifted by 1 nat, the table moves rewards by beta: what the file holds is what counts. (The first example is
    # computed again when the file is read, so it stays.)
    shift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(10, 1)
    shift[0] = 0
    _write(train, good + shift.flatten(), torch.ones(10, dtype=torch.bool))
    assert run(main, home.argv("runs/third", "--train-iters", 1)) == 0
    first_is_there = 0 in make_schedule(10, 4, 1, None, 1234, shuffle=True).step(0)
    expected = -0.075 if first_is_there else -0.1
    assert home.metrics("runs/third")[0]["reward_chosen"] == pytest.approx(expected, abs=1e-6)
    for damage in (before[train][0][:-100], b"", b"not a tensor"):
        train.write_bytes(damage)
        assert run(main, home.argv("runs/fourth", "--train-iters", 1)) == 0
        shutil.rmtree(home.folder / "runs/fourth")
        torch.testing.assert_close(load_file(train)["log_probs"], good, rtol=0, atol=1e-4)
    # Another method scores other responses, another precision has other numbers: other files.
    for flags in (["--alignment-target", "both"], ["--bf16"]):
        count = len(list(train.parent.iterdir()))
        assert run(main, home.argv("runs/fifth", "--train-iters", 1, *flags)) == 0
        shutil.rmtree(home.folder / "runs/fifth")
        assert len(list(train.parent.iterdir())) == count + 1


def test_a_killed_run_resumes(home: Home, dpo: str) -> None:
    """SIGKILL at an arbitrary moment; the same command with --load ends where the unbroken run ends."""
    flags = ["--train-iters", 12, "--save-interval", 1]
    assert run(main, home.argv("runs/unbroken", *flags)) == 0
    process = subprocess.Popen(
        command(home.argv("runs/killed", *flags)), cwd=home.folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    latest, deadline = home.folder / "runs/killed" / "latest_checkpointed_iteration.txt", time.monotonic() + 300
    while time.monotonic() < deadline and not (latest.is_file() and int(latest.read_text() or 0) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= int(latest.read_text()) < 12
    assert run(main, home.argv("runs/killed", *flags, "--load", home.folder / "runs/killed")) == 0
    assert [line["step"] for line in home.metrics("runs/killed")] == list(range(1, 13))
    assert losses(home, "runs/killed") == losses(home, "runs/unbroken")  # bit for bit


def test_the_epoch_ends_with_the_examples(home: Home) -> None:
    """The last step takes what is left."""
    argv = home.argv("runs/epoch", "--preference-loss", "simpo", "--train-epochs", 1)
    place = argv.index("--train-iters")
    assert run(main, argv[:place] + argv[place + 2 :]) == 0
    assert [line["epoch"] for line in home.metrics("runs/epoch")] == [0.4, 0.8, 1.0]


def test_a_validation_loss_by_tokens_does_not_depend_on_the_batch(home: Home) -> None:
    groups = preference_groups(9, seed=3)
    valid = write_lines(home.folder / "nine.jsonl", groups)
    mean_length = sum(len(group["chosen"].split()) + 1 for group in groups) / len(groups)  # and the end of the turn
    flags = ["--preference-loss", "simpo", "--sft-weight", 1, "--sft-normalization", "token", "--lr", 1e-12]
    for batch in (2, 4, 9):
        size = ["--global-batch-size", batch, "--train-iters", 1, "--valid-data", valid]
        assert run(main, home.argv(f"runs/valid-{batch}", *flags, *size)) == 0
        _, line = home.metrics(f"runs/valid-{batch}", "valid")
        assert line["sft_loss"] == pytest.approx(-line["logp_chosen"] / mean_length, rel=1e-6)


def test_examples_above_the_token_limit_are_reported(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    """Each step is one example, and its line has the number of computed tokens."""
    flags = ["--preference-loss", "simpo", "--global-batch-size", 1, "--train-iters", 10, "--max-tokens-per-rank", 80]
    argv = home.argv("runs/limit", *flags, "--seq-length", 80, "--alignment-target", "both", "--no-share-prompts")
    assert run(main, argv) == 0
    tokens = [line["tokens"] for line in home.metrics("runs/limit")]
    above = [count for count in tokens if count > 80]
    assert 0 < len(above) < 10
    warning = f"train: {len(above)} of 10 examples alone are above --max-tokens-per-rank 80: "
    largest = f" up to {max(above)} tokens a process, "
    err = capfd.readouterr().err
    assert err.count("--max-tokens-per-rank") == 1 and f"warning: {warning}" in err and largest in err
    shutil.rmtree(home.folder / "runs/limit")
    assert run(main, [*argv, "--dry-run"]) == 0
    assert warning in capfd.readouterr().out
    assert run(main, last_wins([*argv, "--dry-run", "--max-tokens-per-rank", str(max(above))])) == 0
    assert "examples alone" not in capfd.readouterr().out
