"""A pack as one process computes it: cut on the CPU over context-parallel ranks, then sent to the device at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Pack
from megatron_solopo.parallel.layout import RankLayout
from megatron_solopo.parallel.method import ContextMethod


@dataclass(frozen=True)
class DevicePack:
    """A pack on the device of one of its context-parallel ranks.

    Attributes:
        pack: with the tokens, positions and predictions of this rank; pieces, segments and groups of the whole pack.
        layout: what attention needs to know of those tokens.
        is_padding: [S / cp] bool, the tokens that belong to no group.
        tokens: tokens of the whole pack.
    """

    pack: Pack
    layout: RankLayout
    is_padding: Tensor
    tokens: int

    @property
    def groups(self) -> tuple[int, ...]:
        """The indices of its groups in the data set."""
        return self.pack.groups


def cut(
    pack: Pack, method: ContextMethod, fused: bool, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
) -> DevicePack:
    """A rank's part of a pack, on the CPU like the pack.

    Args:
        fused: the layers are Transformer Engine's.
        group: the ``size`` context-parallel ranks.
    """
    rows = torch.from_numpy(method.rows(pack.pieces, rank, size))
    place = torch.full_like(pack.tokens, -1)
    place[rows] = torch.arange(rows.numel())
    predictors = place[pack.predictors]
    here = predictors >= 0
    part = dataclasses.replace(
        pack,
        tokens=pack.tokens[rows],
        positions=pack.positions[rows],
        predictors=predictors[here],
        targets=pack.targets[here],
        segments=pack.segments[here],
    )
    layout = method.layout(pack.pieces, rank, size, group, fused)
    return DevicePack(part, layout, pack.is_padding()[rows], pack.tokens.numel())


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass with all its tensors, on ``device``.

    To a GPU they go through pinned memory, so that the host does not wait for its queue.
    """
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, Pack):
            del fields["scored"]  # stays on the host
        return dataclasses.replace(value, **{name: on_device(field, device) for name, field in fields.items()})
    return value
