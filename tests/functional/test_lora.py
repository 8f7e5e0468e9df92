"""LoRA on a command line: what is trained and saved, PEFT folders in and out, merged folders, resumption, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refusal
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_home import Home, furnish
from transformers import AutoModelForCausalLM

from megatron_solopo.cli import run
from megatron_solopo.planning import plan
from megatron_solopo.training import convert
from megatron_solopo.training.run import main

RANK, ALPHA = 3, 5.0
LORA = ("--lora-rank", RANK, "--lora-alpha", ALPHA, "--lora-modules", "q_proj,v_proj,up_proj,down_proj", "--use-rslora")
DROPOUT = ("--lora-dropout", 0.25)
NAME = "base_model.model.model.layers.{}.{}.lora_{}.weight"
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """With a run that trained adapters, ``runs/lora``, merged in ``merged``; and its adapters in ``adapters``."""
    home = furnish(tmp_path_factory.mktemp("home"))
    flags = (*LORA, *DROPOUT, "--lr", 0.01, "--save-interval", 2, "--save-hf", home.folder / "merged")
    assert run(main, home.argv("runs/lora", *flags)) == 0
    assert to_hf(home, "adapters", "--lora-export", "adapter") == 0
    return home


def to_hf(home: Home, target: str, *flags: str) -> int:
    command = ["megatron-to-hf", "--load", home.folder / "runs/lora", "--save-hf", home.folder / target, *flags]
    return run(convert.main, [*map(str, command)])


def weights(folder: Path, file: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(folder / file)


def adapters(home: Home, folder: str = "adapters") -> dict[str, Tensor]:
    return weights(home.folder / folder, "adapter_model.safetensors")


def test_the_merged_folder_is_the_start_and_the_scaled_products(home: Home) -> None:
    before, after, learned = weights(home.folder / "hf"), weights(home.folder / "merged"), adapters(home)
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        a, b = (learned.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            assert torch.equal(after[name], tensor), name
            continue
        assert a.shape == (RANK, tensor.shape[1]) and b.shape == (tensor.shape[0], RANK)
        expected = tensor.double() + ALPHA / RANK**0.5 * b.double() @ a.double()
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)
        changed += int((after[name] - tensor).norm() > 1e-3)
    assert changed == len(learned) // 2 == 2 * 4


def test_the_log_the_dry_run_and_the_plan_count_parameters_as_peft_does(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(home.folder / "hf")
    settings = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    trained, total = peft.get_peft_model(base, settings).get_nb_trainable_parameters()
    said = f"{trained:,} of {total:,} parameters are trained, {trained / total:.2%}: adapters of rank {RANK}\n"
    capsys.readouterr()
    assert run(main, home.argv("runs/said", *LORA, "--train-iters", 1)) == 0
    assert said in capsys.readouterr().err
    assert run(main, home.argv("runs/said-again", *LORA, "--dry-run")) == 0
    assert said in capsys.readouterr().out
    words = ["--model", home.folder / "hf", "--gpus", 1, "--long-tokens", 64, "--short-tokens", 32, "--top", 1]
    assert run(plan.main, [*map(str, (*words, "--response-tokens", 8, *LORA))]) == 0
    assert said in capsys.readouterr().out
    assert run(main, home.argv("runs/said-again", "--dry-run")) == 0
    assert f"all {total - trained:,} parameters are trained\n" in capsys.readouterr().out


def test_a_checkpoint_holds_adapters_alone(home: Home) -> None:
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(home.folder / "runs/lora/iter_0000005"))
    parameters = [key for key in stored if not key.startswith("optimizer.")]
    assert parameters and all("_lora." in key for key in stored)
    assert len({key.rpartition("layers.")[2] for key in parameters}) == 2 * 4  # A and B of four projections


def test_the_converted_checkpoint_is_what_the_run_exported(home: Home) -> None:
    assert to_hf(home, "merged-again") == 0
    ours, theirs = weights(home.folder / "merged-again"), weights(home.folder / "merged")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_peft_computes_what_the_merged_folder_computes(home: Home) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(home.folder / "hf")
    merged = AutoModelForCausalLM.from_pretrained(home.folder / "merged")
    with torch.no_grad():
        plain, expected = base(IDS).logits.log_softmax(-1), merged(IDS).logits.log_softmax(-1)
        actual = peft.PeftModel.from_pretrained(base, home.folder / "adapters")(IDS).logits.log_softmax(-1)
    assert (actual - expected).abs().max() < 1e-5 < 1e-2 < (expected - plain).abs().max()


def test_a_killed_run_resumes_with_the_same_bits(home: Home) -> None:
    folder = home.folder / "runs/killed"
    shutil.copytree(home.folder / "runs/lora", folder)
    shutil.rmtree(folder / "iter_0000005")
    (folder / "latest_checkpointed_iteration.txt").write_text("4\n")
    flags = (*LORA, *DROPOUT, "--lr", 0.01, "--load", folder, "--save-hf", home.folder / "resumed")
    assert run(main, home.argv("runs/killed", *flags, "--lora-export", "adapter")) == 0
    assert all(torch.equal(tensor, adapters(home)[name]) for name, tensor in adapters(home, "resumed").items())
    killed, whole = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in home.metrics(name)]
        for name in ("runs/killed", "runs/lora")
    )
    assert killed == whole and len(whole) == 5


def test_the_reference_is_the_model_without_adapters(home: Home) -> None:
    """A run from trained adapters has the same cache file as full training, and its first loss is not ln 2."""
    assert run(main, home.argv("runs/full", "--train-iters", 1)) == 0
    files = sorted((home.folder / "runs/reference").iterdir())
    flags = ("--lora-path", home.folder / "adapters", *DROPOUT, "--train-iters", 1, "--lr", 1e-9)
    flags += ("--save-hf", home.folder / "same", "--lora-export", "adapter")
    assert run(main, home.argv("runs/more", *flags, "--no-shuffle")) == 0
    assert sorted((home.folder / "runs/reference").iterdir()) == files
    first, fresh = home.metrics("runs/more")[0], home.metrics("runs/lora")[0]
    assert fresh["po_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(first["po_loss"] - 0.693147) > 1e-3
    same, before = adapters(home, "same"), adapters(home)
    assert all((same[name] - before[name]).abs().max() < 1e-6 for name in before)
    assert json.loads((home.folder / "same/adapter_config.json").read_text()) == json.loads(
        (home.folder / "adapters/adapter_config.json").read_text()
    )


def changed_folder(home: Home, name: str, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """A copy of the adapters with other tensors or settings."""
    folder = home.folder / f"wrong-{name}"
    shutil.copytree(home.folder / "adapters", folder)
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(document | settings))
    save_file(adapters(home) if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "dora": ({"use_dora": True}, "adapter-unsupported", "use_dora"),
    "biases": ({"bias": "all"}, "adapter-unsupported", "bias"),
    "kind": ({"peft_type": "IA3"}, "adapter-unsupported", "peft_type is IA3"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "adapter-unsupported", "init_lora_weights"),
    "target": ({"target_modules": ["q_proj", "lm_head"]}, "adapter-unsupported", "lm_head"),
    "later": ({"some_new_field": 3}, "adapter-unsupported", "some_new_field"),
    "rank": ({"r": 4}, "tensor-shape", "lora_A"),
    "fewer": ({"target_modules": ["q_proj"]}, "tensor-left-over", "lora_A"),
    "more": ({"target_modules": ["q_proj", "k_proj"]}, "tensor-missing", "k_proj"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    home: Home, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings, code, *named = WRONG[name]
    folder = changed_folder(home, name, **settings)
    assert run(main, home.argv("runs/wrong", "--lora-path", folder)) == 2
    check_refusal(capsys.readouterr().err, code, "adapter_", *named)


def test_options_that_differ_from_the_folder_are_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("runs/wrong", "--lora-path", home.folder / "adapters", "--lora-alpha", 7)) == 2
    check_refusal(capsys.readouterr().err, "adapter-other-options", "--lora-path", "--lora-alpha 5.0", "7.0")


def test_another_model_beside_the_adapters_is_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed or merged, they would be added to weights that they were not trained with; of a loss without reference
    too."""
    simpo = (*LORA, "--preference-loss", "simpo")
    assert run(main, home.argv("runs/simpo", *simpo, "--train-iters", 2, "--save-interval", 1)) == 0
    capsys.readouterr()
    other = shutil.copytree(home.folder / "hf", home.folder / "other-hf")
    tensors = {name: tensor * 2 for name, tensor in weights(other).items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    flags = (*simpo, "--train-iters", 2, "--load", home.folder / "runs/simpo", "--ckpt-step", 1)
    assert run(main, home.argv("runs/simpo", *flags, hf="other-hf")) == 2
    check_refusal(capsys.readouterr().err, "checkpoint-other-reference", "--hf-path", "whose adapters it trained")
    assert to_hf(home, "wrong", "--hf-path", str(other)) == 2
    check_refusal(capsys.readouterr().err, "checkpoint-other-reference", "--hf-path", "whose adapters it trained")
    assert not (home.folder / "wrong").exists()
