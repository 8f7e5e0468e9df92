"""The full gradient of a model that is sharded over ranks, by Hugging Face name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.conversion.adapters import trained_entries
from megatron_solopo.conversion.hf import tensor_group
from megatron_solopo.training.engine import Engine, gradient_buffers

type Summary = tuple[str, torch.Size, torch.dtype]
"""(digest, shape, dtype) of a tensor."""


def full_gradients(engine: Engine) -> dict[str, Tensor]:
    """Gathers the gradient of the last step on rank 0's CPU, by Hugging Face name; {} on other ranks. Collective.

    Each rank of a distributed optimizer holds the sum of its shard; tensor-parallel ranks hold shards of a matrix,
    pipeline stages some of the layers, expert-parallel ranks some of the experts. Gradients that several ranks hold are
    compared bit for bit, by their digests. A device holds one complete tensor at a time beside its gradient buffers.

    Raises:
        AssertionError: ranks that must hold the same gradient do not.
    """
    _complete_buffers(engine)
    names = [
        name for model in engine.models for _, names, _ in trained_entries(model, engine.hf_config) for name in names
    ]
    owners: dict[str, int] = {}
    for rank, of_rank in enumerate(_of_ranks(names)):
        for name in of_rank:
            owners.setdefault(name, rank)
    held: dict[str, Summary] = {}
    owned: dict[str, Tensor] = {}
    for name, gradient in _complete_tensors(engine):
        digest = hashlib.sha256(gradient.flatten().view(torch.uint8).numpy()).hexdigest()
        held[name] = digest, gradient.shape, gradient.dtype
        if owners[name] == dist.get_rank():
            owned[name] = gradient
    summaries: dict[str, Summary] = {}
    for of_rank in _of_ranks(held):
        for name, summary in of_rank.items():
            assert summaries.setdefault(name, summary) == summary, name
    return _on_rank0(owned, owners, summaries, engine.platform.device)


def _of_ranks[T](value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _complete_buffers(engine: Engine) -> None:
    """Gathers the shards of each gradient buffer in place."""
    dense_group = cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))
    expert_group = cast(dist.ProcessGroup, parallel_state.get_expert_data_parallel_group())
    for chunk in engine.chunks:
        for buffer in gradient_buffers(chunk):
            group = expert_group if buffer in chunk.expert_parallel_buffers else dense_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _complete_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Returns (name, gradient on the CPU) of the tensors that this rank has a shard of; collective."""
    entries = (entry for model in engine.models for entry in trained_entries(model, engine.hf_config))
    for entry, names, parameter in entries:
        group = tensor_group(entry)
        sharded: Any = parameter  # with mcore's attributes
        dimension = sharded.partition_dim if getattr(sharded, "tensor_model_parallel", False) else None
        shards = [torch.empty_like(sharded.main_grad) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, sharded.main_grad.clone(), group=group)
        if dimension is None:  # replicated on every rank
            assert all(torch.equal(shard, shards[0]) for shard in shards), names
        full = entry.operator.join(shards, dimension) if len(shards) > 1 else shards[0]
        for name, gradient in zip(names, entry.operator.to_hf(full), strict=True):
            yield name, gradient.cpu().clone().contiguous()


def _on_rank0(
    owned: dict[str, Tensor], owners: dict[str, int], summaries: dict[str, Summary], device: torch.device
) -> dict[str, Tensor]:
    """Sends each gradient from its owner to rank 0, one at a time; collective."""
    gradients: dict[str, Tensor] = {}
    for name, owner in owners.items():
        if dist.get_rank() == owner != 0:
            dist.send(owned[name].to(device), 0)
        elif dist.get_rank() == 0:
            if owner:
                _, shape, dtype = summaries[name]
                received = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(received, owner)
                gradients[name] = received.cpu()
            else:
                gradients[name] = owned[name]
    return gradients
