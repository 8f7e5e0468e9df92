"""A folder of a model that also reads images, from the command line to transformers: its language model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from training_home import Home
from transformers import AutoModelForImageTextToText, AutoTokenizer, Gemma3Config, PretrainedConfig, Qwen3_5Config

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

VISION: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
LINEAR: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8)
LINEAR |= dict(linear_value_head_dim=12, layer_types=["linear_attention", "full_attention"], head_dim=16)
MODELS = {
    "gemma3": (
        Gemma3Config(text_config=SHAPE | dict(head_dim=16), vision_config=VISION | dict(image_size=28, patch_size=14)),
        "language_model.",
    ),
    "qwen3_5": (
        Qwen3_5Config(
            text_config=SHAPE | LINEAR,
            vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32),
        ),
        "model.language_model.",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_images_is_trained_and_exported(name: str, tmp_path: Path) -> None:
    config, trained = MODELS[name]
    write_folder(tmp_path / "hf", config)
    write_lines(tmp_path / "groups.jsonl", preference_groups(4))
    home = Home(tmp_path)
    argv = home.argv("run", "--train-iters", 2, "--preference-loss", "orpo", "--save-hf", tmp_path / "after")
    assert run(main, argv) == 0
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("hf", "after"))
    assert before.keys() == after.keys()
    inside = {key for key in before if key.startswith(trained)}
    assert all(not torch.equal(before[key], after[key]) for key in inside), "every tensor of the language model moved"
    assert {key for key in before.keys() - inside if "vis" in key or "projector" in key} == before.keys() - inside - {
        "lm_head.weight"
    }
    for key in before.keys() - inside - {"lm_head.weight"}:
        assert before[key].numpy().tobytes() == after[key].numpy().tobytes(), key
    AutoTokenizer.from_pretrained(tmp_path / "after")
    whole, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(3, 11)[None]
    assert whole(ids).logits.isfinite().all()


def write_folder(folder: Path, config: PretrainedConfig) -> None:
    """Random weights beside the tokenizer of the other tests."""
    write_model(folder)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
