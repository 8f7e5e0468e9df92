"""Attention layouts of the tokens that a rank computes, and attention over a complete pack.

The S x S score matrix of a pack never exists: torch's fused scaled dot product attention computes the pieces of one
shape at a time. Layouts are made on the CPU, once for a pack, and used by every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.pack import Piece


@dataclass(frozen=True)
class RankLayout:
    """The attention layout of a rank: a dataclass of tensors and numbers, which `device_pack.on_device` moves."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Computes attention of query [S / cp, heads, head_dim] over key and value [S / cp, kv_heads, head_dim], all
        rotated; the result has the shape of query."""
        raise NotImplementedError(f"{type(self).__name__} is for the kernels of the layers")


@dataclass(frozen=True)
class Block:
    """Pieces of one shape, computed in one call.

    Attributes:
        count: number of pieces.
        queries: tokens of a piece.
        keys: tokens that a piece attends to: its prompt's and its own.
    """

    count: int
    queries: int
    keys: int


@dataclass(frozen=True)
class BlockLayout(RankLayout):
    """A complete pack: causal attention in every prompt, and of each completion over its prompt and itself.

    Attributes:
        blocks: the attention calls.
        queries: [S] rows of the pack, block after block; None where that is the order of the pack.
        keys: [sum of count x keys] rows whose keys and values each block attends to, prompt first; None likewise.
        order: [S] index of each row's output in the blocks' outputs: the inverse of ``queries``.
    """

    blocks: tuple[Block, ...]
    queries: Tensor | None
    keys: Tensor | None
    order: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        query_rows = [block.count * block.queries for block in self.blocks]
        key_rows = [block.count * block.keys for block in self.blocks]
        # One gather and one split: slicing block by block would cost a pack-sized gradient for each block.
        queries = select(query, self.queries).split(query_rows)
        keys = select(key, self.keys).split(key_rows)
        values = select(value, self.keys).split(key_rows)
        outputs = [_attend(*part, scale) for part in zip(self.blocks, queries, keys, values, strict=True)]
        return select(torch.cat(outputs), self.order)


@dataclass(frozen=True)
class SequenceLayout(RankLayout):
    """A pack for kernels of packed sequences, with every piece a sequence.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1] int32, the first query and key of each sequence, and the total.
        max_seqlen_q, max_seqlen_kv: lengths of the longest sequences.
        keys: [last of cu_seqlens_kv] rows whose keys and values each piece attends to, prompt first; None where that
            is the order of the pack.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    keys: Tensor | None


def block_layout(pieces: Sequence[Piece]) -> BlockLayout:
    """Makes the layout of a complete pack for torch's kernels."""
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        prompt = 0 if piece.prompt is None else pieces[piece.prompt].length
        shapes[(prompt, piece.slot)].append(number)
    blocks, queries, keys = [], [], []
    for (prompt_length, slot), numbers in shapes.items():
        blocks.append(Block(len(numbers), slot, prompt_length + slot))
        for number in numbers:
            piece = pieces[number]
            span = np.arange(piece.start, piece.start + slot)
            queries.append(span)
            if piece.prompt is not None:
                start = pieces[piece.prompt].start
                keys.append(np.arange(start, start + prompt_length))
            keys.append(span)
    rows = np.concatenate(queries)
    return BlockLayout(
        tuple(blocks),
        _rows(rows, rows.size),
        _rows(np.concatenate(keys), rows.size),
        _rows(np.argsort(rows), rows.size),
    )


def sequence_layout(pieces: Sequence[Piece]) -> SequenceLayout:
    """Makes the layout of a complete pack for kernels of packed sequences."""
    query_lengths = [piece.slot for piece in pieces]
    key_lengths, keys = [], []
    for piece in pieces:
        key_lengths.append(piece.slot)
        if piece.prompt is not None:
            prompt = pieces[piece.prompt]
            keys.append(np.arange(prompt.start, prompt.start + prompt.length))
            key_lengths[-1] += prompt.length
        keys.append(np.arange(piece.start, piece.start + piece.slot))
    rows = _rows(np.concatenate(keys), sum(query_lengths))
    return SequenceLayout(
        _cumulated(query_lengths), _cumulated(key_lengths), max(query_lengths), max(key_lengths), rows
    )


def _cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _rows(rows: np.ndarray, tokens: int) -> Tensor | None:
    """Returns an index, or None for all rows in their order, which needs no copy."""
    if rows.size == tokens and np.array_equal(rows, np.arange(rows.size)):
        return None
    return torch.from_numpy(rows)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Selects rows of a tensor by an index of a layout; None selects all."""
    return x if rows is None else x.index_select(0, rows)


def _attend(block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Computes a block's outputs, [count x queries, heads, head_dim]."""

    def batched(x: Tensor, length: int) -> Tensor:
        return x.view(block.count, length, *x.shape[1:]).transpose(1, 2)

    mask = None
    if block.keys > block.queries:
        # Queries are the last positions of the keys; is_causal would align them with the first.
        mask = _lower_right(block.queries, block.keys, query.device)
    out = F.scaled_dot_product_attention(
        batched(query, block.queries),
        batched(key, block.keys),
        batched(value, block.keys),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(query.shape)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Returns a causal mask aligned to the last position.

    CUDA's flash kernel has a name for it; the fused kernel on CPU takes [queries, keys] booleans, small because a
    response is short compared with its prompt.
    """
    if device.type == "cuda":
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
