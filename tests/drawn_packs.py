"""Packs of drawn lengths, and what each of their rows attends to."""

from __future__ import annotations

import random

import numpy as np

from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Pack, Side


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


def visible(pack: Pack, window: int | None = None) -> np.ndarray:
    """[S, S] what each row of the pack attends to; of rows of padding only themselves and earlier ones.

    ``window``: tokens that a row attends to at most, itself and those before it in its sequence.
    """
    seen = np.zeros((len(pack.tokens), len(pack.tokens)), dtype=bool)
    for piece in pack.pieces:
        span, before = slice(piece.start, piece.start + piece.slot), 0
        if piece.prompt is not None:
            prompt = pack.pieces[piece.prompt]
            before = prompt.length
        places = before + np.arange(piece.slot)
        distances = places[:, None] - np.arange(before + piece.slot)
        reached = (distances >= 0) & (distances < (window or len(pack.tokens)))
        seen[span, span] = reached[:, before:]
        if before:
            seen[span, prompt.start : prompt.start + before] = reached[:, :before]
    return seen
