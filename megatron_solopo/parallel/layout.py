"""What attention needs to know of the tokens that a rank computes, and attention over a whole pack.

The S x S score matrix of a pack never exists: pieces are attended one shape at a time through torch's fused scaled
dot product attention. Layouts are made on the CPU, once a pack, and used by every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.pack import Piece


@dataclass(frozen=True)
class RankLayout:
    """A dataclass of tensors and numbers, which `device_pack.on_device` moves."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [S / cp, heads, head_dim], key and value [S / cp, kv_heads, head_dim], rotated -> as query."""
        raise NotImplementedError(f"{type(self).__name__} is for the kernels of the layers")


@dataclass(frozen=True)
class Block:
    """Pieces of one shape, attended in one call: ``count`` pieces of ``own`` tokens that see ``seen`` tokens,
    their prompt's and their own."""

    count: int
    own: int
    seen: int


@dataclass(frozen=True)
class BlockLayout(RankLayout):
    """A whole pack: causal in every prompt, each continuation over its prompt and itself.

    Attributes:
        blocks: the attention calls.
        queries: [S] rows of the pack, block after block; None where that is the order they stand in.
        keys: [sum of count x seen] rows whose keys and values each block sees, prompt first; None likewise.
        order: [S] where each row's output stands in the blocks' outputs: the inverse of ``queries``.
    """

    blocks: tuple[Block, ...]
    queries: Tensor | None
    keys: Tensor | None
    order: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        own = [block.count * block.own for block in self.blocks]
        seen = [block.count * block.seen for block in self.blocks]
        # One gather and one split: slicing block by block would cost a pack-sized gradient for each block.
        queries = select(query, self.queries).split(own)
        keys = select(key, self.keys).split(seen)
        values = select(value, self.keys).split(seen)
        outputs = [_attend(*part, scale) for part in zip(self.blocks, queries, keys, values, strict=True)]
        return select(torch.cat(outputs), self.order)


@dataclass(frozen=True)
class SequenceLayout(RankLayout):
    """A pack for kernels of packed sequences, with every piece a sequence as it stands.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1] int32, where each sequence's queries and keys begin, and the end.
        max_seqlen_q, max_seqlen_kv: the longest of them.
        keys: [cu_seqlens_kv's last] rows whose keys and values each piece sees, prompt first; None where that is the
            order they stand in.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    keys: Tensor | None


def block_layout(pieces: Sequence[Piece]) -> BlockLayout:
    """The layout of a whole pack."""
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        prompt = 0 if piece.prompt is None else pieces[piece.prompt].length
        shapes[(prompt, piece.slot)].append(number)
    blocks, queries, keys = [], [], []
    for (prompt_length, own), numbers in shapes.items():
        blocks.append(Block(len(numbers), own, prompt_length + own))
        for number in numbers:
            piece = pieces[number]
            span = np.arange(piece.start, piece.start + own)
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
    """The layout of a whole pack for kernels of packed sequences."""
    queries = [piece.slot for piece in pieces]
    seen, keys = [], []
    for piece in pieces:
        seen.append(piece.slot)
        if piece.prompt is not None:
            prompt = pieces[piece.prompt]
            keys.append(np.arange(prompt.start, prompt.start + prompt.length))
            seen[-1] += prompt.length
        keys.append(np.arange(piece.start, piece.start + piece.slot))
    rows = _rows(np.concatenate(keys), sum(queries))
    return SequenceLayout(_cumulated(queries), _cumulated(seen), max(queries), max(seen), rows)


def _cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _rows(rows: np.ndarray, tokens: int) -> Tensor | None:
    """An index; None for "all rows as they stand", which needs no copy."""
    if rows.size == tokens and np.array_equal(rows, np.arange(rows.size)):
        return None
    return torch.from_numpy(rows)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a tensor by an index of a layout."""
    return x if rows is None else x.index_select(0, rows)


def _attend(block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """A block's outputs, [count x own, heads, head_dim]."""

    def batched(x: Tensor, length: int) -> Tensor:
        return x.view(block.count, length, *x.shape[1:]).transpose(1, 2)

    mask = None
    if block.seen > block.own:
        # Queries are the last `own` of `seen` positions; is_causal would align them with the first.
        mask = _lower_right(block.own, block.seen, query.device)
    out = F.scaled_dot_product_attention(
        batched(query, block.own),
        batched(key, block.seen),
        batched(value, block.seen),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(query.shape)


def _lower_right(own: int, seen: int, device: torch.device) -> Any:
    """A causal mask aligned to the last position. CUDA's flash kernel takes it by name; on CPU the fused kernel
    takes [own, seen] booleans, small because a response is short beside its prompt."""
    if device.type == "cuda":
        return causal_lower_right(own, seen)
    return torch.ones(own, seen, dtype=torch.bool, device=device).tril(seen - own)
