"""A folder of a model that also reads images, from the command line to transformers: its language model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from training_home import Home
from transformers import AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig, Qwen3_5Config

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

LINEAR: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8)
LINEAR |= dict(linear_value_head_dim=12, layer_types=["linear_attention", "full_attention"], head_dim=16)
CONFIG = Qwen3_5Config(
    text_config=SHAPE | LINEAR,
    vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32),
)


def test_a_model_with_images_is_trained_and_exported(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", CONFIG)
    write_lines(tmp_path / "groups.jsonl", preference_groups(4))
    home = Home(tmp_path)
    argv = home.argv("run", "--train-iters", 2, "--preference-loss", "orpo", "--save-hf", tmp_path / "after")
    assert run(main, argv) == 0
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("hf", "after"))
    assert before.keys() == after.keys()
    inside = {key for key in before if key.startswith(("model.language_model.", "lm_head."))}
    assert all(not torch.equal(before[key], after[key]) for key in inside), "every tensor of the language model moved"
    assert before.keys() - inside == {key for key in before if key.startswith("model.visual.")} != set()
    for key in before.keys() - inside:
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
