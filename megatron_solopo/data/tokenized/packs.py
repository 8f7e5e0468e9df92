"""Groups laid side by side in one pack (pack.py tells what a pack is)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_solopo.data.tokenized.tokens import Continuation, TokenGroup
from megatron_solopo.pack import Context, Pack, Piece, Segments


def build_pack(
    groups: Sequence[TokenGroup],
    indices: Sequence[int],
    share_prompts: bool = True,
    multiple_of: int = 1,
    piece_multiple_of: int = 1,
    prompt_multiple_of: int | None = None,
) -> Pack:
    """Packs groups; with no group, a pack of padding that has no segment (weight zero).

    Args:
        groups: the groups.
        indices: their indices in the data set.
        share_prompts: False repeats the prompt before each of its continuations.
        multiple_of: the number of tokens is padded up to a multiple of this, itself a multiple of the next.
        piece_multiple_of: each piece is padded up to a multiple of this; context parallelism cuts it so.
        prompt_multiple_of: for pieces that attend to themselves alone (`of_prompts` in batches.py); default: the same.
    """
    builder = _Builder(piece_multiple_of, prompt_multiple_of or piece_multiple_of)
    for number, group in enumerate(groups):
        for prompt in group.prompts:
            if share_prompts:
                piece = builder.add_piece(prompt.ids, 0, None)
                for continuation in prompt.continuations:
                    segment = builder.add_segment(number, prompt.context, continuation)
                    builder.add_continuation(prompt.ids, continuation, piece, segment)
            else:
                for continuation in prompt.continuations:
                    segment = builder.add_segment(number, prompt.context, continuation)
                    builder.add_joined(prompt.ids, continuation, segment)
    size = len(builder.tokens)
    at_the_end = (-size) % multiple_of if size else multiple_of
    if at_the_end:
        builder.add_piece([], 0, None, at_the_end)
        # As the pack begins: FP8 scales a tensor by its largest value, and these tokens compute none of their own.
        builder.tokens[size:] = (builder.tokens[:size] * at_the_end)[:at_the_end] or [0] * at_the_end
    return builder.finish(tuple(indices))


class _Builder:
    """Grows the lists of a pack."""

    def __init__(self, piece_multiple_of: int, prompt_multiple_of: int) -> None:
        self.piece_multiple_of, self.prompt_multiple_of, self.padding = piece_multiple_of, prompt_multiple_of, 0
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.pieces: list[Piece] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.segments: list[int] = []
        self.scored: list[tuple[int, int, int, int, int]] = []

    def add_piece(self, ids: Sequence[int], first_position: int, prompt: int | None, padding: int | None = None) -> int:
        if padding is None:
            padding = -len(ids) % (self.prompt_multiple_of if prompt is None else self.piece_multiple_of)
        piece = Piece(len(self.tokens), len(ids), prompt, padding)
        self.pieces.append(piece)
        self.tokens.extend([*ids, *[0] * padding])
        self.positions.extend(range(first_position, first_position + piece.slot))
        self.padding += padding
        return len(self.pieces) - 1

    def add_segment(self, group: int, context: Context, continuation: Continuation) -> int:
        """Its number."""
        side, response = continuation.side, continuation.response
        self.scored.append((group, context, side, response, continuation.learnt_count))
        return len(self.scored) - 1

    def add_continuation(
        self, prompt_ids: Sequence[int], continuation: Continuation, prompt: int, segment: int
    ) -> None:
        prompt_end = self.pieces[prompt].start + self.pieces[prompt].length - 1
        start = len(self.tokens)
        if len(continuation.ids) > 1:
            self.add_piece(continuation.ids[:-1], len(prompt_ids), prompt)
        self._predict(continuation, lambda k: prompt_end if k == 0 else start + k - 1, segment)

    def add_joined(self, prompt_ids: Sequence[int], continuation: Continuation, segment: int) -> None:
        first = len(self.tokens) + len(prompt_ids)
        self.add_piece([*prompt_ids, *continuation.ids[:-1]], 0, None)
        self._predict(continuation, lambda k: first + k - 1, segment)

    def _predict(self, continuation: Continuation, predictor_of: Callable[[int], int], segment: int) -> None:
        learnt = [k for k in range(len(continuation.ids)) if continuation.learnt is None or continuation.learnt[k]]
        self.predictors.extend(predictor_of(k) for k in learnt)
        self.targets.extend(continuation.ids[k] for k in learnt)
        self.segments.extend([segment] * len(learnt))

    def finish(self, indices: tuple[int, ...]) -> Pack:
        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

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
        )
