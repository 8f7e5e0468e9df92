"""Operators between one Megatron parameter and its Hugging Face tensors, each exact in both directions.

An operator also defines how tensor parallelism shards the parameter, because a stacked gate and up projection is
sharded in each half. ``dimension`` None means that the parameter is replicated on every rank.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """Where in the rows of a parameter those of each of its tensors are.

    Attributes:
        groups: equal groups of rows, each with some of every tensor, one tensor's behind the other's.
        shares: of each tensor its part of a group's rows, in proportion to the others.
        operators: of each tensor that of a matrix with its rows alone.
    """

    groups: int
    shares: tuple[int, ...]
    operators: tuple[Operator, ...]


class Operator(ABC):
    """Converts Hugging Face tensors to one full Megatron parameter and back."""

    @abstractmethod
    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the full Megatron parameter of these Hugging Face tensors."""

    @abstractmethod
    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        """Returns the Hugging Face tensors of a full Megatron parameter; the inverse of `to_megatron`."""

    def parts(self) -> Parts:
        """Returns where in the rows of the parameter those of each tensor are."""
        return Parts(1, (1,), (Rename(),))

    def slots(self, parameter: Tensor, rank: int, size: int, dimension: int) -> list[Tensor]:
        """Returns the views of a full parameter that the shard of a tensor-parallel rank fills, see `pieces`."""
        return [parameter.chunk(size, dimension)[rank]]

    def pieces(self, shard: Tensor) -> Sequence[Tensor]:
        """Returns the views of a shard that are the `slots` of its rank."""
        return [shard]

    def cut(self, parameter: Tensor, rank: int, size: int, dimension: int | None) -> Tensor:
        """Returns the shard of a tensor-parallel rank."""
        if dimension is None:
            return parameter
        slots = self.slots(parameter, rank, size, dimension)
        return slots[0] if len(slots) == 1 else torch.cat(slots)

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        """Copies a rank's shard of these Hugging Face tensors into its parameter, each number once.

        Equals copying ``cut(to_megatron(tensors), ...)``, which would allocate the full parameter first.

        Raises:
            ValueError: the shapes do not fit.
        """
        full = self.to_megatron(tensors)
        if dimension is not None and full.shape[dimension] != parameter.shape[dimension] * size:
            raise ValueError(f"{full.shape[dimension]} for {size} x {parameter.shape[dimension]}")
        _copy(parameter, self.cut(full, rank, size, dimension))

    def join(self, parts: Sequence[Tensor], dimension: int | None) -> Tensor:
        """Returns the full parameter from the shards of all tensor-parallel ranks; the inverse of `cut`."""
        if dimension is None:
            return parts[0]
        full = self.empty(parts[0], len(parts), dimension)
        for rank, part in enumerate(parts):
            for slot, piece in zip(self.slots(full, rank, len(parts), dimension), self.pieces(part), strict=True):
                slot.copy_(piece)
        return full

    def empty(self, shard: Tensor, size: int, dimension: int) -> Tensor:
        """Returns a full parameter without values, for shards like this one."""
        shape = list(shard.shape)
        shape[dimension] *= size
        return shard.new_empty(shape)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copies without broadcasting, unlike `Tensor.copy_`."""
    if target.shape != source.shape:
        raise ValueError(f"{tuple(source.shape)} for {tuple(target.shape)}")
    target.copy_(source)


@dataclass(frozen=True)
class Rename(Operator):
    """Keeps the tensor under another name."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]


@dataclass(frozen=True)
class PadRows(Rename):
    """Pads a vocabulary matrix, which has rows of zeros at the end in Megatron."""

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
        shard_rows = self.padded // size
        part = tensor[rank * shard_rows : (rank + 1) * shard_rows]
        _copy(parameter[: part.shape[0]], part)
        parameter[part.shape[0] :].zero_()


