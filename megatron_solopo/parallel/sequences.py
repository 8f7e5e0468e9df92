"""Attention over packed sequences on CUDA: every query of a rank in one call of torch's flash kernel.

A sequence is a run of adjacent queries with the keys that its last query attends to; causal, with the queries the last
of the keys (bottom right). A completion's keys are its prompt's and its own; a chunk of a context-parallel rank
(`parallel.zigzag`) has those up to its end; with a window both have the keys that it reaches. Keys and
values of all context-parallel ranks are gathered for one layer at a time, in forward and again in backward, and their
gradients are summed in float32; queries, outputs and what is saved for backward are this rank's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Piece
from megatron_solopo.parallel import flash
from megatron_solopo.parallel.layout import Block, RankLayout, attend_block, rows_or_all, select
from megatron_solopo.parallel.zigzag import chunks_of, rows_of


@dataclass(frozen=True)
class GatheredLayout(RankLayout):
    """Attention of a rank's queries over the keys of all context-parallel ranks, by a kernel with its own backward.

    Attributes:
        keys: rows of the keys and values that the kernel takes, among the rows of all ranks of ``group``, rank after
            rank; None where these are all rows in their order.
        group: the group of the context-parallel ranks; None where this rank holds the keys of the complete pack.
    """

    keys: Tensor | None
    group: dist.ProcessGroup | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Collective over ``group``."""
        return _Attention.apply(query, key, value, sinks, self, query.shape[-1] ** -0.5 if scale is None else scale)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Returns the output in the shape of query, [Q, heads, head_dim], and its log-sum-exps in float32 or float64,
        of `seen` keys and values."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, log_sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of query, keys and values, from that of the output; see `forward`."""
        raise NotImplementedError

    def by_query(self, log_sums: Tensor) -> Tensor:
        """Returns the kernel's log-sum-exps as [Q, heads], and those as the kernel has them."""
        return log_sums

    def seen(self, x: Tensor) -> Tensor:
        """Returns the keys or values that the kernel takes, from this rank's rows."""
        if self.group is not None:
            rows = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
            dist.all_gather_into_tensor(rows, x.contiguous(), group=self.group)
            x = rows
        return select(x, self.keys)

    def sum_to_rows(self, grad: Tensor, x: Tensor) -> Tensor:
        """Returns the gradient of ``x`` from that of ``seen(x)``: the sum over all sequences and ranks."""
        if self.keys is None and self.group is None:
            return grad.to(x.dtype)
        ranks = 1 if self.group is None else self.group.size()
        total = torch.promote_types(grad.dtype, torch.float32)  # 16 bits would lose the sum over sequences and ranks
        rows = torch.zeros(x.shape[0] * ranks, *x.shape[1:], dtype=total, device=x.device)
        rows = rows.add_(grad) if self.keys is None else rows.index_add_(0, self.keys, grad.to(total))
        if self.group is not None:
            all_rows, rows = rows, rows.new_empty(x.shape)
            dist.reduce_scatter_tensor(rows, all_rows, group=self.group)
        return rows.to(x.dtype)


class _Attention(torch.autograd.Function):
    """Attention, and with sinks a key more for every query, whose score is the head's sink and whose value is 0.

    With the log-sum-exp l of a query's scores and the sink s, the output is that without it times exp(l - m), where
    m = log(exp(l) + exp(s)). As for keys in several calls (`parallel.cpu_attention`) the kernel's backward gets this
    output and m; the sink's own gradient is -exp(s - m) (gradient . output), summed over queries.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, layout: GatheredLayout, scale: float
    ) -> Tensor:
        output, log_sums = layout.forward(query, layout.seen(key), layout.seen(value), scale)
        if sinks is not None:
            without = layout.by_query(log_sums)
            together = torch.logaddexp(without, sinks.to(without.dtype))
            output = (output * torch.exp(without - together)[..., None]).to(output.dtype)
            log_sums = layout.by_query(together).contiguous()
        ctx.save_for_backward(query, key, value, sinks, output, log_sums)
        ctx.settings = layout, scale
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        query, key, value, sinks, output, log_sums = ctx.saved_tensors
        layout, scale = ctx.settings
        of_sinks = None
        if sinks is not None:
            shares = torch.exp(sinks.to(log_sums.dtype) - layout.by_query(log_sums))
            of_sinks = -(shares * (grad * output.to(shares.dtype)).sum(-1)).sum(0).to(sinks.dtype)
        of_query, of_keys, of_values = layout.backward(
            grad, query, layout.seen(key), layout.seen(value), output, log_sums, scale
        )
        return of_query, layout.sum_to_rows(of_keys, key), layout.sum_to_rows(of_values, value), of_sinks, None, None


@dataclass(frozen=True)
class SequenceLayout(GatheredLayout):
    """Sequences of the queries of a rank, adjacent and in order; ``keys`` are those of each sequence, prompt first.

    Attributes:
        query_lengths, key_lengths: queries and keys of each sequence.
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1] int32, the first query and key of each sequence, and the total.
        window: tokens that a query attends to at most, itself and those before it; None: all.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    window: int | None = None

    @property
    def max_seqlen_q(self) -> int:
        return max(self.query_lengths)

    @property
    def max_seqlen_kv(self) -> int:
        return max(self.key_lengths)

    def by_query(self, log_sums: Tensor) -> Tensor:
        return log_sums.t()

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return flash.forward(query, keys, values, self, scale)

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, log_sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return flash.backward(grad, query, keys, values, output, log_sums, self, scale)


