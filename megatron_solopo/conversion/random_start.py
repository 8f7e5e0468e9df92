"""Random weights to start from (--random-init): the same ones however the model is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.conversion.hf import named_entries, own_part


@torch.no_grad()
def draw_start(models: Sequence[GPTModel], hf_config: PretrainedConfig, seed: int) -> None:
    """Fills the chunks of a model as transformers initialises one: matrices from a normal distribution of the config's
    ``initializer_range``, norms 1, biases 0; padding rows of the vocabulary 0.

    Each Hugging Face tensor has a random generator of its own, seeded by ``seed`` and the tensor's name, and is drawn
    whole, in float32, by every process that holds a part of it: weights depend neither on the layout nor on the order
    of drawing, and one tensor at a time is in memory.
    """
    std = getattr(hf_config, "initializer_range", 0.02)
    for model in models:
        for entry, names, parameter in named_entries(model, hf_config):
            rank, size, dimension = own_part(entry, parameter)
            whole = list(parameter.shape)
            if dimension is not None:
                whole[dimension] *= size
            shapes = [tensor.shape for tensor in entry.operator.to_hf(torch.empty(whole, device="meta"))]
            tensors = [_drawn(name, shape, std, seed) for name, shape in zip(names, shapes, strict=True)]
            entry.operator.fill(parameter, tensors, rank, size, dimension)


def _drawn(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # a norm
        return torch.ones(shape)
    # A hash, because torch's generator takes 32 bits of a seed, and neighbouring seeds are what people choose.
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)) * std