@dataclass(frozen=True)
class InterleaveQKV(Operator):
    """Interleaves q, k and v to rows grouped by key-value head: its query heads, its key head, its value head.

    Attributes:
        paired: the first channels of each head of q and k, of which RoPE rotates adjacent pairs in Hugging Face's
            order; here their halves are pairs, as in Llama. 0 where Hugging Face has Llama's order.
    """

    heads: int
    kv_heads: int
    head_dim: int
    paired: int = 0

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = (t.reshape(self.kv_heads, -1, *t.shape[1:]) for t in self._ordered(tensors))
        return torch.cat([*parts], dim=1).flatten(0, 1)

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        groups = parameter.reshape(self.kv_heads, -1, *parameter.shape[1:])
        parts = groups.split([share * self.head_dim for share in self._heads_of_group], dim=1)
        return [self.ordered_back(place, part.flatten(0, 1)) for place, part in enumerate(parts)]

    def parts(self) -> Parts:
        return Parts(self.kv_heads, self._heads_of_group, tuple(Reordered(self, place) for place in range(3)))

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        groups = parameter.view(self.kv_heads // size, -1, *parameter.shape[1:])
        targets = groups.split([share * self.head_dim for share in self._heads_of_group], dim=1)
        for target, tensor in zip(targets, self._ordered(tensors), strict=True):
            _copy(target, tensor.reshape(self.kv_heads, -1, *tensor.shape[1:]).chunk(size)[rank])

    def ordered(self, place: int, tensor: Tensor) -> Tensor:
        """Returns q (place 0), k or v with its rows in the order that they have here."""
        return self._transposed(tensor, self.paired // 2, 2) if place < 2 and self.paired else tensor

    def ordered_back(self, place: int, tensor: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return self._transposed(tensor, 2, self.paired // 2) if place < 2 and self.paired else tensor

    def _ordered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.ordered(place, tensor) for place, tensor in enumerate(tensors)]

    def _transposed(self, tensor: Tensor, rows: int, columns: int) -> Tensor:
        """Transposes the paired channels of each head as a matrix [rows, columns]."""
        heads = tensor.reshape(-1, self.head_dim, *tensor.shape[1:])
        pairs = heads[:, : self.paired].unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
        return torch.cat((pairs, heads[:, self.paired :]), dim=1).flatten(0, 1)

    @property
    def _heads_of_group(self) -> tuple[int, int, int]:
        """Heads of query, key and value in the group of one key-value head."""
        return self.heads // self.kv_heads, 1, 1


@dataclass(frozen=True)
class Reordered(Operator):
    """One of the tensors of an `InterleaveQKV` alone.

    Attributes:
        place: 0 for q, 1 for k, 2 for v.
    """

    whole: InterleaveQKV
    place: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return self.whole.ordered(self.place, tensor)

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [self.whole.ordered_back(self.place, parameter)]


@dataclass(frozen=True)
class FusedQKV(InterleaveQKV):
    """`InterleaveQKV` of one tensor: q above k above v."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return super().to_megatron(self._split(*tensors))

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [torch.cat(super().to_hf(parameter))]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        super().fill(parameter, self._split(*tensors), rank, size, dimension)

    def _split(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.split([heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)])


@dataclass(frozen=True)
class GatedQKV(InterleaveQKV):
    """`InterleaveQKV` whose query tensor holds each head's query above its gate; here the gates of a group follow its
    queries."""

    def ordered(self, place: int, tensor: Tensor) -> Tensor:
        return self._exchanged(tensor, self.heads // self.kv_heads, 2) if place == 0 else tensor

    def ordered_back(self, place: int, tensor: Tensor) -> Tensor:
        return self._exchanged(tensor, 2, self.heads // self.kv_heads) if place == 0 else tensor

    def _exchanged(self, both: Tensor, first: int, second: int) -> Tensor:
        """Transposes the heads of each group as a matrix [first, second]."""
        heads = both.reshape(self.kv_heads, first, second, self.head_dim, *both.shape[1:])
        return heads.transpose(1, 2).flatten(0, 3)

    @property
    def _heads_of_group(self) -> tuple[int, int, int]:
        return 2 * (self.heads // self.kv_heads), 1, 1


@dataclass(frozen=True)
class Grouped(Operator):
    """Groups the rows of several tensors by head: the first head's rows of each, then the second's.

    Attributes:
        groups: heads.
        sections: of each tensor the rows of a head; several where the tensor holds one part of all heads above another.
    """

    groups: int
    sections: tuple[tuple[int, ...], ...]

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in self._parts(tensors)], 1).flatten(0, 1)

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        rows = [row for section in self.sections for row in section]
        parts = iter(parameter.unflatten(0, (self.groups, -1)).split(rows, 1))
        return [torch.cat([next(parts).flatten(0, 1) for _ in section]) for section in self.sections]

    def parts(self) -> Parts:
        shares = tuple(map(sum, self.sections))
        return Parts(self.groups, shares, tuple(Grouped(self.groups, (section,)) for section in self.sections))

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        rows = [row for section in self.sections for row in section]
        targets = parameter.unflatten(0, (self.groups // size, -1)).split(rows, 1)
        for target, part in zip(targets, self._parts(tensors), strict=True):
            _copy(target, part.unflatten(0, (self.groups, -1)).chunk(size)[rank])

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            part
            for tensor, section in zip(tensors, self.sections, strict=True)
            for part in tensor.split([self.groups * row for row in section])
        ]


@dataclass(frozen=True)
class StackGateUp(Operator):
    """Stacks the gate above the up projection; each half is sharded separately."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        gate, up = tensors
        return torch.cat((gate, up))

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(2))

    def parts(self) -> Parts:
        return Parts(1, (1, 1), (Rename(), Rename()))

    def slots(self, parameter: Tensor, rank: int, size: int, dimension: int) -> list[Tensor]:
        return [half.chunk(size)[rank] for half in parameter.chunk(2)]

    def pieces(self, shard: Tensor) -> Sequence[Tensor]:
        return shard.chunk(2)

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        for target, tensor in zip(parameter.chunk(2), tensors, strict=True):
            if tensor.shape[0] != target.shape[0] * size:
                raise ValueError(f"{tensor.shape[0]} for {size} x {target.shape[0]}")
            _copy(target, tensor.chunk(size)[rank])


@dataclass(frozen=True)
class FusedGateUp(StackGateUp):
    """`StackGateUp` of one tensor: the gate above the up projection."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        (tensor,) = tensors
        super().fill(parameter, tensor.chunk(2), rank, size, dimension)


@dataclass(frozen=True)
class Transpose(Operator):
    """Transposes a matrix that Hugging Face holds as [in, out]."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor.t()

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        return [parameter.t()]


@dataclass(frozen=True)
class AlternatingGateUp(StackGateUp):
    """`StackGateUp` of one tensor whose last dimension has gate and up in turn: a matrix [in, 2 x inner], or its
    bias."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return super().to_megatron(self._halves(*tensors))

    def to_hf(self, parameter: Tensor) -> list[Tensor]:
        gate, up = parameter.chunk(2)
        rows = torch.stack((gate, up), 1).flatten(0, 1)
        return [rows.t() if rows.dim() == 2 else rows]

    def fill(self, parameter: Tensor, tensors: Sequence[Tensor], rank: int, size: int, dimension: int | None) -> None:
        super().fill(parameter, self._halves(*tensors), rank, size, dimension)

    def _halves(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        rows = tensor.t() if tensor.dim() == 2 else tensor
        return rows[::2], rows[1::2]


def part_of(name: str) -> tuple[str, int | None]:
    """Splits the name of an expert's tensor, of those that a folder holds stacked in one.

    Returns:
        ``("experts.down_proj", 3)`` of ``experts.down_proj[3]``; (name, None) of a tensor that is not a part.
    """
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter (``{layer}`` and ``{expert}`` are placeholders of numbers) and its tensors.

    A Hugging Face name that ends in ``[{expert}]`` is a part of a tensor, see `part_of`.

    Attributes:
        layers: the layers that have it, counted from 0; None: all.
        dtype: of the parameter and of its tensors in files, whatever the model's; None: the model's.
    """

    megatron: str
    hf: tuple[str, ...]
    operator: Operator
    layers: Collection[int] | None = None
    dtype: torch.dtype | None = None

    @property
    def of_experts(self) -> bool:
        """Whether each expert has such a parameter, which expert parallelism distributes and expert tensor parallelism
        shards."""
        return "{expert}" in self.megatron
