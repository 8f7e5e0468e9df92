"""How one Megatron parameter is made of Hugging Face tensors: a few operators, each exact in both directions.

An operator also knows how tensor parallelism cuts the parameter, because a stacked gate and up projection is cut in
each half. ``None`` as cut means that every process holds the whole parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Operator(ABC):
    """Hugging Face tensors <-> one whole Megatron parameter."""

    @abstractmethod
    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron parameter of these Hugging Face tensors."""

    @abstractmethod
    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        """The Hugging Face tensors of a Megatron parameter; the inverse of `to_megatron`."""

    def cut(self, parameter: Tensor, rank: int, size: int, dimension: int | None) -> Tensor:
        """The part of a tensor-parallel process."""
        return parameter if dimension is None else parameter.chunk(size, dimension)[rank]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        """Copies a process's part of these Hugging Face tensors into its parameter, each number once.

        The same as copying ``cut(to_megatron(tensors), ...)``, which would make the whole first.

        Raises:
            ValueError: the shapes do not fit.
        """
        whole = self.to_megatron(tensors)
        if dimension is not None and whole.shape[dimension] != parameter.shape[dimension] * size:
            raise ValueError(f"{whole.shape[dimension]} for {size} x {parameter.shape[dimension]}")
        _copy(parameter, self.cut(whole, rank, size, dimension))

    def join(self, parts: Sequence[Tensor], dimension: int | None) -> Tensor:
        """The whole parameter from the parts of all tensor-parallel processes; the inverse of `cut`."""
        return parts[0] if dimension is None else torch.cat(list(parts), dimension)


def _copy(target: Tensor, source: Tensor) -> None:
    """Unlike torch's own copy, without broadcasting."""
    if target.shape != source.shape:
        raise ValueError(f"{tuple(source.shape)} for {tuple(target.shape)}")
    target.copy_(source)


@dataclass(frozen=True)
class Rename(Operator):
    """The same tensor under another name."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]


@dataclass(frozen=True)
class PadRows(Rename):
    """A vocabulary matrix: Megatron's has rows of zeros at the end."""

    rows: int
    padded: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        padding = tensor.new_zeros(self.padded - self.rows, *tensor.shape[1:])
        return torch.cat((tensor, padding))

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [parameter[: self.rows]]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        (tensor,) = tensors
        if tensor.shape[0] != self.rows:
            raise ValueError(f"{tensor.shape[0]} rows for {self.rows}")
        own = self.padded // size
        part = tensor[rank * own : (rank + 1) * own]
        _copy(parameter[: part.shape[0]], part)
        parameter[part.shape[0] :].zero_()


@dataclass(frozen=True)
class InterleaveQKV(Operator):
    """q, k, v -> rows grouped by key-value head: its query heads, its key head, its value head."""

    heads: int
    kv_heads: int
    head_dim: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        query, key, value = (t.reshape(self.kv_heads, -1, *t.shape[1:]) for t in tensors)
        return torch.cat((query, key, value), dim=1).flatten(0, 1)

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        own = self.heads // self.kv_heads * self.head_dim
        groups = parameter.reshape(self.kv_heads, -1, *parameter.shape[1:])
        return [part.flatten(0, 1) for part in groups.split((own, self.head_dim, self.head_dim), dim=1)]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        own = self.heads // self.kv_heads * self.head_dim
        groups = parameter.view(self.kv_heads // size, -1, *parameter.shape[1:])
        for target, tensor in zip(groups.split((own, self.head_dim, self.head_dim), dim=1), tensors, strict=True):
            whole = tensor.reshape(self.kv_heads, -1, *tensor.shape[1:])
            _copy(target, whole.chunk(size)[rank])


@dataclass(frozen=True)
class StackGateUp(Operator):
    """gate above up; each half is cut on its own."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        gate, up = tensors
        return torch.cat((gate, up))

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(2))

    def cut(self, parameter: Tensor, rank: int, size: int, dimension: int | None) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in parameter.chunk(2)])

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        for target, tensor in zip(parameter.chunk(2), tensors, strict=True):
            if tensor.shape[0] != target.shape[0] * size:
                raise ValueError(f"{tensor.shape[0]} for {size} x {target.shape[0]}")
            _copy(target, tensor.chunk(size)[rank])

    def join(self, parts: Sequence[Tensor], dimension: int | None) -> Tensor:
        halves = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves])


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter (``{layer}`` and ``{expert}`` stand for numbers) and the tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    operator: Operator

    @property
    def of_experts(self) -> bool:
        """Whether each expert has such a parameter: expert parallelism spreads them, and expert tensor parallelism
        cuts them."""
        return "{expert}" in self.megatron
