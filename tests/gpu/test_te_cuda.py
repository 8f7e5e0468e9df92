"""Transformer Engine's kernels against the portable implementation on one GPU; the command is in docs/gpu.md.

The measure is float32 (portable, from the same weights): bfloat16 in Transformer Engine may be as far from it as
bfloat16 in the portable implementation, times 2 for the luck of rounding. FP8 keeps 4 bits (E4M3), so a matrix
product is off by a few percent.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_names import prompt_of
from tiny_models import preference_groups, write_lines, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from megatron_solopo import config_load
from megatron_solopo.config import FP8_MULTIPLES, Config
from megatron_solopo.data.tokenized.tokens import TokenDataset, TokenGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]

SHAPE: dict[str, Any] = dict(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=2048,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
MODELS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE | dict(tie_word_embeddings=True)),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256),
}


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    from megatron_solopo.parallel import platform

    here = platform.start("cuda")
    from megatron_solopo.training.engine import initialize_parallel

    initialize_parallel(Config())
    yield here
    platform.stop(here)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of weights that bfloat16 holds exactly, so that every precision starts from the same."""
    folders = {}
    for name, hf_config in MODELS.items():
        folder = write_model(tmp_path_factory.mktemp(name), hf_config, noise=0.02)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        folders[name] = folder
    return folders


def groups() -> list[TokenGroup]:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, SHAPE["vocab_size"], (count,), generator=draw).tolist()

    groups = []
    for number, (short, long) in enumerate([(100, 1500), (257, 900), (31, 2011)]):
        chosen, rejected = ids(60), ids(23)
        prompts = (
            prompt_of(ids(short), {"short_chosen": chosen, "short_rejected": rejected}),
            prompt_of(ids(long), {"long_chosen": chosen}),
        )
        groups.append(TokenGroup(str(number), prompts))
    return groups


def config_of(folder: Path, kind: str, share: bool = True) -> Config:
    config = Config()
    config.model.hf_path, config.data.share_prompts = str(folder), share
    config.method = replace(config.method, preference_loss="simpo", beta=2.0, alignment_weight=1.0)
    config.model.bf16 = kind != "float32"
    if kind not in ("float32", "portable"):
        config.model.transformer_impl = "transformer_engine"
    if kind in FP8_MULTIPLES:
        config.model.fp8_format, config.model.fp8_recipe = "hybrid", kind
    return config


def measure(here: Any, config: Config, padding: int = 1) -> tuple[Tensor, float, dict[str, Tensor]]:
    """([segments] log-probs, loss, gradient by the parameter's portable name) of one step, float64."""
    from megatron_solopo.data.tokenized.batches import plan_step
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.model.transformer_engine import portable_name
    from megatron_solopo.training.engine import build_engine
    from megatron_solopo.training.segment_table import SegmentPlaces
    from megatron_solopo.training.step import run_step, segment_table
    from megatron_solopo.training.step_work import sent

    engine = build_engine(here, read_hf_config(config.model.hf_path), config)
    data, share = groups(), config.data.share_prompts
    plan = plan_step(data, SHAPE["hidden_size"], 1, config)
    packs = [
        build_pack([data[i] for i in indices], indices, share, plan.of_packs * padding, plan.of_pieces, plan.of_prompts)
        for indices in plan.shares[0]
    ]
    packs = sent(engine, packs)
    engine.eval()
    table = segment_table(engine, SegmentPlaces.of_dataset(TokenDataset(data, [], "")), packs)
    engine.train()
    engine.zero_gradients()
    loss = run_step(engine, packs, len(data), config.method, None).means()["loss"]
    gradient = {
        portable_name(name): parameter.main_grad.double().cpu().clone()
        for name, parameter in engine.models[0].named_parameters()
    }
    engine.close()
    return table.cpu(), loss, gradient


