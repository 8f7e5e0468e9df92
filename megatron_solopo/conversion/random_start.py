"""Random initial weights (--random-init), the same on every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.conversion.hf import local_part, named_entries
from megatron_solopo.model.families.registry import family_of

ONES = (".dt_bias", ".linear_attn.norm.weight")
"""How names of tensors end that begin at 1 in every family."""

PIECE = 2**16
"""Numbers drawn at a time on CUDA: 256 blocks of 256 threads."""


@torch.no_grad()
def draw_start(models: Sequence[GPTModel], hf_config: PretrainedConfig, seed: int) -> None:
    """Initialises the chunks of a model as transformers does: matrices from a normal distribution with the config's
    ``initializer_range``, norms 1 (0 where the factor is 1 + weight), biases 0, rates of decay as Gated DeltaNet does;
    padding rows of the vocabulary 0.

    Each Hugging Face tensor has a random generator, seeded by ``seed`` and the tensor's name. Every process that
    holds a part of a tensor draws all of it, in float32, so weights depend neither on the layout nor on the order, and
    one tensor at a time is in memory. It is drawn on the parameter's device. numpy's generator on the CPU and torch's
    on CUDA differ, so the same seed produces different weights on the two platforms.
    """
    std = getattr(hf_config, "initializer_range", 0.02)
    zero_centered = family_of(hf_config).transformer_options(hf_config).get("layernorm_zero_centered_gamma", False)
    for model in models:
        for entry, names, parameter in named_entries(model, hf_config):
            rank, size, dimension = local_part(entry, parameter)
            unsplit = list(parameter.shape)
            if dimension is not None:
                unsplit[dimension] *= size
            shapes = [tensor.shape for tensor in entry.operator.to_hf(torch.empty(unsplit, device="meta"))]
            device = parameter.device
            tensors = [
                _drawn(name, shape, std, seed, device, 1.0 - zero_centered)
                for name, shape in zip(names, shapes, strict=True)
            ]
            entry.operator.fill(parameter, tensors, rank, size, dimension)


def _drawn(name: str, shape: torch.Size, std: float, seed: int, device: torch.device, norm: float) -> Tensor:
    if name.endswith(ONES):
        return torch.ones(shape, device=device)
    # A hash, because users choose neighbouring seeds.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    if name.endswith(".A_log"):  # rates of decay from 0.01 to 16
        drawn = np.random.default_rng(int.from_bytes(digest)).uniform(0.01, 16, tuple(shape))
        return torch.from_numpy(np.log(drawn)).float().to(device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:  # a norm
        return torch.full(shape, norm, device=device)
    if device.type == "cpu":
        generator = np.random.default_rng(int.from_bytes(digest))
        return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)) * std
    return _drawn_in_pieces(shape, std, int.from_bytes(digest[:8], signed=True), device)


def _drawn_in_pieces(shape: torch.Size, std: float, seed: int, device: torch.device) -> Tensor:
    """Normal numbers of torch's generator of a device.

    CUDA's generator assigns its numbers to the threads of a grid, whose size depends on the GPU's multiprocessors
    (ATen/native/cuda/DistributionTemplates.h, calc_execution_policy). A large tensor would therefore depend on the
    GPU's model; pieces that fit into every GPU's grid do not.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.empty(shape, device=device)
    for piece in tensor.view(-1).split(PIECE):
        piece.normal_(0.0, std, generator=generator)
    return tensor
