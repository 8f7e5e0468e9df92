"""Weights come back bit by bit from every layout, from Hugging Face and from another layout's Megatron folder; random
ones are the same on all."""

from __future__ import annotations

import json
from typing import Any

import convert_worker
import pytest
from forked_runs import ForkedRun
from tiny_models import EXPERTS, LATENT, QWEN3_MOE, WIDE, write_model
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

DENSE = ["dp4", "tp2", "tp4 sp", "pp2", "pp4", "pp2 vpp2", "tp2 pp2", "tp2 sp pp2 vpp2"]
WITH_EXPERTS = [
    "ep2",
    "ep4",
    "etp2",
    "tp2 sp",
    "pp2 vpp2",
    "tp2 sp ep2",
    "tp2 sp etp1 ep2",
    "pp2 ep2",
    "tp2 sp pp2 etp1 ep2",
]
SHAPE = WIDE | dict(vocab_size=67)  # no multiple of anything
DENSE_MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, head_dim=24, tie_word_embeddings=False),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, pad_token_id=0),
    "gemma4": Gemma4TextConfig(
        **SHAPE,
        head_dim=16,
        global_head_dim=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
    ),
    "glm4": Glm4Config(**SHAPE, head_dim=16, pad_token_id=0),
    "olmo3": Olmo3Config(**SHAPE, pad_token_id=0),
    "phi3": Phi3Config(**SHAPE, pad_token_id=0),
}
GLM4_MOE = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=2)
DEEPSEEK = LATENT | dict(num_key_value_heads=8, n_group=2, topk_group=1, first_k_dense_replace=2)
EXPERT_MODELS: dict[str, Any] = {
    "deepseek_v3": DeepseekV3Config(**SHAPE | DEEPSEEK, pad_token_id=0),
    "glm4_moe": Glm4MoeConfig(**SHAPE, **GLM4_MOE, head_dim=16, use_qk_norm=True, pad_token_id=0),
    "mixtral": MixtralConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **QWEN3_MOE, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True),
}
LAYOUTS = {
    layout: [*(DENSE_MODELS if layout in DENSE else ()), *(EXPERT_MODELS if layout in WITH_EXPERTS else ())]
    for layout in dict.fromkeys(DENSE + WITH_EXPERTS)
}
"""Layout -> models, in the order in which a model goes from one to the next."""


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What convert_worker.py reports with four processes."""
    folder = tmp_path_factory.mktemp("conversion")
    for name, hf_config in (DENSE_MODELS | EXPERT_MODELS).items():
        write_model(folder / name, hf_config)
    work = folder / "work"
    work.mkdir()
    (work / "plan.json").write_text(json.dumps({"folder": str(folder), "layouts": LAYOUTS}))
    run = ForkedRun([str(work / "plan.json")], 4, folder / "stderr.txt", convert_worker.main)
    assert run.wait(900) == [0] * 4, run.text()[-4000:]
    return json.loads((work / "differing.json").read_text())


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for layout in LAYOUTS for name in LAYOUTS[layout]])
def test_every_tensor_survives_the_round_trip(
    differing: dict[str, dict[str, list[str]]], name: str, layout: str
) -> None:
    first = layout == next(layout for layout in LAYOUTS if name in LAYOUTS[layout])
    expected: dict[str, list[str]] = {"hugging face": []} | ({} if first else {"megatron": [], "drawn": []})
    if name in convert_worker.RESUMED:
        expected |= {"resumed": [], "full": []}
    assert differing[f"{name} {layout}"] == expected