def distances(measured: Any, exact: Any) -> dict[str, float]:
    """Mean error of a log-prob sum in nats, of the loss, and of the gradient relative to its norm."""
    (table, loss, gradient), (exact_table, exact_loss, exact_gradient) = measured, exact
    assert gradient.keys() == exact_gradient.keys()
    off = sum((gradient[name] - exact_gradient[name]).square().sum() for name in gradient)
    norm = sum(tensor.square().sum() for tensor in exact_gradient.values())
    return {
        "log_prob": (table - exact_table).abs().mean().item(),
        "loss": abs(loss - exact_loss),
        "gradient": (off / norm).sqrt().item(),
    }


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_as_exact_as_the_portable_implementation(
    here: Any, folders: dict[str, Path], model: str, share: bool
) -> None:
    exact = measure(here, config_of(folders[model], "float32", share))
    portable, engine = (
        distances(measure(here, config_of(folders[model], kind, share)), exact) for kind in ("portable", "bfloat16")
    )
    print(f"\n{model}: portable {portable}, Transformer Engine {engine}")
    assert engine["log_prob"] <= 2 * portable["log_prob"] + 1e-3
    assert engine["loss"] <= 2 * portable["loss"] + 1e-3
    assert engine["gradient"] <= 2 * portable["gradient"] + 1e-3


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
@pytest.mark.parametrize("model", MODELS)
def test_fp8_stays_within_its_bound(here: Any, folders: dict[str, Path], model: str, recipe: str) -> None:
    """180 tokens of responses; a log-prob sum of 60 tokens may be off by 3 nats, 0.05 a token."""
    from megatron_solopo import environment

    refusal = environment.fp8_refusals()[recipe]
    if refusal:
        pytest.skip(f"{recipe}: {refusal}")
    exact = measure(here, config_of(folders[model], "float32"))
    distance = distances(measure(here, config_of(folders[model], recipe)), exact)
    print(f"\n{model}, {recipe}: {distance}")
    if recipe == "delayed":  # the first step has no scales yet; see docs/transformer-engine.md
        assert all(torch.isfinite(torch.tensor(list(distance.values()))))
        return
    assert distance["log_prob"] <= 3.0 and distance["gradient"] <= 0.3


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_padding_does_not_change_the_loss(here: Any, folders: dict[str, Path], recipe: str) -> None:
    config = config_of(folders["llama"], recipe)
    _, loss, gradient = measure(here, config)
    _, padded_loss, padded_gradient = measure(here, config, padding=16)
    assert padded_loss == pytest.approx(loss, rel=1e-4)
    for name, tensor in gradient.items():
        assert (padded_gradient[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


@pytest.mark.parametrize("precision", ["bfloat16", "tensorwise"])
def test_twenty_steps_and_back_to_the_portable_implementation(
    here: Any, folders: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    """The whole trainer; its checkpoint resumes in the portable implementation, and its export loads."""
    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training.engine import initialize_parallel
    from megatron_solopo.training.trainer import train

    data = write_lines(tmp_path / "groups.jsonl", preference_groups(64))
    flags = [
        "--hf-path", folders["llama"], "--train-data", data, "--preference-loss", "orpo", "--bf16",
        "--seq-length", 128, "--global-batch-size", 16, "--micro-batch-size", 8, "--lr", 1e-3, "--device", "cuda",
        "--save", tmp_path / "run", "--save-hf", tmp_path / "hf", "--train-iters", 20, "--save-interval", 10,
    ]  # fmt: skip
    theirs = ["--transformer-impl", "transformer_engine"]
    theirs += ["--fp8-format", "hybrid", "--fp8-recipe", precision] if precision in FP8_MULTIPLES else []

    def run(*more: Any) -> list[dict[str, Any]]:
        end_model_parallel()
        train(here, config_load.load(list(map(str, [*flags, *more])))[0])
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == "train"]

    lines = run(*theirs)
    first, last = (sum(line["loss"] for line in part) / len(part) for part in (lines[:3], lines[-3:]))
    assert len(lines) == 20 and last < 0.95 * first
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(torch.tensor([[1, 5, 2]])).logits).all()
    again = run("--load", tmp_path / "run", "--ckpt-step", 10, "--overwrite")
    assert len(again) == 20 and again[:10] == lines[:10]
    off = [abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for ours, theirs in zip(again, lines, strict=True)]
    assert max(off[10:]) <= (0.15 if precision in FP8_MULTIPLES else 0.05)
    end_model_parallel()
    initialize_parallel(Config())
