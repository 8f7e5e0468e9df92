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

    def join(self, parts: Sequence[Tensor], dimension: int | None) -> Tensor:
        """The whole parameter from the parts of all tensor-parallel processes; the inverse of `cut`."""
        return parts[0] if dimension is None else torch.cat(list(parts), dimension)


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