def sequence_layout(
    pieces: Sequence[Piece],
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    queries: Callable[[Piece], bool] = lambda piece: True,
    window: int | None = None,
) -> SequenceLayout:
    """Makes the layout of a rank's part of a pack.

    Args:
        group: the group of the ``size`` context-parallel ranks.
        queries: the pieces whose queries are among the sequences; keys can be those of any piece.
        window: tokens that a query attends to at most, itself and those before it, in a completion also those of its
            prompt; None: all.
    """
    whole = ((piece, piece.start, piece.slot) for piece in pieces)
    query_lengths, key_lengths, keys = [], [], []
    for piece, begin, length in whole if size == 1 else chunks_of(pieces, rank, size):
        if queries(piece):
            seen = [np.arange(piece.start, begin + length)]
            if piece.prompt is not None:
                prompt = pieces[piece.prompt]
                seen.insert(0, np.arange(prompt.start, prompt.start + prompt.length))
            reached = np.concatenate(seen)
            if window is not None:  # by the first query; no further
                reached = reached[-(length + window - 1) :]
            query_lengths.append(length)
            key_lengths.append(len(reached))
            keys.append(reached)
    rows, total = np.concatenate(keys), sum(piece.slot for piece in pieces)
    if size > 1:
        gathered = np.concatenate([rows_of(pieces, other, size) for other in range(size)])
        rows = np.argsort(gathered)[rows]
    return SequenceLayout(
        rows_or_all(rows, total),
        group,
        tuple(query_lengths),
        tuple(key_lengths),
        _cumulated(query_lengths),
        _cumulated(key_lengths),
        window,
    )


def _cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@dataclass(frozen=True)
class PromptLayout(RankLayout):
    """A complete pack: each prompt by torch's scaled dot product attention, all completions as sequences.

    Attributes:
        runs: number of adjacent rows that are a prompt or completions, in the order of the pack.
        prompts: whether each run is a prompt.
        completions: the sequences of the other runs; None without any.
        cudnn_only: whether prompts run on cuDNN alone; otherwise on the flash kernel where torch prefers that.
    """

    runs: tuple[int, ...]
    prompts: tuple[bool, ...]
    completions: SequenceLayout | None
    cudnn_only: bool

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        assert sinks is None
        # Splits, since the gradient of each slice would be as large as the pack.
        queries, keys, values = (x.split(self.runs) for x in (query, key, value))
        rest: list[Tensor] = []
        if self.completions is not None:
            of_completions = [q for q, is_prompt in zip(queries, self.prompts, strict=True) if not is_prompt]
            output = self.completions.attend(torch.cat(of_completions), key, value, scale)
            rest = list(output.split([len(q) for q in of_completions]))
        outputs = [
            attend_block(Block(1, len(q), len(q)), q, k, v, scale, self.cudnn_only) if is_prompt else rest.pop(0)
            for is_prompt, q, k, v in zip(self.prompts, queries, keys, values, strict=True)
        ]
        return torch.cat(outputs)


def prompt_layout(pieces: Sequence[Piece], cudnn_only: bool) -> PromptLayout:
    """Makes the layout of a complete pack whose prompts and completions run on different kernels."""
    runs: list[tuple[int, bool]] = []
    for completes, adjacent in groupby(pieces, lambda piece: piece.prompt is not None):
        slots = [piece.slot for piece in adjacent]
        runs += [(sum(slots), False)] if completes else [(slot, True) for slot in slots]
    lengths, prompts = zip(*runs, strict=True)
    completions = None if all(prompts) else sequence_layout(pieces, queries=lambda piece: piece.prompt is not None)
    return PromptLayout(lengths, prompts, completions, cudnn_only)
