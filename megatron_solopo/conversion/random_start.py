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

PIECE = 2**16
"""Numbers drawn at a time on CUDA: 256 blocks of 256 threads."""


@torch.no_grad()
def draw_start(models: Sequence[GPTModel], hf_config: PretrainedConfig, seed: int) -> None:
    """Fills the chunks of a model as transformers initialises one: matrices from a normal distribution of the config's
    ``initializer_range``, norms 1, biases 0; padding rows of the vocabulary 0.

    Each Hugging Face tensor has a random generator of its own, seeded by ``seed`` and the tensor's name, and is drawn
    whole, in float32, by every process that holds a part of it: weights depend neither on the layout nor on the order
    of drawing, and one tensor at a time is in memory. It is drawn where the parameter is. numpy's generator on the CPU
    and torch's on CUDA differ, so the same seed gives other weights on the other platform.
    """
    std = getattr(hf_config, "initializer_range", 0.02)
    for model in models:
        for entry, names, parameter in named_entries(model, hf_config):
            rank, size, dimension = own_part(entry, parameter)
            whole = list(parameter.shape)
            if dimension is not None:
                whole[dimension] *= size
            shapes = [tensor.shape for tensor in entry.operator.to_hf(torch.empty(whole, device="meta"))]
            device = parameter.device
            tensors = [_drawn(name, shape, std, seed, device) for name, shape in zip(names, shapes, strict=True)]
            entry.operator.fill(parameter, tensors, rank, size, dimension)


def _drawn(name: str, shape: torch.Size, std: float, seed: int, device: torch.device) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:  # a norm
        return torch.ones(shape, device=device)
    # A hash, because neighbouring seeds are what people choose.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    if device.type == "cpu":
        generator = np.random.default_rng(int.from_bytes(digest))
        return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)) * std
    return _drawn_in_pieces(shape, std, int.from_bytes(digest[:8], signed=True), device)


def _drawn_in_pieces(shape: torch.Size, std: float, seed: int, device: torch.device) -> Tensor:
    """Normal numbers of torch's generator of a device.

    CUDA's generator gives its numbers to the threads of a grid, and a grid holds no more of them than the GPU's
    multiprocessors do at a time (ATen/native/cuda/DistributionTemplates.h, calc_execution_policy), so that a large
    tensor would depend on the model of the GPU: pieces that fit into the grid of any do not.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.empty(shape, device=device)
    for piece in tensor.view(-1).split(PIECE):
        piece.normal_(0.0, std, generator=generator)
    return tensor
