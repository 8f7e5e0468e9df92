"""A pack as one rank computes it: sharded over context-parallel ranks on the CPU, then sent to the device at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Pack
from megatron_solopo.parallel.kernels import Kernels
from megatron_solopo.parallel.layout import RankLayout
from megatron_solopo.parallel.method import ContextMethod
from megatron_solopo.parallel.recurrence import RecurrentLayout, recurrent_layout


@dataclass(frozen=True)
class DevicePack:
    """A pack on the device of one of its context-parallel ranks.

    Attributes:
        pack: tokens, positions and predictions of this rank; pieces, segments and groups of the complete pack.
        layout: attention layout of those tokens.
        is_padding: [S / cp] bool, the tokens that belong to no group.
        tokens: number of tokens of the complete pack.
        predicted: number of predicted tokens of the complete pack.
        windowed: layout of layers with a window; None where it hides nothing.
        recurrent: layout of layers with a recurrent state; None for a model without any.
    """

    pack: Pack
    layout: RankLayout
    is_padding: Tensor
    tokens: int
    predicted: int
    windowed: RankLayout | None = None
    recurrent: RecurrentLayout | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        """Indices of the pack's groups in the data set."""
        return self.pack.groups


def cut(
    pack: Pack,
    method: ContextMethod,
    kernels: Kernels,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    window: int | None = None,
    taps: int | None = None,
) -> DevicePack:
    """Returns a rank's part of a pack, on the CPU like the pack.

    Args:
        kernels: those of the layers for a pack that is not sharded.
        group: the group of the ``size`` context-parallel ranks.
        window: of the layers that have one, in tokens.
        taps: of the convolution in the layers that have a recurrent state.
    """
    rows = torch.from_numpy(method.rows(pack.pieces, rank, size))
    place = torch.full_like(pack.tokens, -1)
    place[rows] = torch.arange(rows.numel())
    predictors = place[pack.predictors]
    on_rank = predictors >= 0
    part = dataclasses.replace(
        pack,
        tokens=pack.tokens[rows],
        positions=pack.positions[rows],
        predictors=predictors[on_rank],
        targets=pack.targets[on_rank],
        segments=pack.segments[on_rank],
        weights=None if pack.weights is None else pack.weights[on_rank],
    )
    layout, windowed = method.layout(pack.pieces, rank, size, group, kernels), None
    if window is not None and pack.longest > window:
        windowed = method.layout(pack.pieces, rank, size, group, kernels, window)
    recurrent = None
    if taps is not None:
        of_ranks = [method.rows(pack.pieces, each, size) for each in range(size)]
        recurrent = recurrent_layout(pack.pieces, taps, of_ranks, group if size > 1 else None)
    padding, tokens, predicted = pack.is_padding()[rows], pack.tokens.numel(), pack.targets.numel()
    return DevicePack(part, layout, padding, tokens, predicted, windowed, recurrent)


def on_device[Value](value: Value, device: torch.device) -> Value:
    """Returns a tensor, or a dataclass with all its tensors, on ``device``; other values are returned as they are.

    Copies to a GPU use pinned memory, so that the host does not wait for the GPU's queue.
    """
    if isinstance(value, Tensor):
        from_host = device.type == "cuda" and value.device.type == "cpu"
        return cast(Value, value.pin_memory().to(device, non_blocking=True) if from_host else value.to(device))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, Pack):
            del fields["scored"]  # stays on the host
        moved = {name: on_device(field, device) for name, field in fields.items()}
        return cast(Value, dataclasses.replace(value, **moved))
    return value
