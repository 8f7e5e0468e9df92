"""The numbers of a step, from all processes to all of them: one collective and one read of the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.parallel.device_pack import on_device


def of_all_processes(
    scalars: Mapping[str, Tensor], numbers: Mapping[str, float], device: torch.device
) -> dict[str, tuple[float, ...]]:
    """Name -> the value of each process, in the order of ranks; collective.

    Sums, maxima and choices are then made on the host, in one order and so with one result on every process.

    Args:
        scalars: [] tensors on ``device``; numbers: what the host knows. The same names in the same order everywhere.
    """
    host = on_device(torch.tensor(list(numbers.values()), dtype=torch.float64), device)
    own = torch.stack([value.double() for value in scalars.values()])
    own = torch.cat((own, host))
    everyone = torch.empty(dist.get_world_size() * own.numel(), dtype=own.dtype, device=device)
    dist.all_gather_into_tensor(everyone, own)
    rows = everyone.view(-1, own.numel()).tolist()
    return dict(zip((*scalars, *numbers), zip(*rows, strict=True), strict=True))
