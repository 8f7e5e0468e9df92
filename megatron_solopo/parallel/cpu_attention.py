"""Attention of a pack on the CPU without masks, by torch's flash kernel for the CPU.

A rank's queries attend in two kinds of calls. Every run of rows attends to itself, causally. Queries with keys before
their own rows attend to all of these: those of all completions of a prompt to the prompt in one call, those of a
context-parallel chunk to the earlier chunks of its piece in another. The outputs of a query are merged by their
log-sum-exps, exactly: with l = log(exp(a) + exp(b)), the output is exp(a - l) of the first plus exp(b - l) of the
second. In backward each call gets the merged output and l, from which the kernel computes its share of the gradients
(Liu et al. 2023, Ring Attention, arXiv 2310.01889, section 3; Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm
2).

In a window of w tokens a run has at most w rows. Of the keys before it the latest are seen by all of its rows, and the
earliest by its first rows: as many as there are keys of these, the first row sees all of them and the last row the last
one, which is the kernel's causal attention with rows and keys in reverse order.

A mask of [queries, keys] would cost its memory, and the kernel computes what a mask hides. 16 bits are computed in
float32: rounding every part of a sum would double the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby
from typing import NamedTuple

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


class Seen(Enum):
    """What the queries of a call attend to."""

    OWN = auto()
    """The keys are the queries' own rows: each query attends to those up to its own."""
    ALL = auto()
    """Each query attends to all keys."""
    LATER = auto()
    """As many keys as queries: each query attends to the key of its number and to those after it."""


@dataclass(frozen=True)
class Call:
    """One call of the kernel, for sequences of one shape.

    Attributes:
        places: of each sequence the first of its rows among this rank's queries, and of its keys in the pack.
        query_length, key_length: rows of a sequence.
        seen: which of its sequence's keys a query attends to.
    """

    places: tuple[tuple[int, int], ...]
    query_length: int
    key_length: int
    seen: Seen

    @property
    def causal(self) -> bool:
        """Whether the kernel's attention is causal."""
        return self.seen is not Seen.ALL

    @property
    def queries(self) -> list[int]:
        return [query for query, _ in self.places]

    @property
    def keys(self) -> list[int]:
        return [key for _, key in self.places]

    def ordered(self, x: Tensor) -> Tensor:
        """Returns [sequences, heads, L, ...] in the order of the kernel's rows, or back in that of the pack."""
        return x.flip(2) if self.seen is Seen.LATER else x

    def of_queries(self, x: Tensor) -> Tensor:
        """Returns the rows of this rank's [Q, heads, ...] that the call computes, [sequences, heads, L, ...]."""
        return self.ordered(_taken(x, self.queries, self.query_length))

    def of_keys(self, x: Tensor) -> Tensor:
        """Returns the rows of the pack's [S, heads, head_dim] that the call attends to; likewise."""
        return self.ordered(_taken(x, self.keys, self.key_length))


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
            q, k, v = call.of_queries(query), call.of_keys(keys), call.of_keys(values)
            part = _forward(q, k, v, 0.0, call.causal, scale=scale)
            if call.seen is not Seen.OWN:
                part = _merged(*(call.of_queries(x) for x in (output, log_sums)), *part)
            for into, of_call in zip((output, log_sums), part, strict=True):
                for first, of_sequence in zip(call.queries, call.ordered(of_call).transpose(1, 2), strict=True):
                    into[first : first + call.query_length] = of_sequence
        return output.to(dtype), log_sums

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, log_sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = query.dtype
        grad, query, keys, values, output = _wide(grad, query, keys, values, output)
        of_query, of_keys, of_values = (torch.zeros_like(x) for x in (query, keys, values))
        for call in self.calls:
            grad_out, q, out, log_sum = (call.of_queries(x) for x in (grad, query, output, log_sums))
            k, v = call.of_keys(keys), call.of_keys(values)
            grads = _backward(grad_out, q, k, v, out, log_sum, 0.0, call.causal, scale=scale)
            sums = (of_query, call.queries), (of_keys, call.keys), (of_values, call.keys)
            for (into, firsts), part in zip(sums, grads, strict=True):
                for first, of_sequence in zip(firsts, call.ordered(part).transpose(1, 2), strict=True):
                    into[first : first + len(of_sequence)] += of_sequence
        return of_query.to(dtype), of_keys, of_values


