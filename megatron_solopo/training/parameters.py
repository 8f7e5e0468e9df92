"""How many parameters a model has, and how many of them are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_solopo.config import ModelConfig
from megatron_solopo.conversion.adapters import adapter_shapes


def parameter_count(hf_config: PretrainedConfig) -> dict[str, int]:
    """Counts the parameters of the Hugging Face model without building it: {"total", "embedding"}.

    transformers makes them on the meta device, so that vocabulary padding is not counted.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(hf_config)
    embedding = model.get_input_embeddings().weight.numel()
    return {"total": sum(p.numel() for p in model.parameters()), "embedding": embedding}


def describe_parameters(hf_config: PretrainedConfig, options: ModelConfig) -> str:
    """Describes in a line how many parameters are trained, of how many; adapters are counted in both numbers."""
    total = parameter_count(hf_config)["total"]
    if options.lora_rank is None:
        return f"all {total:,} parameters are trained"
    trained = sum(map(math.prod, adapter_shapes(options, hf_config).values()))
    total += trained
    share = f"{trained:,} of {total:,} parameters are trained, {trained / total:.2%}"
    return f"{share}: adapters of rank {options.lora_rank}"
