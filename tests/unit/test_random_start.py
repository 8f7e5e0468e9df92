"""--random-init draws what transformers draws, from a seed; layouts share it (tests/distributed/test_conversion.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers_in_double import by_file_name

from megatron_solopo.config import Config

STD = 0.07
MODELS = {
    "llama": LlamaConfig(**SHAPE, initializer_range=STD, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, initializer_range=STD, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, initializer_range=STD, head_dim=16, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**SHAPE, initializer_range=STD, head_dim=16, pad_token_id=None),
    "gemma4": Gemma4TextConfig(
        **SHAPE, initializer_range=STD, head_dim=16, hidden_size_per_layer_input=0, attention_k_eq_v=True
    ),
    "glm4": Glm4Config(**SHAPE, initializer_range=STD, head_dim=16, pad_token_id=None),
    # As many heads and experts as a sample of numbers needs: sinks and the routers' biases are drawn too.
    "gpt_oss": GptOssConfig(
        **SHAPE | dict(num_attention_heads=64, num_local_experts=64, num_experts_per_tok=2),
        initializer_range=STD,
        head_dim=16,
        pad_token_id=None,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE | EXPERTS | QWEN3_MOE, initializer_range=STD, tie_word_embeddings=True),
}


def drawn(hf_config: PretrainedConfig, seed: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    from megatron_solopo.conversion.hf import hf_tensors
    from megatron_solopo.conversion.random_start import draw_start
    from megatron_solopo.model.build import build_model

    model = build_model(hf_config, Config(), dtype)
    draw_start([model], hf_config, seed)
    return {name: tensor.clone() for name, tensor in hf_tensors([model], hf_config)}


@pytest.mark.parametrize("name", MODELS)
def test_the_distribution_is_transformers(engine: Any, name: str) -> None:
    """The same tensors; constant where transformers' are, and there the same; else of the same mean and deviation."""
    ours = drawn(MODELS[name])
    model = AutoModelForCausalLM.from_config(MODELS[name])
    scalars = {name: scalar for name, scalar in model.named_buffers() if name.endswith("layer_scalar")}  # Gemma 4's
    theirs = by_file_name(model, dict(model.named_parameters()) | scalars)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        if tensor.numel() == 1 or tensor.std() == 0:
            assert torch.equal(ours[key], tensor), key
            continue
        # Six standard errors of a sample of so many normal numbers.
        assert abs(ours[key].std().item() - STD) < 6 * STD / (2 * tensor.numel()) ** 0.5, key
        assert abs(ours[key].mean().item()) < 6 * STD / tensor.numel() ** 0.5, key
        assert 2 * STD < ours[key].abs().max().item() < 6 * STD, key


def test_every_tensor_is_drawn_independently(engine: Any) -> None:
    matrices = {name: tensor for name, tensor in drawn(MODELS["qwen3_moe"]).items() if tensor.dim() > 1}
    for (one, a), (other, b) in itertools.combinations(matrices.items(), 2):
        few = min(a.numel(), b.numel())
        correlation = torch.corrcoef(torch.stack([a.flatten()[:few], b.flatten()[:few]]))[0, 1].item()
        assert abs(correlation) < 6 / few**0.5, (one, other)


def test_the_weights_depend_on_the_seed_alone(engine: Any) -> None:
    torch.manual_seed(1)
    first = drawn(MODELS["qwen2"])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other, rounded = drawn(MODELS["qwen2"]), drawn(MODELS["qwen2"], 6), drawn(MODELS["qwen2"], 5, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor) and torch.equal(rounded[name], tensor.bfloat16())
        assert torch.equal(other[name], tensor) == (tensor.dim() == 1)
