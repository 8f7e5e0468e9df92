"""The zig-zag: how a pack is sharded over context-parallel ranks.

Every piece is divided into 2 x cp chunks of one length; rank r computes chunk r and chunk 2 cp - 1 - r. In causal
attention later chunks cost more, and an early chunk and its late counterpart together cost every rank the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_solopo.pack import Piece


@dataclass(frozen=True)
class Span:
    """Adjacent queries of this rank over adjacent keys of the complete pack.

    Attributes:
        query, queries: first row on this rank, and number of rows.
        key, keys: first row in the pack, and number of rows.
        causal: whether the keys are the queries' own chunk; otherwise every query attends to every key.
    """

    query: int
    queries: int
    key: int
    keys: int
    causal: bool


def chunk_places(rank: int, size: int) -> tuple[int, int]:
    """Returns the two chunks of every piece that a rank computes."""
    return rank, 2 * size - 1 - rank


def rows_of(pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
    """Returns [S / size] rows of the pack that a rank computes, in its order: piece after piece."""
    return np.concatenate([np.arange(begin, begin + length) for _, begin, length in _chunks(pieces, rank, size)])


def spans_of(pieces: Sequence[Piece], rank: int, size: int) -> tuple[Span, ...]:
    """Returns the spans that a rank's queries attend to.

    A chunk attends to all of the earlier chunks of its piece and to itself causally; a completion's chunks also attend
    to all of its prompt, without the padding after it. The completions of a prompt are adjacent, so one span holds
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
            assert before.query + before.queries == local, "completions of a prompt are adjacent"
            of_prompt[piece.prompt] = Span(before.query, before.queries + length, before.key, before.keys, False)
        local += length
    return (*spans, *of_prompt.values())


def _chunks(pieces: Sequence[Piece], rank: int, size: int) -> Iterator[tuple[Piece, int, int]]:
    """Yields (piece, first row, rows) of each chunk of a rank."""
    for piece in pieces:
        length = piece.slot // (2 * size)
        for place in chunk_places(rank, size):
            yield piece, piece.start + place * length, length
