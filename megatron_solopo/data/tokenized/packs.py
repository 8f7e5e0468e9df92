"""Groups laid side by side in one pack (pack.py defines a pack)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Pack, Piece, Segments


def build_pack(
    groups: Sequence[TokenGroup],
    indices: Sequence[int],
    share_prompts: bool = True,
    multiple_of: int = 1,
    piece_multiple_of: int = 1,
    prompt_multiple_of: int | None = None,
    tail_weight: float = 1.0,
) -> Pack:
    """Packs groups; with no group, a pack of padding that has no segment (weight zero).

    Args:
        groups: the groups.
        indices: their indices in the data set.
        share_prompts: False repeats the prompt before each of its completions.
        multiple_of: the number of tokens is padded up to a multiple of this, itself a multiple of the next.
        piece_multiple_of: each piece is padded up to a multiple of this; context parallelism cuts it so.
        prompt_multiple_of: for pieces that attend to themselves alone (`of_prompts` in batches.py); default: the same.
        tail_weight: see `PreferenceLoss.tail_weight`.
    """
    builder = _Builder(piece_multiple_of, prompt_multiple_of or piece_multiple_of, tail_weight)
    for number, group in enumerate(groups):
        builder.shortest = group.shortest_response if tail_weight != 1 else 0
        for prompt in group.prompts:
            ids, positions = np.asarray(prompt.ids), prompt.positions()
            piece = builder.add_piece(ids, positions=positions) if share_prompts else None
            for completion in prompt.completions:
                segment = builder.add_segment(number, prompt.context, completion)
                if piece is not None:
                    builder.add_completion(prompt, completion, piece, segment)
                else:
                    builder.add_joined(ids, positions, completion, segment)
    at_the_end = (-builder.size) % multiple_of if builder.size else multiple_of
    if at_the_end:
        builder.add_padding(at_the_end)
    return builder.finish(tuple(indices))


_NONE = np.zeros(0, np.int64)


class _Builder:
    """Grows the arrays of a pack."""

    def __init__(self, piece_multiple_of: int, prompt_multiple_of: int, tail_weight: float) -> None:
        self.piece_multiple_of, self.prompt_multiple_of = piece_multiple_of, prompt_multiple_of
        self.padding = self.size = self.shortest = 0
        self.tail_weight, self.weights = tail_weight, [np.zeros(0)]
        self.tokens, self.positions, self.predictors, self.targets, self.segments = ([_NONE] for _ in range(5))
        self.pieces: list[Piece] = []
        self.scored: list[tuple[int, int, int, int, int]] = []

    def add_piece(
        self, *ids: np.ndarray, positions: np.ndarray = _NONE, first: int = 0, prompt: int | None = None
    ) -> int:
        """Returns the number of a piece of these ids one behind the other.

        Args:
            positions: of the first ids; those behind count on from the last of them, or from ``first`` without any.
        """
        length = sum(map(len, ids))
        padding = -length % (self.prompt_multiple_of if prompt is None else self.piece_multiple_of)
        after = int(positions[-1]) + 1 if len(positions) else first
        self.positions.append(positions)
        self._add(Piece(self.size, length, prompt, padding), [*ids, np.zeros(padding, np.int32)], after, len(positions))
        return len(self.pieces) - 1

    def add_padding(self, count: int) -> None:
        """A piece of padding alone, behind all others."""
        # Repeats the pack's first tokens: FP8 scales a tensor by its largest value, which these then never change.
        tokens = np.resize(np.concatenate(self.tokens), count) if self.size else np.zeros(count, np.int32)
        self._add(Piece(self.size, 0, None, count), [tokens], 0)

    def _add(self, piece: Piece, tokens: list[np.ndarray], first: int, placed: int = 0) -> None:
        """Adds a piece; positions of its tokens behind the ``placed`` first ones count from ``first``."""
        self.pieces.append(piece)
        self.tokens += tokens
        self.positions.append(np.arange(first, first + piece.slot - placed))
        self.padding += piece.padding
        self.size += piece.slot

    def add_segment(self, group: int, context: Context, completion: Completion) -> int:
        """Adds a scored completion; returns its number."""
        side, response = completion.side, completion.response
        self.scored.append((group, context, side, response, completion.trained_tokens))
        return len(self.scored) - 1

    def add_completion(self, prompt: Prompt, completion: Completion, piece: int, segment: int) -> None:
        """A completion of the prompt that is this piece."""
        ids, prompt_end = np.asarray(completion.ids), self.pieces[piece].start + len(prompt.ids) - 1
        predictors = np.arange(self.size - 1, self.size - 1 + len(ids))
        predictors[0] = prompt_end
        if len(ids) > 1:
            self.add_piece(ids[:-1], first=prompt.end, prompt=piece)
        self._predict(completion, ids, predictors, segment)

    def add_joined(self, prompt: np.ndarray, positions: np.ndarray, completion: Completion, segment: int) -> None:
        """A prompt, with its positions, and its completion as one piece."""
        ids, start = np.asarray(completion.ids), self.size + len(prompt)
        self.add_piece(prompt, ids[:-1], positions=positions)
        self._predict(completion, ids, np.arange(start - 1, start - 1 + len(ids)), segment)

    def _predict(self, completion: Completion, ids: np.ndarray, predictors: np.ndarray, segment: int) -> None:
        trained = slice(None) if completion.loss_mask is None else np.asarray(completion.loss_mask)
        self.predictors.append(predictors[trained])
        self.targets.append(ids[trained])
        count = len(self.targets[-1])
        self.segments.append(np.full(count, segment))
        if self.tail_weight != 1:
            self.weights.append(np.where(np.arange(count) < self.shortest, 1.0, self.tail_weight))

    def finish(self, indices: tuple[int, ...]) -> Pack:
        def integers(parts: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts, dtype=np.int64))

        return Pack(
            integers(self.tokens),
            integers(self.positions),
            tuple(self.pieces),
            integers(self.predictors),
            integers(self.targets),
            integers(self.segments),
            Segments.of(self.scored, len(indices)),
            indices,
            self.padding,
            torch.from_numpy(np.concatenate(self.weights)) if self.tail_weight != 1 else None,
        )
