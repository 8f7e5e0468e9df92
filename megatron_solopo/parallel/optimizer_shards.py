"""The distributed optimizer's state in checkpoints: each rank stores its shard, and any layout can read it.

megatron-core 0.19.2 has two formats for it (distrib_optimizer.py, `sharded_state_dict`). ``fully_reshardable`` gathers
the state of a data-parallel group in the host memory of each of its ranks (12 bytes a parameter), at a save and at a
load; ``dp_reshardable`` gathers nothing, but its buckets can be read with the same tensor, pipeline and expert
parallelism only. Here a rank's shard, which is a range of each flattened parameter, is stored as rectangles of the
parameter. They are parts of the same stored tensors as in ``fully_reshardable``: each format reads the other's files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns (offsets, sizes) of rectangles that hold the elements [begin, end) of a flattened tensor, in its order.

    There are at most 2 n - 1 of them for n dimensions: of a matrix the end of a row, whole rows, the start of a row.
    """
    row = math.prod(shape[1:])
    while begin < end:
        first, within = divmod(begin, row)
        if within or end - begin < row:
            stop = min(end, (first + 1) * row)
            for offsets, sizes in rectangles(shape[1:], within, stop - first * row):
                yield (first, *offsets), (1, *sizes)
        else:
            rows = (end - begin) // row
            stop = begin + rows * row
            yield (first, *(0 for _ in shape[1:])), (rows, *shape[1:])
        begin = stop


def _shard_of(base: Any, shape: torch.Size, begin: int, end: int, name: str, values: Tensor, copy: int) -> list[Any]:
    """Returns the sharded tensors of a range of a parameter.

    Args:
        base: the parameter's ShardedTensor, or the ShardedTensorFactory that cuts it into several.
        begin, end: the range of the flattened parameter.
        name: of the values in the optimizer's state.
        values: [end - begin].
        copy: index of this rank's data-parallel group among those that hold the same optimizer state.
    """
    # Without memory: only the places of the parts in the parameter are read.
    whole = torch.empty(shape, dtype=values.dtype, device="meta")
    key = f"optimizer.state.{name}.{base.key}"
    if hasattr(base, "build_fn"):
        parts = base.build_fn(key, whole, base.replica_id, None)
    else:
        parts = [replace(base, key=key, data=whole, dtype=whole.dtype)]
    shard = []
    for part in parts:
        if not part.data.is_contiguous():
            raise NotImplementedError(f"{key}: a part of the parameter is not contiguous")
        first = part.data.storage_offset()  # of the part in the flattened parameter
        low, high = max(begin, first), min(end, first + part.data.numel())
        at = low - begin
        for offsets, sizes in rectangles(part.local_shape, low - first, high - first):
            lead = part.prepend_axis_num
            placed = (start + more for start, more in zip(part.global_offset[lead:], offsets, strict=True))
            sizes = (*(1,) * lead, *sizes)
            count = math.prod(sizes)
            shard.append(
                replace(
                    part,
                    data=values[at : at + count].view(sizes),
                    local_shape=sizes,
                    global_offset=(*part.global_offset[:lead], *placed),
                    axis_fragmentations=None,  # not a regular grid
                    prepend_axis_num=0,
                    replica_id=(*part.replica_id[:2], copy),
                )
            )
            at += count
    return shard


def _ranges(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Returns (parameter, begin, end) for each range of a flattened parameter in this rank's shard."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, place in bucket["param_map"].items():
                    yield parameter, place["param"].start, place["param"].end


def _shard(optimizer: Any, parameter: Tensor) -> Tensor:
    """Returns the part of a parameter that is this rank's, as the inner optimizer knows it."""
    group, place = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.param_groups[group]["params"][place]


def _stored_state(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Returns the main parameter, ``param``, and the moments of this rank's part; see `training.adam.StateInPlace`."""
    if hasattr(optimizer.optimizer, "stored_state"):
        return optimizer.optimizer.stored_state(_shard(optimizer, parameter))
    return optimizer._get_main_param_and_optimizer_states(parameter)


def sharded_param_state(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
) -> dict[int, dict[str, dict[int, Any]]]:
    """Replaces DistributedOptimizer.sharded_param_state_fully_reshardable."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values  # the platform starts before its import
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    bases = {id(base.data): base for base in nested_values(tensors)}
    copy = self.distributed_optimizer_instance_id
    state = {}
    for number, (parameter, begin, end) in enumerate(_ranges(self)):
        state[number] = {
            name: dict(enumerate(_shard_of(bases[id(parameter)], parameter.shape, begin, end, name, values, copy)))
            for name, values in _stored_state(self, parameter).items()
            if name != "step"  # is in the parameter groups
        }
    return state


@torch.no_grad()
def load_param_state(self: Any, state: dict[int, dict[str, dict[int, Tensor]]]) -> None:
    """Replaces DistributedOptimizer.load_parameter_state_from_fully_reshardable."""
    for number, (parameter, _, _) in enumerate(_ranges(self)):
        values = {name: torch.cat([part.flatten() for part in parts.values()]) for name, parts in state[number].items()}
        if hasattr(self.optimizer, "set_stored_state"):
            self.optimizer.set_stored_state(_shard(self, parameter), values)
        else:
            self._set_main_param_and_optimizer_states(parameter, values)
