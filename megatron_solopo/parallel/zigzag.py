"""The zig-zag: how a pack is cut over context-parallel ranks.

Every piece stands in 2 x cp chunks of one length; rank r computes chunk r and chunk 2 cp - 1 - r (zig-zag). Causal
attention costs a chunk the more the later it stands, and an early chunk with its late mate costs every rank the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_solopo.pack import Piece


@dataclass(frozen=True)
class Span:
    """Queries that stand side by side on this rank, over keys that stand side by side in the whole pack.

    Attributes:
        query, queries: first row on this rank, and how many.
        key, keys: first row in the pack, and how many.
        causal: the keys are the queries' own chunk; otherwise every query sees every key.
    """

    query: int
    queries: int
    key: int
    keys: int
    causal: bool


def chunk_places(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of every piece that a rank computes."""
    return rank, 2 * size - 1 - rank


def rows_of(pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
    """[S / size] the rows of the pack that a rank computes, in its order: piece after piece."""
    return np.concatenate([np.arange(begin, begin + length) for _, begin, length in _chunks(pieces, rank, size)])


def spans_of(pieces: Sequence[Piece], rank: int, size: int) -> tuple[Span, ...]:
    """What a rank's queries attend to.

    A chunk sees the earlier chunks of its piece whole and itself causally; a continuation's chunks also see all of
    its prompt, without the padding behind it. The continuations of a prompt stand side by side, so one span holds
    them all.
    """
    spans: list[Span] = []
    of_prompt: dict[int, Span] = {}
    local = 0
    for piece, begin, length in _chunks(pieces, rank, size):
        if begin > piece.start:
            spans.append(Span(local, length, piece.start, begin - piece.start, causal=False))
        spans.append(Span(local, length, begin, length, causal=True))
        if piece.prompt is not None:
            prompt = pieces[piece.prompt]
            before = of_prompt.get(piece.prompt, Span(local, 0, prompt.start, prompt.length, causal=False))
            assert before.query + before.queries == local, "continuations of a prompt stand side by side"
            of_prompt[piece.prompt] = Span(before.query, before.queries + length, before.key, before.keys, False)
        local += length
    return (*spans, *of_prompt.values())


def _chunks(pieces: Sequence[Piece], rank: int, size: int) -> Iterator[tuple[Piece, int, int]]:
    """(piece, first row, rows) of each chunk of a rank."""
    for piece in pieces:
        length = piece.slot // (2 * size)
        for place in chunk_places(rank, size):
            yield piece, piece.start + place * length, length
