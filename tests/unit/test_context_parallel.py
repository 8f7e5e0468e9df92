"""Packs cut over context-parallel ranks: who computes which rows, what they see, and attention by log-sum-exps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Pack, Side
from megatron_solopo.parallel.spans import SpanLayout, span_attention
from megatron_solopo.parallel.zigzag import rows_of, spans_of


def draw_pack(seed: int, size: int, share: bool = True) -> Pack:
    """Groups of very different lengths, completions of one token among them (which have no row)."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(50) for _ in range(draw.randint(1, most))]

    groups = [
        TokenGroup(
            f"g{number}",
            tuple(
                Prompt(context, ids(most), tuple(Completion(side, ids(9)) for side in (Side.CHOSEN, Side.REJECTED)))
                for context, most in ((Context.SHORT, 10), (Context.LONG, 40))
            ),
        )
        for number in range(draw.randint(1, 3))
    ]
    return build_pack(groups, range(len(groups)), share, 6 * size, 2 * size)


def visible(pack: Pack) -> np.ndarray:
    """[S, S] what each row of the pack attends to; of rows of padding only themselves and earlier ones."""
    seen = np.zeros((len(pack.tokens), len(pack.tokens)), dtype=bool)
    for piece in pack.pieces:
        span = slice(piece.start, piece.start + piece.slot)
        seen[span, span] = np.tril(np.ones((piece.slot, piece.slot), dtype=bool))
        if piece.prompt is not None:
            prompt = pack.pieces[piece.prompt]
            seen[span, prompt.start : prompt.start + prompt.length] = True
    return seen


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_share_the_rows_and_see_what_the_pack_sees(seed: int, size: int, share: bool) -> None:
    pack = draw_pack(seed, size, share)
    wanted, rows, work = visible(pack), [rows_of(pack.pieces, rank, size) for rank in range(size)], []
    assert sorted(np.concatenate(rows)) == list(range(len(pack.tokens)))
    for rank in range(size):
        seen = np.zeros((len(rows[rank]), len(pack.tokens)), dtype=int)
        for span in spans_of(pack.pieces, rank, size):
            block = np.ones((span.queries, span.keys), dtype=int)
            seen[span.query : span.query + span.queries, span.key : span.key + span.keys] += (
                np.tril(block) if span.causal else block
            )
        assert (seen == wanted[rows[rank]]).all()  # and nothing twice
        work.append(seen.sum())
    assert max(work) == min(work)  # zig-zag: every rank attends to the same number of pairs


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention with the whole score matrix."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("shd,thd->hst", query, key) * 0.7
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_by_spans_is_attention(dtype: Any, bound: float, heads: int, kv_heads: int, size: int) -> None:
    """Output of every rank's rows, and the gradients that the ranks' parts add up to, relative to their norms."""
    pack = draw_pack(11, size)
    count, generator = len(pack.tokens), torch.Generator().manual_seed(0)
    seen = torch.from_numpy(visible(pack))
    query, key, value, weight = (
        torch.randn(count, n, 16, dtype=torch.float64, generator=generator).to(dtype).double()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    whole = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = dense(*whole, seen)
    (expected * weight).sum().backward()
    ours = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    for rank in range(size):
        rows = torch.from_numpy(rows_of(pack.pieces, rank, size))
        everything = torch.arange(count)
        layout = SpanLayout(spans_of(pack.pieces, rank, size), everything, everything, None)
        attended = span_attention(ours[0][rows], ours[1], ours[2], layout, 0.7)
        assert (attended.double() - expected[rows]).norm() <= bound * expected[rows].norm()
        (attended * weight[rows].to(dtype)).sum().backward()
    for mine, theirs in zip(ours, whole, strict=True):
        assert (mine.grad.double() - theirs.grad).norm() <= bound * theirs.grad.norm()
