"""The loss of a pack's groups from its segment sums, and its inputs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError
from megatron_solopo.losses.registry import loss_class
from megatron_solopo.losses.sft import sft_loss
from megatron_solopo.losses.solopo import (
    aligned_sides,
    needs_log_squares,
    needs_mean_chosen_length,
    needs_reference,
    pair_context,
    policy_scores,
    reference_context,
    solopo_loss,
)
from megatron_solopo.losses.terms import GroupLosses
from megatron_solopo.pack import Context, Pack, Segments, Side
from megatron_solopo.parallel.device_pack import on_device
from megatron_solopo.training.segment_table import ReferenceLogProbs
from megatron_solopo.user_function import error_text

NOT_OF_LOSSES = frozenset(
    {
        *("step", "split", "epoch", "loss", "moe_aux_loss", "grad_norm", "clip_grad", "clipped", "lr", "groups"),
        *("tokens", "tokens_per_second", "padding_share", "compute_imbalance", "memory_gib", "memory_allocated_gib"),
        *("seconds", "data_seconds", "data_rank", "skipped", "warnings"),
        *("slowest_ranks", "slowest_hosts", "slowest_ratio", "slowest_seconds"),
        *("padding", "squared_norm", "stop", "memory", "allocated", "waited"),  # that ranks exchange in a step
    }
)
"""Names in a line of metrics.jsonl, and in the exchange of a step, that no metric of a loss may have."""


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a pack's loss besides its segment sums, on the device; see `solopo_loss`.

    They are computed on the host before the step: computing the indices on the device would synchronize in every pack.

    Attributes:
        compared: [N] float64 log-probs of the reference, or None.
    """

    segments: Segments
    pairs: Tensor
    alignments: Tensor
    compared: Tensor | None


def loss_inputs(
    pack: Pack, reference: ReferenceLogProbs | None, method: MethodConfig, device: torch.device
) -> LossInputs:
    """Makes the loss inputs of a pack, whose ``scored`` is on the host.

    Args:
        reference: log-probs of the complete data set, or None.
    """
    scored = pack.scored
    pairs = alignments = torch.zeros(0, 2, dtype=torch.int64)
    compared = None
    if method.objective == "preference":
        pairs, alignments = scored.pairs(pair_context(method)), scored.alignments(aligned_sides(method))
    if reference is not None:
        compared = reference.of_pack(pack, [reference_context(context, method) for context in Context])
    return on_device(LossInputs(scored, pairs, alignments, compared), device)


@dataclass(frozen=True)
class StepInputs:
    """`LossInputs` of this process's packs of a step, and the names of what the loss measures.

    Attributes:
        chosen_length: the groups' mean chosen lengths, added over this process's groups; see `mean_chosen_length`.
    """

    packs: list[LossInputs]
    names: tuple[str, ...]
    chosen_length: float


def step_inputs(
    packs: Sequence[Pack], reference: ReferenceLogProbs | None, method: MethodConfig, device: torch.device
) -> StepInputs:
    """Returns what `run_parts` reads beside the packs; see `loss_inputs`."""
    each = [loss_inputs(pack, reference, method, device) for pack in packs]
    reads_length = needs_mean_chosen_length(method)
    length = sum(_chosen_length(pack.scored, pair_context(method)) for pack in packs) if reads_length else 0.0
    return StepInputs(each, metric_names(method), length)


def group_losses(
    sums: Tensor, inputs: LossInputs, method: MethodConfig, mean_length: Tensor | None = None
) -> GroupLosses:
    """Computes the losses of a pack's groups.

    Args:
        sums: [N] segment log-probs; [2, N] with the log_squares of the segments, where the loss reads them.
        mean_length: [] the mean chosen length, see `solopo_loss`.
    """
    if method.objective == "sft":
        return sft_loss(sums, inputs.segments)
    compared = None if inputs.compared is None else inputs.compared.to(sums.dtype)
    log_probs, log_squares = sums if needs_log_squares(method) else (sums, None)
    segments, pairs, alignments = inputs.segments, inputs.pairs, inputs.alignments
    return solopo_loss(log_probs, segments, pairs, alignments, compared, method, mean_length, log_squares)


def mean_chosen_length(inputs: StepInputs, total_groups: int, device: torch.device) -> Tensor:
    """Returns [] float64, the mean over all groups of the step of their chosen responses' mean length, in tokens, on
    the preference loss's context; collective."""
    tokens = torch.tensor(inputs.chosen_length, dtype=torch.float64, device=device)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    return tokens / total_groups


def _chosen_length(segments: Segments, context: Context) -> float:
    """Returns the chosen responses' mean length of each group, added over the groups."""
    chosen = (segments.contexts == context) & (segments.sides == Side.CHOSEN)
    groups = segments.groups[chosen]
    return float((segments.lengths[chosen].double() / groups.bincount()[groups]).sum())


def mean_chosen_length_of(dataset: TokenDataset, method: MethodConfig, device: torch.device) -> Tensor | None:
    """Returns the same over all groups of a data set; None where no loss reads it."""
    if not needs_mean_chosen_length(method):
        return None
    tokens = 0.0
    for group in dataset.groups:
        segments = ((c, s) for c, s in group.segments() if c == pair_context(method) and s.side == Side.CHOSEN)
        lengths = [completion.trained_tokens for _, completion in segments]
        tokens += sum(lengths) / len(lengths)
    return torch.tensor(tokens / len(dataset.groups), dtype=torch.float64, device=device)


def metric_names(method: MethodConfig) -> tuple[str, ...]:
    """Returns the metrics that a step sums; the same on every pipeline stage, though only the last computes losses."""
    return ("loss", *_trial(method, 1).metrics)


def check_loss(method: MethodConfig) -> None:
    """Tries the loss on two generated groups, and on a pack without groups, which a step may have.

    Raises:
        UserError: a user's loss raises an error, does not return one value for each pair or response, or has a metric
            with the name of another field of metrics.jsonl.
    """
    if method.objective == "sft":
        return
    kind = loss_class(method.preference_loss)
    groups, metrics = 2, set[str]()
    try:
        for groups in (2, 0):
            result = _trial(method, groups)
            result.loss.sum().backward()
            metrics |= result.metrics.keys()
    except Exception as error:  # a user's loss may raise anything
        file = sys.modules[kind.__module__].__file__
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f"{file}:{frame.lineno}: " for frame in reversed(frames) if frame.filename == file), "")
        problem = f"with {groups} groups: {place}{error_text(error)}"
        raise UserError("loss-raises", f"--preference-loss {method.preference_loss}: {problem}") from error
    if taken := sorted(metrics & NOT_OF_LOSSES):
        raise UserError(
            "loss-metric-name",
            f"--preference-loss {method.preference_loss}: its metric {taken[0]!r} has the name of another field of "
            "metrics.jsonl; choose another name",
        )


def _trial(method: MethodConfig, groups: int) -> GroupLosses:
    """Computes the loss of generated groups."""
    scored = sorted(policy_scores(method))
    segments = Segments.of([(group, *each, 0, 2 + group) for group in range(groups) for each in scored], groups)
    sums = torch.full((len(segments),), -1.0, requires_grad=True)
    if method.objective == "sft":
        return sft_loss(sums, segments)
    pairs, alignments = segments.pairs(pair_context(method)), segments.alignments(aligned_sides(method))
    compared = torch.full((len(segments),), -1.0) if needs_reference(method) else None
    log_squares = torch.full((len(segments),), -2.0) if needs_log_squares(method) else None
    return solopo_loss(sums, segments, pairs, alignments, compared, method, torch.ones(()), log_squares)
