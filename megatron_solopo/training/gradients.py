"""The full gradient of a model that is sharded over ranks, by Hugging Face name."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.conversion.hf import named_entries, tensor_group
from megatron_solopo.training.engine import Engine, gradient_buffers


def full_gradients(engine: Engine) -> dict[str, Tensor]:
    """Gathers the gradient of the last step on the CPU, by Hugging Face name; complete on rank 0 only. Collective.

    Each rank of a distributed optimizer holds the sum of its shard; tensor-parallel ranks hold shards of a matrix,
    pipeline stages some of the layers, expert-parallel ranks some of the experts. Gradients that several ranks hold are
    compared bit for bit.

    Raises:
        AssertionError: ranks that must hold the same gradient do not.
    """
    dense_group = cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))
    expert_group = cast(dist.ProcessGroup, parallel_state.get_expert_data_parallel_group())
    for chunk in engine.chunks:
        for buffer in gradient_buffers(chunk):
            group = expert_group if buffer in chunk.expert_parallel_buffers else dense_group
            for bucket in buffer.buckets:
                parts = bucket.grad_data.chunk(dist.get_world_size(group))
                shards = [torch.empty_like(part) for part in parts]
                dist.all_gather(shards, parts[dist.get_rank(group)].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(shards))
    gradients: dict[str, Tensor] = {}
    entries = (entry for model in engine.models for entry in named_entries(model, engine.hf_config))
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
            gradients[name] = gradient.cpu().clone().contiguous()
    of_ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.gather_object(gradients, of_ranks if dist.get_rank() == 0 else None)
    for of_rank in of_ranks if dist.get_rank() == 0 else ():
        for name, gradient in of_rank.items():
            assert torch.equal(gradients.setdefault(name, gradient), gradient), name
    return gradients
