"""Float64 answers of the oracle cell, computed on a CPU beforehand: no GPU time goes into them.

    python tools/gpu_suite.py --write-answers         # writes tests/gpu/oracle_answers.pt

They are loss and gradient of a batch of seven groups by tests/distributed/oracle.py, which shares no code with the
package. Weights are small integers times a power of two from numpy's generator: every machine draws the same ones, and
bfloat16 holds them exactly, so that one answer serves all precisions.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import SHAPE
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "gpu" / "oracle_answers.pt"
METHODS = ("dpo", "simpo", "orpo", "sft")
BATCH = "seven"
SAMPLED = 1024
"""Of a larger gradient so many numbers are kept, evenly spaced: the file stays small."""

EXACT = "dpo llama"
"""The case whose gradient is kept in float64, for a step in float64; float32 suffices for the others."""

WIDE = dict(num_attention_heads=28, num_key_value_heads=4, head_dim=128)
"""Heads as Qwen2.5-7B has them."""

MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE | WIDE, tie_word_embeddings=True),
}
REFERENCE = LlamaConfig(**SHAPE, tie_word_embeddings=False)


def write_model(folder: Path, hf_config: PretrainedConfig, seed: int) -> str:
    """Writes a Hugging Face folder; returns a digest of its weights."""
    model = AutoModelForCausalLM.from_config(hf_config)
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()
            numbers = np.random.default_rng(int.from_bytes(key)).integers(-127, 128, tuple(parameter.shape))
            values = torch.from_numpy(numbers).to(torch.float32)
            norm = name.endswith("norm.weight")
            parameter.copy_(1 + torch.round(values / 4) / 128 if norm else values / 1024)
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + parameter.numpy().tobytes())
    model.save_pretrained(folder)
    return digest.hexdigest()


def write_models(folder: Path) -> dict[str, str]:
    """Returns all models in folders of their names; name -> digest."""
    return {
        name: write_model(folder / name, hf_config, seed)
        for seed, (name, hf_config) in enumerate([*MODELS.items(), ("reference", REFERENCE)])
    }


def sampled(gradient: Tensor) -> Tensor:
    """At most about `SAMPLED` numbers of a gradient, evenly spaced, float64 on the CPU."""
    flat = gradient.detach().double().cpu().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)]


def compute() -> dict[str, Any]:
    """{"weights": digests, "tokens": digest, "reference": log-probs, "cases": {"METHOD MODEL": loss and gradient}}."""
    import oracle
    from launches import BATCHES, token_examples
    from methods import LONG, SHORT
    from methods import METHODS as SETTINGS

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_models(folder)
        reference = oracle.reference_table(folder / "reference", token_examples(SHORT + LONG))
        cases: dict[str, Any] = {}
        for model in MODELS:
            for kinds in (SHORT + LONG, ("response",)):
                scores = oracle.scores(folder / model, token_examples(kinds))
                for method in METHODS:
                    settings = SETTINGS[method]
                    if (settings["objective"] == "sft") != (kinds == ("response",)):
                        continue
                    chosen = [scores[i] for i in BATCHES[BATCH]]
                    losses, gradient = oracle.batch(chosen, [reference[i] for i in BATCHES[BATCH]], settings)
                    case = f"{method} {model}"
                    kept = torch.float64 if case == EXACT else torch.float32
                    cases[case] = {
                        "loss": sum(losses) / len(losses),
                        "gradient": {name: sampled(tensor).to(kept) for name, tensor in gradient.items()},
                    }
    return {"weights": weights, "tokens": tokens_digest(), "reference": reference, "cases": cases}


def tokens_digest() -> str:
    from launches import token_examples
    from methods import LONG, SHORT

    examples = [token_examples(kinds) for kinds in (SHORT + LONG, ("response",))]
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()
