"""The unit of one forward pass, as it travels from data through the model to the loss.

A pack is a list of pieces. A prompt is a piece that attends causally to itself; a continuation is a piece that
attends to its prompt and causally to itself. A prompt's tokens stand once, however many continuations follow.
Positions are explicit: a prompt counts from 0, each of its continuations from the prompt's length.

The last token of a continuation is predicted and predicts nothing, so it is not computed.
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
    """What a response is: a side of a preference pair, or the PLAIN response of a conversation."""

    CHOSEN = 0
    REJECTED = 1
    PLAIN = 2


Scored = frozenset[tuple[Context, Side]]
"""What a method scores of each group: all responses of these sides after these prompts."""


def segment_name(context: int, side: int, response: int = 0) -> str:
    """``short_chosen``, ``long_rejected`` or ``response``; further responses of a side are numbered from 1.

    For people, and part of the fingerprint of a data set; nothing reads it back.
    """
    name = "response" if side == Side.PLAIN else f"{Context(context).name}_{Side(side).name}".lower()
    return f"{name}_{response}" if response else name


def names_of_scored(scored: Scored) -> str:
    """``short_chosen, short_rejected, long_chosen``."""
    return ", ".join(segment_name(context, side) for context, side in sorted(scored))


@dataclass(frozen=True)
class Segments:
    """N scored continuations of n groups.

    Attributes:
        groups: [N] int64, the group of each segment, 0..n-1.
        contexts: [N] int64, its `Context`.
        sides: [N] int64, its `Side`.
        responses: [N] int64, which response of its side in its group; short and long segments of one response agree.
        lengths: [N] int64, its learnt tokens.
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
        """From (group, context, side, response, length) rows."""
        table = torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 5)
        groups, contexts, sides, responses, lengths = table.unbind(1)
        return cls(groups, contexts, sides, responses, lengths, group_count)

    def __len__(self) -> int:
        return len(self.groups)

    def to(self, device: torch.device) -> Segments:
        """The same segments with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def pairs(self, context: Context) -> Tensor:
        """[P, 2] int64 (chosen segment, rejected segment): every pair of a group on this context. Waits for the device.

        Raises:
            ValueError: a group has no pair.
        """
        chosen, rejected = (self._where(context, side) for side in (Side.CHOSEN, Side.REJECTED))
        pairs = (chosen[:, None] & rejected & (self.groups[:, None] == self.groups)).nonzero()
        if len(self.groups[pairs[:, 0]].unique()) < self.group_count:
            raise ValueError(f"a group has no pair of a chosen and a rejected response on the {context.name} context")
        return pairs

    def alignments(self, sides: Sequence[Side]) -> Tensor:
        """[A, 2] int64 (short segment, long segment) of each response of these sides. Waits for the device.

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
class Piece:
    """``length`` tokens of the pack from ``start``, then ``padding`` that nothing else sees; ``prompt`` is the index of
    the piece it continues, if any. Padding behind all groups is a piece of no length."""

    start: int
    length: int
    prompt: int | None = None
    padding: int = 0

    @property
    def slot(self) -> int:
        """Tokens with padding."""
        return self.length + self.padding


@dataclass(frozen=True)
class Pack:
    """One forward pass: S tokens, R predicted tokens, N segments (scored continuations), n groups.

    Attributes:
        tokens: [S] int64 token ids.
        positions: [S] int64, the position of each token in its own sequence.
        pieces: the attention layout.
        predictors: [R] int64, the place in the pack whose hidden state predicts a learnt token.
        targets: [R] int64, that token.
        segments: [R] int64, the segment it belongs to.
        scored: what each segment is; its tensors stay on the CPU, where indices are made of them without waiting for
            the device.
        groups: the indices of the groups in the data set; empty for a pack that only keeps others company.
        padding: tokens that belong to no group, behind pieces and at the end.
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

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def is_padding(self) -> Tensor:
        """[S] bool: the tokens that belong to no group."""
        mask = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for piece in self.pieces:
            mask[piece.start + piece.length : piece.start + piece.slot] = True
        return mask.to(self.tokens.device)
