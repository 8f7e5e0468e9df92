"""Attention over a pack: causal in every prompt, each continuation over its prompt and itself.

The S x S score matrix of a pack never exists: pieces are attended one shape at a time through torch's fused scaled
dot product attention.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.pack import Pack


@dataclass(frozen=True)
class Block:
    """Pieces of one shape, attended in one call.

    Attributes:
        queries: [pieces x own] rows of the pack whose queries are used, or a slice where there is one piece.
        keys: [pieces x (prompt + own)] rows whose keys and values are used, prompt first; equal to ``queries``
            for prompts.
        count: pieces.
        own: tokens of each piece.
        seen: tokens each piece attends to, prompt and itself.
    """

    queries: Tensor | slice
    keys: Tensor | slice
    count: int
    own: int
    seen: int


@dataclass
class PackLayout(PackedSeqParams):
    """What every layer needs to know of a pack; travels through megatron-core as its packed sequence parameters.

    Attributes:
        blocks: the attention calls.
        order: [S] where each token's output stands in the concatenated outputs; None if already in order.
        cos, sin: [S, 1, head_dim] of each token's position.
    """

    blocks: tuple[Block, ...] = ()
    order: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def layout_of(pack: Pack, frequencies: RotaryFrequencies, dtype: torch.dtype) -> PackLayout:
    """The layout of a pack, computed once and used by every layer."""
    device = pack.tokens.device
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, piece in enumerate(pack.pieces):
        prompt = 0 if piece.prompt is None else pack.pieces[piece.prompt].length
        shapes[(prompt, piece.length)].append(number)
    blocks, rows = [], []
    for (prompt_length, own), numbers in shapes.items():
        queries, keys = [], []
        for number in numbers:
            piece = pack.pieces[number]
            span = torch.arange(piece.start, piece.start + own)
            queries.append(span)
            if prompt_length:
                start = pack.pieces[piece.prompt].start
                keys.append(torch.cat((torch.arange(start, start + prompt_length), span)))
        rows += queries
        if prompt_length:
            blocks.append(Block(_index(queries, device), _index(keys, device), len(numbers), own, prompt_length + own))
        else:
            index = _index(queries, device)
            blocks.append(Block(index, index, len(numbers), own, own))
    place = torch.cat(rows)
    order = torch.empty_like(place)
    order[place] = torch.arange(place.numel())
    in_order = bool(torch.equal(order, torch.arange(order.numel())))
    cos, sin = frequencies(pack.positions, dtype)
    return PackLayout(qkv_format="thd", blocks=tuple(blocks), order=None if in_order else order.to(device), cos=cos, sin=sin)


def _index(spans: list[Tensor], device: torch.device) -> Tensor | slice:
    """Rows as an index, or as a slice (no copy) where they are one unbroken span."""
    rows = torch.cat(spans)
    first, last = int(rows[0]), int(rows[-1])
    if len(spans) == 1 and last - first + 1 == rows.numel():
        return slice(first, last + 1)
    return rows.to(device)


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, softmax_scale: float | None = None, **ignored: Any) -> None:
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
        outputs = [self._attend(block, query, key, value) for block in layout.blocks]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layout.order is not None:
            output = output.index_select(0, layout.order)
        return output.reshape(query.shape[0], -1)

    def _attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The outputs of a block's pieces, [pieces x own, heads, head_dim]."""

        def split(x: Tensor, rows: Tensor | slice, length: int) -> Tensor:
            return x[rows].view(block.count, length, *x.shape[1:]).transpose(1, 2)

        mask = None
        if block.seen > block.own:
            # Queries are the last `own` of `seen` positions; is_causal would align them with the first.
            mask = _lower_right(block.own, block.seen, query.device)
        out = F.scaled_dot_product_attention(
            split(query, block.queries, block.own),
            split(key, block.keys, block.seen),
            split(value, block.keys, block.seen),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).reshape(block.count * block.own, *query.shape[1:])


def _lower_right(own: int, seen: int, device: torch.device) -> Any:
    """A causal mask aligned to the last position. CUDA's flash kernel takes it by name; on CPU the fused kernel
    takes [own, seen] booleans, small because a response is short beside its prompt."""
    if device.type == "cuda":
        return causal_lower_right(own, seen)
    return torch.ones(own, seen, dtype=torch.bool, device=device).tril(seen - own)
