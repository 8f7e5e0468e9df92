"""The loss of a pack's groups from its segment sums, and what the loss needs to know of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.losses.sft import sft_loss
from megatron_solopo.losses.solopo import (
    aligned_sides,
    needs_mean_chosen_length,
    pair_context,
    policy_scores,
    reference_context,
    solopo_loss,
)
from megatron_solopo.losses.terms import GroupLosses
from megatron_solopo.pack import Context, Pack, Segments, Side
from megatron_solopo.parallel.device_pack import on_device
from megatron_solopo.training.segment_table import ReferenceLogProbs


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a pack reads beside its segment sums, on the device; see `solopo_loss`.

    Made on the host before the step: indices by value would make the host wait for the device in every pack.

    Attributes:
        groups: the indices of the pack's groups in the data set.
        compared: [N] float64 log-probs of the reference, or None.
    """

    groups: tuple[int, ...]
    segments: Segments
    pairs: Tensor
    alignments: Tensor
    compared: Tensor | None


def loss_inputs(
    pack: Pack, reference: ReferenceLogProbs | None, method: MethodConfig, device: torch.device
) -> LossInputs:
    """Those of a pack, whose ``scored`` is on the host.

    Args:
        reference: log-probs of the whole data set, or None.
    """
    scored = pack.scored
    pairs = alignments = torch.zeros(0, 2, dtype=torch.int64)
    compared = None
    if method.objective == "preference":
        pairs, alignments = scored.pairs(pair_context(method)), scored.alignments(aligned_sides(method))
    if reference is not None:
        compared = reference.of_pack(pack, [reference_context(context, method) for context in Context])
    return on_device(LossInputs(pack.groups, scored, pairs, alignments, compared), device)


@dataclass(frozen=True)
class StepInputs:
    """`LossInputs` of this process's packs of a step, and the names of what the loss measures."""

    packs: list[LossInputs]
    names: tuple[str, ...]


def step_inputs(
    packs: Sequence[Pack], reference: ReferenceLogProbs | None, method: MethodConfig, device: torch.device
) -> StepInputs:
    """What `run_parts` reads beside the packs; see `loss_inputs`."""
    return StepInputs([loss_inputs(pack, reference, method, device) for pack in packs], metric_names(method))


def group_losses(
    sums: Tensor, inputs: LossInputs, method: MethodConfig, mean_length: Tensor | None = None
) -> GroupLosses:
    """The losses of a pack's groups.

    Args:
        sums: [N] segment log-probs.
        mean_length: [] the mean chosen length, see `solopo_loss`.
    """
    if method.objective == "sft":
        return sft_loss(sums, inputs.segments)
    compared = None if inputs.compared is None else inputs.compared.to(sums.dtype)
    return solopo_loss(sums, inputs.segments, inputs.pairs, inputs.alignments, compared, method, mean_length)


def mean_chosen_length(packs: list[Pack], total_groups: int, method: MethodConfig, device: torch.device) -> Tensor:
    """[] float64, the mean over all groups of the step of their chosen responses' mean length, in tokens, on the
    preference loss's context."""
    tokens = torch.tensor(
        sum(_chosen_length(pack.scored, pair_context(method)) for pack in packs), dtype=torch.float64, device=device
    )
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    return tokens / total_groups


def _chosen_length(segments: Segments, context: Context) -> float:
    """The chosen responses' mean length of each group, added over the groups."""
    chosen = (segments.contexts == context) & (segments.sides == Side.CHOSEN)
    groups = segments.groups[chosen]
    return float((segments.lengths[chosen].double() / groups.bincount()[groups]).sum())


def mean_chosen_length_of(dataset: TokenDataset, method: MethodConfig, device: torch.device) -> Tensor | None:
    """The same over all groups of a data set; None where no loss reads it."""
    if not needs_mean_chosen_length(method):
        return None
    tokens = 0.0
    for group in dataset.groups:
        segments = ((c, s) for c, s in group.segments() if c == pair_context(method) and s.side == Side.CHOSEN)
        lengths = [continuation.learnt_count for _, continuation in segments]
        tokens += sum(lengths) / len(lengths)
    return torch.tensor(tokens / len(dataset.groups), dtype=torch.float64, device=device)


def metric_names(method: MethodConfig) -> tuple[str, ...]:
    """What a step sums; the same on every pipeline stage, though only the last one computes losses."""
    rows = [(0, context, side, 0, 1) for context, side in sorted(policy_scores(method))]
    segments, sums = Segments.of(rows, 1), -torch.ones(len(rows))
    if method.objective == "sft":
        return ("loss", *sft_loss(sums, segments).metrics)
    pairs, alignments = segments.pairs(pair_context(method)), segments.alignments(aligned_sides(method))
    return ("loss", *solopo_loss(sums, segments, pairs, alignments, sums, method, torch.ones(())).metrics)