def _wide(*tensors: Tensor) -> Iterator[Tensor]:
    """Yields tensors of 16 bits in float32, others as they are."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


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


class _Run(NamedTuple):
    """Adjacent rows of a rank that attend to each other causally.

    Attributes:
        piece: the piece that they are part of.
        first: the first of them among the rank's rows.
        begin: the first of them in the pack.
        rows: how many.
    """

    piece: Piece
    first: int
    begin: int
    rows: int


def cpu_layout(
    pieces: Sequence[Piece],
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    window: int | None = None,
) -> CpuLayout:
    """Makes the layout of a rank's part of a pack; see `sequences.sequence_layout`."""
    runs = _runs(pieces, rank, size, window)
    # kinds of calls, in each of which a query is at most once
    calls: dict[tuple[str, Seen, int, int], list[tuple[int, int]]] = defaultdict(list)
    for run in runs:
        calls["own", Seen.OWN, run.rows, run.rows].append((run.first, run.begin))

    def add(kind: str, run: _Run, start: int, first_key: int, keys: range) -> None:
        for name, seen, skipped, queries, part in _parts(start, run.rows, keys, window):
            place = run.first + skipped, first_key + part.start
            calls[f"{kind} {name}", seen, queries, len(part)].append(place)

    for run in runs:
        before = run.begin - run.piece.start
        add("earlier", run, before, run.piece.start, range(before))
    for prompt, adjacent in groupby(runs, key=lambda run: run.piece.prompt):
        if prompt is None:
            continue
        of_prompt, keys = list(adjacent), pieces[prompt]
        starts = [keys.length + run.begin - run.piece.start for run in of_prompt]
        last = max(start + run.rows for start, run in zip(starts, of_prompt, strict=True))
        common = 0 if window is None else max(0, min(last - window, keys.length))  # what is seen by all rows of all
        if common < keys.length:
            rows = sum(run.rows for run in of_prompt)
            calls["prompt", Seen.ALL, rows, keys.length - common].append((of_prompt[0].first, keys.start + common))
        for run, start in zip(of_prompt, starts, strict=True):
            add("prompt", run, start, keys.start, range(common))
    order = None
    if size > 1:
        gathered = np.concatenate([rows_of(pieces, other, size) for other in range(size)])
        order = rows_or_all(np.argsort(gathered), gathered.size)
    return CpuLayout(
        order,
        group,
        tuple(Call(tuple(places), queries, keys, seen) for (_, seen, queries, keys), places in calls.items()),
    )


def _runs(pieces: Sequence[Piece], rank: int, size: int, window: int | None) -> list[_Run]:
    """Returns the runs of a rank's rows, in their order: its chunks, of at most ``window`` rows each."""
    runs, first = [], 0
    whole = ((piece, piece.start, piece.slot) for piece in pieces)
    for piece, begin, length in whole if size == 1 else chunks_of(pieces, rank, size):
        most = min(length, window or length)
        for skipped in range(0, length, most or 1):
            runs.append(_Run(piece, first + skipped, begin + skipped, min(most, length - skipped)))
        first += length
    return runs


def _parts(start: int, rows: int, keys: range, window: int | None) -> Iterator[tuple[str, Seen, int, int, range]]:
    """Yields (name, what they see, first row, rows, keys) of the calls in which a run of ``rows`` at positions from
    ``start`` sees the positions ``keys``, which are before it."""
    seen_by_all = keys.start if window is None else max(keys.start, start + rows - window)
    if seen_by_all < keys.stop:
        yield "all", Seen.ALL, 0, rows, range(seen_by_all, keys.stop)
    if window is None:
        return
    some = range(max(keys.start, start + 1 - window), min(keys.stop, seen_by_all))
    if some:
        whole = some.start - (start + 1 - window)  # rows that see all of these
        if whole:
            yield "first rows", Seen.ALL, 0, whole, some
        yield "later", Seen.LATER, whole, len(some), some
