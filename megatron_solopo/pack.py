"""The unit of one forward pass, used by data, model and loss.

A pack is a list of pieces. A prompt is a piece that attends causally to itself; a completion is a piece that attends to
its prompt and causally to itself. A prompt's tokens occur once, however many completions follow. Positions are
explicit: a prompt counts from 0 (with jumps where it is stretched, see data/tokenized/stretch.py), each of its
completions from the position after the prompt's last.

The last token of a completion is predicted and predicts nothing, so it is not in the pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Context(IntEnum):
    """Which prompt of its group a response follows; a conversation has one prompt, SHORT."""

    SHORT = 0
    LONG = 1


class Side(IntEnum):
    """The role of a response: a side of a preference pair, or the PLAIN response of a conversation."""

    CHOSEN = 0
    REJECTED = 1
    PLAIN = 2


Scored = frozenset[tuple[Context, Side]]
"""The responses of each group that a method scores: all responses of these sides after these prompts."""


def segment_name(context: int, side: int, response: int = 0) -> str:
    """Returns ``short_chosen``, ``long_rejected`` or ``response``; further responses of a side are numbered from 1.

    The name is shown to users and is part of a data set's fingerprint; it is not parsed.
    """
    name = "response" if side == Side.PLAIN else f"{Context(context).name}_{Side(side).name}".lower()
    return f"{name}_{response}" if response else name


def names_of_scored(scored: Scored) -> str:
    """Returns the names in a line: ``short_chosen, short_rejected, long_chosen``."""
    return ", ".join(segment_name(context, side) for context, side in sorted(scored))


@dataclass(frozen=True)
class Segments:
    """N scored completions of n groups.

    Attributes:
        groups: [N] int64, the group of each segment, 0..n-1.
        contexts: [N] int64, `Context` of each segment.
        sides: [N] int64, `Side` of each segment.
        responses: [N] int64, index of the response among those of its side and group; the same on both contexts.
        lengths: [N] int64, number of trained tokens of each segment.
        group_count: n.
    """

    groups: Tensor
    contexts: Tensor
    sides: Tensor
    responses: Tensor
    lengths: Tensor
    group_count: int

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int, int, int]], group_count: int) -> Segments:
        """Makes segments of (group, context, side, response, length) rows."""
        table = torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 5)
        groups, contexts, sides, responses, lengths = table.unbind(1)
        return cls(groups, contexts, sides, responses, lengths, group_count)

    def __len__(self) -> int:
        return len(self.groups)

    def to(self, device: torch.device) -> Segments:
        """Returns the segments with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def pairs(self, context: Context) -> Tensor:
        """Returns [P, 2] int64 (chosen segment, rejected segment) of every pair of a group on this context.

        Synchronizes with the device.

        Raises:
            ValueError: a group has no pair.
        """
        chosen, rejected = (self._where(context, side) for side in (Side.CHOSEN, Side.REJECTED))
        pairs = (chosen[:, None] & rejected & (self.groups[:, None] == self.groups)).nonzero()
        if len(self.groups[pairs[:, 0]].unique()) < self.group_count:
            raise ValueError(f"a group has no pair of a chosen and a rejected response on the {context.name} context")
        return pairs

    def alignments(self, sides: Sequence[Side]) -> Tensor:
        """Returns [A, 2] int64 (short segment, long segment) of each response of these sides.

        Synchronizes with the device.

        Raises:
            ValueError: a response is scored on one of the two contexts only.
        """
        rows = [self.groups.new_zeros(0, 2)]
        same = (self.groups[:, None] == self.groups) & (self.responses[:, None] == self.responses)
        for side in sides:
            short, long = (self._where(context, side) for context in (Context.SHORT, Context.LONG))
            rows.append((short[:, None] & long & same).nonzero())
            if not len(rows[-1]) == short.sum() == long.sum():
                raise ValueError(f"a {side.name} response is not scored on both contexts, and cannot be aligned")
        return torch.cat(rows)

    def _where(self, context: Context, side: Side) -> Tensor:
        return (self.contexts == context) & (self.sides == side)


@dataclass(frozen=True)
class Windows:
    """The windows of a model's layers.

    Attributes:
        size: tokens that a token attends to at most, itself and those before it, in a layer with a window.
        share: of the layers that have one.
    """

    size: int = 0
    share: float = 0.0

    def pairs(self, length: float, before: float) -> float:
        """Returns the pairs of tokens that attend, of ``length`` tokens behind ``before`` that they attend to, a token
        and itself being half a pair; the mean over the layers."""

        def up_to(tokens: float) -> float:
            """Pairs of the first tokens of a sequence, with a window."""
            return min(tokens, self.size) ** 2 / 2 + max(0, tokens - self.size) * self.size

        full = length * before + length * length / 2
        if not self.share:
            return full
        return (1 - self.share) * full + self.share * (up_to(before + length) - up_to(before))


@dataclass(frozen=True)
class Piece:
    """A prompt or a completion in a pack.

    Attributes:
        start: first row in the pack.
        length: number of tokens.
        prompt: index of the piece that it completes, or None for a prompt.
        padding: padding tokens after it, which nothing else attends to. Padding after all groups is a piece of
            length 0.
    """

    start: int
    length: int
    prompt: int | None = None
    padding: int = 0

    @property
    def slot(self) -> int:
        """Number of tokens with padding."""
        return self.length + self.padding


@dataclass(frozen=True)
class Pack:
    """One forward pass: S tokens, R predicted tokens, N segments (scored completions), n groups.

    Attributes:
        tokens: [S] int64 token ids.
        positions: [S] int64, the position of each token in its sequence.
        pieces: the attention layout.
        predictors: [R] int64, the row of the pack whose hidden state predicts a trained token.
        targets: [R] int64, the id of that token.
        segments: [R] int64, the segment of that token.
        scored: the segments; their tensors stay on the CPU, where indices are computed without waiting for the device.
        groups: indices of the groups in the data set; empty for a pack that only equalizes the number of packs.
        padding: number of tokens that belong to no group, after pieces and at the end.
        weights: [R] float64, the weight of each trained token in its segment's sum; None: all are 1.
    """

    tokens: Tensor
    positions: Tensor
    pieces: tuple[Piece, ...]
    predictors: Tensor
    targets: Tensor
    segments: Tensor
    scored: Segments
    groups: tuple[int, ...]
    padding: int
    weights: Tensor | None = None

    def to(self, device: torch.device) -> Pack:
        """Returns the pack with its tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prompt, or a prompt and one of its completions."""
        prompts = (0 if piece.prompt is None else self.pieces[piece.prompt].length for piece in self.pieces)
        return max(before + piece.length for before, piece in zip(prompts, self.pieces, strict=True))

    def is_padding(self) -> Tensor:
        """Returns [S] bool, true for tokens that belong to no group."""
        mask = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for piece in self.pieces:
            mask[piece.start + piece.length : piece.start + piece.slot] = True
        return mask.to(self.tokens.device)
