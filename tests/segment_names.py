"""Segments by the names that the oracle and plain-Python formulas use: short_chosen, long_rejected, response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenDataset, TokenGroup
from megatron_solopo.losses import solopo_loss
from megatron_solopo.losses.solopo import (
    aligned_sides,
    needs_log_squares,
    pair_context,
    policy_scores,
    reference_context,
)
from megatron_solopo.losses.terms import GroupLosses
from megatron_solopo.pack import Context, Scored, Segments, Side, segment_name

PAIR = (Side.CHOSEN, Side.REJECTED)
SEGMENTS = {segment_name(context, side): (context, side) for context in Context for side in PAIR}
SEGMENTS["response"] = (Context.SHORT, Side.PLAIN)


def scored(*names: str) -> Scored:
    return frozenset(SEGMENTS[name] for name in names)


def names_of(scored: Scored) -> tuple[str, ...]:
    """Short context first, chosen first."""
    return tuple(segment_name(*one) for one in sorted(scored))


def completion(name: str, ids: Sequence[int], loss_mask: Sequence[bool] | None = None, response: int = 0) -> Completion:
    return Completion(SEGMENTS[name][1], ids, loss_mask, response)


def prompt_of(ids: Sequence[int], responses: Mapping[str, Sequence[int]]) -> Prompt:
    """One response of each name, all on the same context."""
    (context,) = {SEGMENTS[name][0] for name in responses}
    return Prompt(context, ids, tuple(completion(name, each) for name, each in responses.items()))


def only(dataset: TokenDataset, scored: Scored) -> TokenDataset:
    """The same examples with these segments only."""
    return TokenDataset([group.only(scored) for group in dataset.groups], [], "")


def names_in(group: TokenGroup) -> list[str]:
    return [segment_name(context, c.side, c.response) for context, c in group.segments()]


def loss_by_name(
    log_probs: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    method: MethodConfig,
    mean_chosen_length: Tensor | None = None,
    squares: Mapping[str, Tensor] | None = None,
) -> GroupLosses:
    """`solopo_loss` of groups with one response of each name: name -> [groups].

    ``squares``: the log_squares; by default those of a distribution with half a nat of collision entropy a token.
    """
    if squares is None:
        squares = {name: -each / 2 for name, each in lengths.items()}
    wanted = sorted(policy_scores(method))
    names = [segment_name(*one) for one in wanted]
    compared = [segment_name(reference_context(context, method), side) for context, side in wanted]
    count = len(log_probs[names[0]])
    segments = Segments.of([(group, *one, 0, 1) for group in range(count) for one in wanted], count)
    stacked = torch.stack([lengths[name] for name in names], 1).flatten().long()
    segments = Segments(**{**vars(segments), "lengths": stacked})
    return solopo_loss(
        torch.stack([log_probs[name] for name in names], 1).flatten(),
        segments,
        segments.pairs(pair_context(method)),
        segments.alignments(aligned_sides(method)),
        None if reference is None else torch.stack([reference[name] for name in compared], 1).flatten(),
        method,
        mean_chosen_length,
        torch.stack([squares[name] for name in names], 1).flatten() if needs_log_squares(method) else None,
    )
