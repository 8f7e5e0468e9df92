"""The loss of a pack's groups from its segment sums, and what the loss needs to know of the whole step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.losses.solopo import (
    RESPONSE,
    GroupLosses,
    chosen_role,
    needs_tokens_per_group,
    reference_roles,
    roles,
    sft_loss,
    solopo_loss,
)
from megatron_solopo.pack import Pack


def group_losses(
    sums: Tensor, pack: Pack, reference: Tensor | None, method: MethodConfig, tokens_per_group: Tensor | None = None
) -> GroupLosses:
    """The losses of a pack's groups from its segment sums.

    Args:
        sums: [N] segment log-probs.
        reference: [examples, reference roles] of the whole data set, or None.
        tokens_per_group: [] see `solopo_loss`.
    """
    names = roles(method)
    log_probs = {role: sums[pack.role(role)] for role in names}
    lengths = {role: pack.segment_lengths[pack.role(role)].to(sums.dtype) for role in names}
    if method.objective == "sft":
        return sft_loss(log_probs, lengths)
    known = None
    if reference is not None:
        rows = reference[list(pack.groups)].to(device=sums.device, dtype=sums.dtype)
        known = {role: rows[:, column] for column, role in enumerate(reference_roles(method))}
    return solopo_loss(log_probs, lengths, known, method, tokens_per_group)


def mean_chosen_length(packs: list[Pack], total_groups: int, method: MethodConfig, device: torch.device) -> Tensor:
    """[] float64, the chosen tokens of a group on the preference loss's context, over all groups of the step."""
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    for pack in packs:
        tokens += pack.segment_lengths[pack.role(chosen_role(method))].sum()
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    return tokens / total_groups


def mean_chosen_length_of(dataset: TokenDataset, method: MethodConfig, device: torch.device) -> Tensor | None:
    """The same over all groups of a data set; None where no loss reads it."""
    if not needs_tokens_per_group(method):
        return None
    role = chosen_role(method)
    continuations = (c for group in dataset.groups for prompt in group.prompts for c in prompt.continuations)
    tokens = sum(c.learnt_count for c in continuations if c.role == role)
    return torch.tensor(tokens / len(dataset.groups), dtype=torch.float64, device=device)


def metric_names(method: MethodConfig) -> tuple[str, ...]:
    """What `run_step` sums; the same on every pipeline stage, though only the last one computes losses."""
    one = torch.ones(1)
    if method.objective == "sft":
        result = sft_loss({RESPONSE: -one}, {RESPONSE: one})
    else:
        names, compared = roles(method), dict.fromkeys(reference_roles(method), -one)
        result = solopo_loss(dict.fromkeys(names, -one), dict.fromkeys(names, one), compared, method, torch.ones(()))
    return ("loss", *result.metrics)
