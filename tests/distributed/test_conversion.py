"""Weights come back bit by bit from every layout, from Hugging Face and from another layout's Megatron folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import EXPERTS, QWEN3_MOE, WIDE, write_model
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

WORKER = Path(__file__).parent / "convert_worker.py"
DENSE = ["dp4", "tp2", "tp4 sp", "pp2", "pp4", "pp2 vpp2", "tp2 pp2", "tp2 sp pp2 vpp2"]
WITH_EXPERTS = ["ep2", "ep4", "tp2 sp", "pp2 vpp2", "tp2 sp ep2", "tp2 sp etp1 ep2", "pp2 ep2", "tp2 sp pp2 etp1 ep2"]
SHAPE = WIDE | dict(vocab_size=67)  # no multiple of anything
MODELS: dict[str, tuple[Any, list[str]]] = {
    "llama": (LlamaConfig(**SHAPE, head_dim=24, tie_word_embeddings=False), DENSE),
    "mistral": (MistralConfig(**SHAPE, sliding_window=None, tie_word_embeddings=False), DENSE),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True), DENSE),
    "qwen2-tied": (Qwen2Config(**SHAPE, tie_word_embeddings=True), DENSE),
    "mixtral": (MixtralConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False), WITH_EXPERTS),
    "qwen3_moe": (
        Qwen3MoeConfig(**SHAPE, **QWEN3_MOE, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True),
        WITH_EXPERTS,
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What convert_worker.py found with four processes."""
    folder = tmp_path_factory.mktemp("conversion")
    for name, (hf_config, _) in MODELS.items():
        write_model(folder / name, hf_config)
    work = folder / "work"
    work.mkdir()
    plan = {"folder": str(folder), "models": {name: layouts for name, (_, layouts) in MODELS.items()}}
    (work / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(WORKER)]
    done = subprocess.run(
        [*command, str(work / "plan.json")],
        env=os.environ | {"PYTHONPATH": str(WORKER.parents[2])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "found.json").read_text())


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in MODELS for layout in MODELS[name][1]])
def test_every_tensor_comes_back(found: dict[str, dict[str, list[str]]], name: str, layout: str) -> None:
    differences = found[f"{name} {layout}"]
    assert set(differences) == ({"hugging face"} if layout == MODELS[name][1][0] else {"hugging face", "megatron"})
    assert not any(differences.values())
