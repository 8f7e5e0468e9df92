"""Gathers the numbers of a step from all ranks: one collective and one read of the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.parallel.device_pack import on_device


def gather_from_all_ranks(
    scalars: Mapping[str, Tensor], numbers: Mapping[str, float], device: torch.device
) -> dict[str, tuple[float, ...]]:
    """Returns the values of all ranks by name, in the order of ranks; collective.

    The host then computes sums, maxima and choices in one order, so with the same result on every rank.

    Args:
        scalars: [] tensors on ``device``.
        numbers: values on the host. Both have the same names in the same order on every rank.
    """
    host = on_device(torch.tensor(list(numbers.values()), dtype=torch.float64), device)
    values = torch.cat((torch.stack([value.double() for value in scalars.values()]), host))
    gathered = torch.empty(dist.get_world_size() * values.numel(), dtype=values.dtype, device=device)
    dist.all_gather_into_tensor(gathered, values)
    rows = gathered.view(-1, values.numel()).tolist()
    return dict(zip((*scalars, *numbers), zip(*rows, strict=True), strict=True))
