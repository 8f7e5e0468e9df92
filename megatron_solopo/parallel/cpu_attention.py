"""Attention of a pack on the CPU without masks, by torch's flash kernel for the CPU.

A rank's queries attend in two kinds of calls. Every run of rows attends to itself, causally. Queries with keys before
their own rows attend to all of these: those of all completions of a prompt to the prompt in one call, those of a
context-parallel chunk to the earlier chunks of its piece in another. The outputs of a query are merged by their
log-sum-exps, exactly: with l = log(exp(a) + exp(b)), the output is exp(a - l) of the first plus exp(b - l) of the
second. In backward each call gets the merged output and l, from which the kernel computes its share of the gradients
(Liu et al. 2023, Ring Attention, arXiv 2310.01889, section 3; Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm
2).

A mask of [queries, keys] would cost its memory, and the kernel computes what a mask hides. 16 bits are computed in
float32: rounding every part of a sum would double the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Piece
from megatron_solopo.parallel.layout import rows_or_all
from megatron_solopo.parallel.sequences import GatheredLayout
from megatron_solopo.parallel.zigzag import chunks_of, rows_of

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Call:
    """One call of the kernel, for sequences of one shape.

    Attributes:
        places: of each sequence the first of its rows among this rank's queries, and of its keys in the pack.
        query_length, key_length: rows of a sequence.
        causal: the queries are the keys' own rows; otherwise each query attends to all of its sequence's keys.
    """

    places: tuple[tuple[int, int], ...]
    query_length: int
    key_length: int
    causal: bool

    @property
    def queries(self) -> list[int]:
        return [query for query, _ in self.places]

    @property
    def keys(self) -> list[int]:
        return [key for _, key in self.places]


@dataclass(frozen=True)
class CpuLayout(GatheredLayout):
    """The calls of a rank, those of a query's own rows before all others.

    Attributes:
        calls: together they give each query every key that it attends to, once.
    """

    calls: tuple[Call, ...]

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        dtype = query.dtype
        query, keys, values = _wide(query, keys, values)
        output, log_sums = torch.empty_like(query), query.new_empty(query.shape[:2])
        for call in self.calls:
            q, k, v = _taken(query, call.queries, call.query_length), *_keys_of(call, keys, values)
            part = _forward(q, k, v, 0.0, call.causal, scale=scale)
            if not call.causal:
                before = (_taken(x, call.queries, call.query_length) for x in (output, log_sums))
                part = _merged(*before, *part)
            for into, of_call in zip((output, log_sums), part, strict=True):
                for first, of_sequence in zip(call.queries, of_call.transpose(1, 2), strict=True):
                    into[first : first + call.query_length] = of_sequence
        return output.to(dtype), log_sums

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, log_sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = query.dtype
        grad, query, keys, values, output = _wide(grad, query, keys, values, output)
        of_query, of_keys, of_values = (torch.zeros_like(x) for x in (query, keys, values))
        for call in self.calls:
            grad_out, q, out, log_sum = (
                _taken(x, call.queries, call.query_length) for x in (grad, query, output, log_sums)
            )
            k, v = _keys_of(call, keys, values)
            grads = _backward(grad_out, q, k, v, out, log_sum, 0.0, call.causal, scale=scale)
            sums = (of_query, call.queries), (of_keys, call.keys), (of_values, call.keys)
            for (into, firsts), part in zip(sums, grads, strict=True):
                for first, of_sequence in zip(firsts, part.transpose(1, 2), strict=True):
                    into[first : first + len(of_sequence)] += of_sequence
        return of_query.to(dtype), of_keys, of_values


def _wide(*tensors: Tensor) -> Iterator[Tensor]:
    """Yields tensors of 16 bits in float32, others as they are."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _keys_of(call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return _taken(keys, call.keys, call.key_length), _taken(values, call.keys, call.key_length)


def _taken(x: Tensor, firsts: Sequence[int], length: int) -> Tensor:
    """Returns ``length`` rows of [S, heads, ...] from each of ``firsts`` as [sequences, heads, length, ...]; those of
    one sequence without a copy."""
    parts = [x[first : first + length] for first in firsts]
    return (parts[0][None] if len(parts) == 1 else torch.stack(parts)).transpose(1, 2)


def _merged(output: Tensor, log_sums: Tensor, more: Tensor, log_sums_of_more: Tensor) -> tuple[Tensor, Tensor]:
    """Returns output and log-sum-exps over two sets of keys, from those of each: [sequences, heads, L, head_dim] and
    [sequences, heads, L]."""
    together = torch.logaddexp(log_sums, log_sums_of_more)
    first, second = (torch.exp(x - together)[..., None] for x in (log_sums, log_sums_of_more))
    return output * first + more * second, together


def cpu_layout(
    pieces: Sequence[Piece], rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
) -> CpuLayout:
    """Makes the layout of a rank's part of a pack; see `sequences.sequence_layout`."""
    whole = [(piece, piece.start, piece.slot) for piece in pieces]
    chunks = [chunk for chunk in (whole if size == 1 else chunks_of(pieces, rank, size)) if chunk[2]]
    firsts = np.cumsum([0, *(length for *_, length in chunks)]).tolist()
    # three kinds of calls, since a call adds to a query once
    own, earlier, prompts = (defaultdict[tuple[int, int], list[tuple[int, int]]](list) for _ in range(3))
    for (piece, begin, length), first in zip(chunks, firsts, strict=False):
        own[length, length].append((first, begin))
        if begin > piece.start:
            earlier[length, begin - piece.start].append((first, piece.start))
    for prompt, adjacent in groupby(range(len(chunks)), key=lambda number: chunks[number][0].prompt):
        if prompt is not None:
            numbers, keys = list(adjacent), pieces[prompt]
            first, end = firsts[numbers[0]], firsts[numbers[-1] + 1]
            prompts[end - first, keys.length].append((first, keys.start))
    calls = [
        Call(tuple(places), *lengths, causal)
        for shapes, causal in ((own, True), (earlier, False), (prompts, False))
        for lengths, places in shapes.items()
    ]
    order = None
    if size > 1:
        gathered = np.concatenate([rows_of(pieces, other, size) for other in range(size)])
        order = rows_or_all(np.argsort(gathered), gathered.size)
    return CpuLayout(order, group, tuple(calls))
