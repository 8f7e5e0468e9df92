"""The unit of one forward pass, as it travels from data through the model to the loss.

A pack is a list of pieces. A prompt is a piece that attends causally to itself; a continuation is a piece that
attends to its prompt and causally to itself. A prompt's tokens stand once, however many continuations follow.
Positions are explicit: a prompt counts from 0, each of its continuations from the prompt's length.

The last token of a continuation is predicted and predicts nothing, so it is not computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        segment_groups: [N] int64, the group of each segment, 0..n-1 in this pack.
        segment_roles: the role of each segment ("short_chosen", ...).
        segment_lengths: [N] int64, learnt tokens of each segment.
        groups: the indices of the groups in the data set; empty for a pack that only keeps others company.
        padding: tokens that belong to no group, behind pieces and at the end.
    """

    tokens: Tensor
    positions: Tensor
    pieces: tuple[Piece, ...]
    predictors: Tensor
    targets: Tensor
    segments: Tensor
    segment_groups: Tensor
    segment_roles: tuple[str, ...]
    segment_lengths: Tensor
    groups: tuple[int, ...]
    padding: int

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on a device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Pack(**moved)

    def is_padding(self) -> Tensor:
        """[S] bool: the tokens that belong to no group."""
        mask = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for piece in self.pieces:
            mask[piece.start + piece.length : piece.start + piece.slot] = True
        return mask.to(self.tokens.device)

    def role(self, name: str) -> Tensor:
        """[n] int64: the segment that holds this role in each group, groups in order."""
        places = [i for i, role in enumerate(self.segment_roles) if role == name]
        return torch.tensor(places, dtype=torch.int64, device=self.tokens.device)
