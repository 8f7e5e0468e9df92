"""Attention over a pack: causal in every prompt, each continuation over its prompt and itself.

The S x S score matrix of a pack never exists: pieces are attended one shape at a time through torch's fused scaled
dot product attention.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.model.context_attention import SpanLayout, span_attention
from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.context import rows_of, spans_of


@dataclass(frozen=True)
class Block:
    """Pieces of one shape, attended in one call: ``count`` pieces of ``own`` tokens that see ``seen`` tokens,
    their prompt's and their own."""

    count: int
    own: int
    seen: int


@dataclass
class PackLayout(PackedSeqParams):
    """What every layer needs to know of a pack; travels through megatron-core as its packed sequence parameters.

    Transformer Engine reads megatron-core's own fields (cumulated lengths) and ``keys``; the portable attention reads
    the rest.

    Attributes:
        blocks: the attention calls.
        queries: [S] rows of the pack, block after block; None where that is the order they stand in.
        keys: [sum of count x seen] rows whose keys and values each block (in Transformer Engine's layout, each piece)
            sees, prompt first; None likewise.
        order: [S] where each row's output stands in the blocks' outputs: the inverse of ``queries``.
        cos, sin: [S, 1, head_dim] of each token's position.
        context: the attention of a pack that is spread over context-parallel ranks, in place of blocks; all above
            then speaks of this rank's rows.
    """

    blocks: tuple[Block, ...] = ()
    queries: Tensor | None = None
    keys: Tensor | None = None
    order: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    context: SpanLayout | None = None


def layout_of(pack: Pack, frequencies: RotaryFrequencies, dtype: torch.dtype) -> PackLayout:
    """The layout of a pack, computed once and used by every layer."""
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, piece in enumerate(pack.pieces):
        prompt = 0 if piece.prompt is None else pack.pieces[piece.prompt].length
        shapes[(prompt, piece.slot)].append(number)
    blocks, queries, keys = [], [], []
    for (prompt_length, own), numbers in shapes.items():
        blocks.append(Block(len(numbers), own, prompt_length + own))
        for number in numbers:
            piece = pack.pieces[number]
            span = np.arange(piece.start, piece.start + own)
            queries.append(span)
            if piece.prompt is not None:
                start = pack.pieces[piece.prompt].start
                keys.append(np.arange(start, start + prompt_length))
            keys.append(span)
    query_rows, key_rows = np.concatenate(queries), np.concatenate(keys)
    cos, sin = frequencies(pack.positions, dtype)
    return PackLayout(
        qkv_format="thd",
        blocks=tuple(blocks),
        queries=_rows(query_rows, pack.tokens),
        keys=_rows(key_rows, pack.tokens),
        order=_rows(np.argsort(query_rows), pack.tokens),
        cos=cos,
        sin=sin,
    )


def sequences_layout(pack: Pack, frequencies: RotaryFrequencies, dtype: torch.dtype) -> PackLayout:
    """The layout of a pack for kernels of packed sequences, with every piece a sequence as it stands."""
    queries = [piece.slot for piece in pack.pieces]
    seen, keys = [], []
    for piece in pack.pieces:
        if piece.prompt is not None:
            prompt = pack.pieces[piece.prompt]
            keys.append(np.arange(prompt.start, prompt.start + prompt.length))
        keys.append(np.arange(piece.start, piece.start + piece.slot))
        seen.append(piece.slot + (0 if piece.prompt is None else prompt.length))
    cos, sin = frequencies(pack.positions, dtype)
    return PackLayout(
        qkv_format="thd",
        cu_seqlens_q=_cumulated(queries, pack.tokens),
        cu_seqlens_kv=_cumulated(seen, pack.tokens),
        max_seqlen_q=max(queries),
        max_seqlen_kv=max(seen),
        keys=_rows(np.concatenate(keys), pack.tokens),
        cos=cos,
        sin=sin,
    )


def _cumulated(lengths: list[int], tokens: Tensor) -> Tensor:
    """[sequences + 1] int32: where each sequence begins, and the end."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=tokens.device)


def split_sequences_layout(
    pack: Pack, frequencies: RotaryFrequencies, dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[PackLayout, Tensor]:
    """As `sequences_layout` for a rank's part of a pack without continuations, and [S / cp] the rows it computes.

    Transformer Engine takes the lengths of the whole pack and divides them itself.
    """
    layout = sequences_layout(pack, frequencies, dtype)
    if layout.keys is not None:
        raise ValueError("Transformer Engine's context parallelism has no shared prompts")
    own = torch.from_numpy(rows_of(pack.pieces, dist.get_rank(group), dist.get_world_size(group)))
    own = own.to(pack.tokens.device)
    return dataclasses.replace(layout, cos=layout.cos[own], sin=layout.sin[own]), own


def split_layout(
    pack: Pack, frequencies: RotaryFrequencies, dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[PackLayout, Tensor]:
    """The layout of a rank's part of a pack, and [S / cp] the rows of the pack that it computes."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered = np.concatenate([rows_of(pack.pieces, other, size) for other in range(size)])
    device = pack.tokens.device
    gathered_rows = torch.from_numpy(gathered).to(device)
    own = gathered_rows.view(size, -1)[rank]
    cos, sin = frequencies(pack.positions[own], dtype)
    context = SpanLayout(
        spans_of(pack.pieces, rank, size), gathered_rows, torch.from_numpy(np.argsort(gathered)).to(device), group
    )
    return PackLayout(qkv_format="thd", cos=cos, sin=sin, context=context), own


def _rows(rows: np.ndarray, tokens: Tensor) -> Tensor | None:
    """An index on the pack's device; None for "all rows as they stand", which needs no copy."""
    if rows.size == tokens.numel() and np.array_equal(rows, np.arange(rows.size)):
        return None
    return torch.from_numpy(rows).to(tokens.device)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a tensor by an index of `PackLayout`."""
    return x if rows is None else x.index_select(0, rows)


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> Tensor:
        """query [S, heads, head_dim], key and value [S, kv_heads, head_dim] before RoPE -> [S, heads x head_dim]."""
        layout = packed_seq_params
        query, key = rotate(query, layout.cos, layout.sin), rotate(key, layout.cos, layout.sin)
        if layout.context is not None:
            return span_attention(query, key, value, layout.context, self.softmax_scale).flatten(1)
        own = [block.count * block.own for block in layout.blocks]
        seen = [block.count * block.seen for block in layout.blocks]
        # One gather and one split: slicing block by block would cost a pack-sized gradient for each block.
        queries = select(query, layout.queries).split(own)
        keys = select(key, layout.keys).split(seen)
        values = select(value, layout.keys).split(seen)
        outputs = [self._attend(*part) for part in zip(layout.blocks, queries, keys, values, strict=True)]
        output = select(torch.cat(outputs), layout.order)
        return output.reshape(query.shape[0], -1)

    def _attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).reshape(query.shape)


def _lower_right(own: int, seen: int, device: torch.device) -> Any:
    """A causal mask aligned to the last position. CUDA's flash kernel takes it by name; on CPU the fused kernel
    takes [own, seen] booleans, small because a response is short beside its prompt."""
    if device.type == "cuda":
        return causal_lower_right(own, seen)
    return torch.ones(own, seen, dtype=torch.bool, device=device).tril(seen - own)
