"""The zig-zag: how a pack is sharded over context-parallel ranks.

Every piece is divided into 2 x cp chunks of one length; rank r computes chunk r and chunk 2 cp - 1 - r. In causal
attention later chunks cost more, and an early chunk and its late counterpart together cost every rank the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_solopo.pack import Piece


def chunk_places(rank: int, size: int) -> tuple[int, int]:
    """Returns the two chunks of every piece that a rank computes."""
    return rank, 2 * size - 1 - rank


def rows_of(pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
    """Returns [S / size] rows of the pack that a rank computes, in its order: piece after piece."""
    return np.concatenate([np.arange(begin, begin + length) for _, begin, length in chunks_of(pieces, rank, size)])


def chunks_of(pieces: Sequence[Piece], rank: int, size: int) -> Iterator[tuple[Piece, int, int]]:
    """Yields (piece, first row, rows) of each chunk of a rank."""
    for piece in pieces:
        length = piece.slot // (2 * size)
        for place in chunk_places(rank, size):
            yield piece, piece.start + place * length, length
