"""How layers with a recurrent state compute a pack: sequences in chunks of tokens, and where a state is forked.

A prompt's tokens occur once in a pack. Its state behind the last one is where every response of it starts, and its last
rows are what the causal convolution of a response's first rows reads. So there are two passes: all prompts side by
side, then all responses side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.pack import Piece

CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True)
class RecurrentLayout:
    """The rows of a pack in N chunks, of the prompts and then of the responses.

    In each of the two passes the chunks are ordered by their place in the sequence, the first chunks of all sequences
    first, and the longest sequence first among them. With context parallelism rows are numbered as the ranks' parts
    follow each other, rank 0's first.

    Attributes:
        rows: [N, taps - 1 + CHUNK] int64, the rows of each chunk behind the ``taps - 1`` rows before it, which of a
            response's first chunk are its prompt's last ones.
        present: the same shape, bool; false where there is no row, whose number is then 0.
        places: [S] int64, the place of each row among the N x CHUNK of the chunks; of a padding row that of row 0.
        prompts, responses: how many sequences have a first chunk, a second one and so on.
        forks: [responses] int64, the prompt of each response, in the order of the chunks.
        sequences: [tokens] int64, the places of the prompts' rows and then of the responses', one sequence behind the
            other, for kernels of packed sequences.
        prompt_ends, response_ends: [sequences + 1] int64, where each sequence begins among those of its pass.
        behind: [S] int64, the place of each row in ``sequences``; of a padding row that of row 0.
        response_tokens: how many of ``sequences`` are responses'.
        group: the context-parallel ranks; None: one.
    """

    rows: Tensor
    present: Tensor
    places: Tensor
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    forks: Tensor
    sequences: Tensor
    prompt_ends: Tensor
    response_ends: Tensor
    behind: Tensor
    response_tokens: int
    group: dist.ProcessGroup | None = None

    def in_chunks(self, x: Tensor) -> Tensor:
        """[S, ...] of each row -> [N, CHUNK, ...], zeros where a chunk has no token."""
        rows, present = self.rows[:, -CHUNK:], self.present[:, -CHUNK:]
        chunks = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
        return chunks.masked_fill(~present.view(*rows.shape, *(1,) * (x.dim() - 1)), 0)


def recurrent_layout(
    pieces: Sequence[Piece], taps: int, order: Sequence[np.ndarray], group: dist.ProcessGroup | None = None
) -> RecurrentLayout:
    """Makes the layout of a pack, with tensors on the CPU.

    Args:
        pieces: of the complete pack.
        taps: of the convolution, of which the last is a token's own.
        order: the rows of the pack that each context-parallel rank computes.
        group: of these ranks, where there are several.
    """
    # Padding behind all groups is a sequence too: a pack may hold nothing else.
    lengths = [piece.length or piece.slot for piece in pieces]
    forked = [piece.prompt is not None for piece in pieces]
    longest_first = sorted((n for n, length in enumerate(lengths) if length), key=lambda n: -lengths[n])
    passes = [[n for n in longest_first if forked[n] == responses] for responses in (False, True)]
    counts = [[-(-lengths[n] // CHUNK) for n in sequences] for sequences in passes]
    steps = [tuple(sum(count > step for count in each) for step in range(max(each, default=0))) for each in counts]
    of_chunks = np.stack(
        [
            _chunk(pieces, n, lengths[n], step, taps)
            for sequences, many in zip(passes, steps, strict=True)
            for step, count in enumerate(many)
            for n in sequences[:count]
        ]
    )
    held = np.concatenate(list(order))  # rows of the pack, in the order of the ranks
    number_of = np.empty(len(held), np.int64)
    number_of[held] = np.arange(len(held))
    place = _inverse(of_chunks[:, taps - 1 :].reshape(-1), len(held))
    joined = np.concatenate([pieces[n].start + np.arange(lengths[n]) for sequences in passes for n in sequences])
    prompt_ends, response_ends = (np.cumsum([0, *(lengths[n] for n in sequences)]) for sequences in passes)
    prompts = {n: place for place, n in enumerate(passes[0])}
    return RecurrentLayout(
        rows=torch.from_numpy(np.where(of_chunks < 0, 0, number_of[of_chunks])),
        present=torch.from_numpy(of_chunks >= 0),
        places=torch.from_numpy(place[held]),
        prompts=steps[0],
        responses=steps[1],
        forks=torch.tensor([prompts[cast(int, pieces[n].prompt)] for n in passes[1]], dtype=torch.int64),
        sequences=torch.from_numpy(place[joined]),
        prompt_ends=torch.from_numpy(prompt_ends),
        response_ends=torch.from_numpy(response_ends),
        behind=torch.from_numpy(_inverse(joined, len(held))[held]),
        response_tokens=int(response_ends[-1]),
        group=group,
    )


def _chunk(pieces: Sequence[Piece], number: int, length: int, step: int, taps: int) -> np.ndarray:
    """Returns [taps - 1 + CHUNK] int64, the rows of a sequence's chunk and of the tokens before; -1 for none."""
    piece = pieces[number]
    tokens = np.arange(step * CHUNK - (taps - 1), (step + 1) * CHUNK)
    rows = np.where((tokens >= 0) & (tokens < length), piece.start + tokens, -1)
    if piece.prompt is not None:
        prompt = pieces[piece.prompt]
        before = (tokens < 0) & (tokens >= -prompt.length)
        rows = np.where(before, prompt.start + prompt.length + tokens, rows)
    return rows


def _inverse(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns [size] int64, the place of each row among ``rows``; of one that is not among them that of row 0."""
    places = np.full(size, -1, np.int64)
    real = rows >= 0
    places[rows[real]] = np.nonzero(real)[0]
    return np.where(places < 0, places[0], places)
