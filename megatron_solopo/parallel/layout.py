"""Attention layouts of the tokens that a rank computes, and attention over a complete pack.

The S x S score matrix of a pack never exists: torch's fused scaled dot product attention computes the pieces of one
shape at a time. Layouts are made on the CPU, once for a pack, and used by every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.pack import Piece


@dataclass(frozen=True)
class RankLayout:
    """The attention layout of a rank: a dataclass of tensors and numbers, which `device_pack.on_device` moves."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Computes attention of query [S / cp, heads, head_dim] over key and value [S / cp, kv_heads, head_dim], all
        rotated; the result has the shape of query.

        Args:
            sinks: [heads], a score that is in each query's softmax beside those of its keys. Only layouts whose
                kernels return log-sum-exps take it (`sequences.GatheredLayout`).
        """
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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        assert sinks is None
        query_rows = [block.count * block.queries for block in self.blocks]
        key_rows = [block.count * block.keys for block in self.blocks]
        # One gather and one split: slicing block by block would cost a pack-sized gradient for each block.
        queries = select(query, self.queries).split(query_rows)
        keys = select(key, self.keys).split(key_rows)
        values = select(value, self.keys).split(key_rows)
        parts = zip(self.blocks, queries, keys, values, strict=True)
        outputs = [attend_block(*part, scale, efficient=True) for part in parts]
        return select(torch.cat(outputs), self.order)


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
        rows_or_all(rows, rows.size),
        rows_or_all(np.concatenate(keys), rows.size),
        rows_or_all(np.argsort(rows), rows.size),
    )


def rows_or_all(rows: np.ndarray, tokens: int) -> Tensor | None:
    """Returns an index, or None for all rows in their order, which needs no copy."""
    if rows.size == tokens and np.array_equal(rows, np.arange(rows.size)):
        return None
    return torch.from_numpy(rows)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Selects rows of a tensor by an index of a layout; None selects all."""
    return x if rows is None else x.index_select(0, rows)


def attend_block(
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    cudnn_only: bool = False,
    efficient: bool = False,
) -> Tensor:
    """Computes a block's outputs, [count x queries, heads, head_dim].

    Args:
        cudnn_only: whether it may run on cuDNN alone, on CUDA in 16 bits.
        efficient: whether it runs on the memory-efficient kernel there, as in 32 bits.
    """
    # Queries are the last positions of the keys; is_causal would align them with the first.
    mask = causal_lower_right(block.queries, block.keys) if block.keys > block.queries else None
    backends = None if query.device.type == "cpu" else backends_of(query.dtype, cudnn_only, efficient)
    if backends == [SDPBackend.EFFICIENT_ATTENTION]:  # of torch 2.11 takes as many heads of keys as of queries
        key, value = (repeated(x, query.shape[1]) for x in (key, value))

    def batched(x: Tensor, length: int) -> Tensor:
        return x.view(block.count, length, *x.shape[1:]).transpose(1, 2)

    with nullcontext() if backends is None else sdpa_kernel(backends):
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


def repeated(x: Tensor, heads: int) -> Tensor:
    """Returns keys or values, [S, kv_heads, head_dim], with a copy for each query head, [S, heads, head_dim]."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def backends_of(dtype: torch.dtype, cudnn_only: bool, efficient: bool = False) -> list[SDPBackend]:
    """Returns the kernels of CUDA that hold no score matrix; float64 has none, and is for tests."""
    if dtype == torch.float64:
        return [SDPBackend.MATH]
    if dtype == torch.float32 or efficient:
        return [SDPBackend.EFFICIENT_ATTENTION]
    return [SDPBackend.CUDNN_ATTENTION] if cudnn_only else [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
