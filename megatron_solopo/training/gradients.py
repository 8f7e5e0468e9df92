"""The whole gradient of a model that is spread over processes, by Hugging Face name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.conversion.hf import named_entries, tensor_group
from megatron_solopo.training.engine import Engine


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    """Hugging Face name -> gradient of the last step, on the CPU of the first process; elsewhere parts. Collective.

    Each process of a distributed optimizer holds the sum of its shard; tensor-parallel processes hold parts of a
    matrix, pipeline stages some of the layers, expert-parallel processes some of the experts. What several processes
    hold is compared bit for bit.

    Raises:
        AssertionError: processes that must hold the same gradient do not.
    """
    copies: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    expert_copies: Any = parallel_state.get_expert_data_parallel_group()
    for chunk in engine.chunks:
        dense: Any = chunk.buffers  # DDP gives a method of nn.Module another meaning
        for buffers, group in ((dense, copies), (chunk.expert_parallel_buffers, expert_copies)):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                own = bucket.grad_data.chunk(dist.get_world_size(group))
                shards = [torch.empty_like(shard) for shard in own]
                dist.all_gather(shards, own[dist.get_rank(group)].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(shards))
    found = {}
    every = (entry for model in engine.models for entry in named_entries(model, engine.hf_config))
    for entry, names, parameter in every:
        group = tensor_group(entry)
        own: Any = parameter  # what mcore notes on a parameter
        cut = own.partition_dim if getattr(own, "tensor_model_parallel", False) else None
        parts = [torch.empty_like(own.main_grad) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.main_grad.clone(), group=group)
        if cut is None:  # kept whole on every process
            assert all(torch.equal(part, parts[0]) for part in parts), names
        whole = entry.operator.join(parts, cut) if len(parts) > 1 else parts[0]
        for name, gradient in zip(names, entry.operator.to_hf(whole), strict=True):
            found[name] = gradient.cpu().clone().contiguous()
    everyone: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.gather_object(found, everyone if dist.get_rank() == 0 else None)
    for other in everyone if dist.get_rank() == 0 else ():
        for name, gradient in other.items():
            assert torch.equal(found.setdefault(name, gradient), gradient), name
    return found
