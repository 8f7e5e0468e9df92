"""The SoLoPO loss of each preference group (arXiv 2505.11166):

    L = L_PO(x_short, y_w, y_l) + alpha * s( r(x_short, y_w) - r(x_long, y_w) )

with a preference loss L_PO of losses/ (or a user's), r its reward and s the distance `--alignment-distance` (default
|.|). `--context-mode short | long` are plain preference optimization on that context; `--alignment-target both` adds
the same alignment term for y_l. `--sft-weight` adds the negative log-likelihood of y_w to losses that do not contain
it.

A group of k chosen and m rejected responses has k m pairs, whose mean is its L_PO. Its alignment is the mean over the k
chosen responses, with `both` plus the mean over the m rejected ones. With `--pair-reduction plackett_luce` each chosen
response is compared with all m rejected ones at once: its margin is r(x, y_w) - log sum_l exp r(x, y_l), so that
-log sigmoid of it is -log (e^r_w / (e^r_w + sum_l e^r_l)), the first choice of a Plackett-Luce ranking (S-DPO, arXiv
2406.09215), and L_PO is the mean over the k chosen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_solopo.losses.base import Pairs, Responses
from megatron_solopo.losses.registry import loss_class, preference_loss
from megatron_solopo.losses.terms import (
    GroupLosses,
    alignment_distance,
    group_logsumexp,
    group_mean,
    group_sum,
    negative_log_likelihood,
)
from megatron_solopo.pack import Context, Scored, Segments, Side

if TYPE_CHECKING:  # config imports the registry of this package
    from megatron_solopo.config import MethodConfig


def pair_context(method: MethodConfig) -> Context:
    """Returns the context of the preference loss."""
    return Context.LONG if method.context_mode == "long" else Context.SHORT


def aligned_sides(method: MethodConfig) -> tuple[Side, ...]:
    """Returns the sides whose short and long rewards are aligned."""
    if method.context_mode != "solo":
        return ()
    return (Side.CHOSEN, Side.REJECTED) if method.alignment_target == "both" else (Side.CHOSEN,)


def policy_scores(method: MethodConfig) -> Scored:
    """Returns the responses of each group that the policy scores."""
    if method.objective == "sft":
        return frozenset({(Context.SHORT, Side.PLAIN)})
    pairs = {(pair_context(method), side) for side in (Side.CHOSEN, Side.REJECTED)}
    return frozenset(pairs | {(Context.LONG, side) for side in aligned_sides(method)})


def reference_scores(method: MethodConfig) -> Scored:
    """Returns the responses of each group that the reference model scores; empty without a reference."""
    if not needs_reference(method):
        return frozenset()
    return frozenset((reference_context(context, method), side) for context, side in policy_scores(method))


def all_scores(method: MethodConfig) -> Scored:
    """Returns the responses of each group that the policy or the reference scores."""
    return policy_scores(method) | reference_scores(method)


def needs_reference(method: MethodConfig) -> bool:
    """Whether the loss compares with reference log-probs."""
    return method.objective == "preference" and loss_class(method.preference_loss).needs_reference


def reference_context(context: Context, method: MethodConfig) -> Context:
    """Returns the context on which the reference scores the responses that the policy scores on ``context``."""
    on_short = loss_class(method.preference_loss).reference_on_short or (
        method.context_mode == "solo" and method.alignment_reference == "short"
    )
    return Context.SHORT if on_short else context


def needs_log_squares(method: MethodConfig) -> bool:
    """Whether the loss reads the logarithm of the policy's summed squared probabilities."""
    return method.objective == "preference" and loss_class(method.preference_loss).needs_log_squares


def tail_weight(method: MethodConfig) -> float:
    """Returns `PreferenceLoss.tail_weight`."""
    return preference_loss(method).tail_weight if method.objective == "preference" else 1.0


def adds_likelihood(method: MethodConfig) -> bool:
    """Whether --sft-weight adds the chosen response's negative log-likelihood to the loss."""
    return method.objective == "preference" and method.sft_weight > 0


def needs_mean_chosen_length(method: MethodConfig) -> bool:
    """Whether the loss depends on the mean chosen length of the global batch."""
    if method.objective != "preference" or method.sft_normalization != "token":
        return False
    return adds_likelihood(method) or "sft_normalization" in loss_class(method.preference_loss).reads


def solopo_loss(
    log_probs: Tensor,
    segments: Segments,
    pairs: Tensor,
    alignments: Tensor,
    reference: Tensor | None,
    method: MethodConfig,
    mean_chosen_length: Tensor | None = None,
    log_squares: Tensor | None = None,
) -> GroupLosses:
    """Computes the loss of each of n groups, without a mean over groups. All tensors are on one device.

    Args:
        log_probs: [N] summed log-probs of the policy over each segment's tokens, nats.
        segments: the N segments, those of `policy_scores(method)`.
        pairs: [P, 2] `segments.pairs(pair_context(method))`.
        alignments: [A, 2] `segments.alignments(aligned_sides(method))`.
        reference: [N] summed log-probs of the reference model that each segment is compared with, see
            `reference_context`; None without a reference.
        method: resolved options (beta and alignment_weight set).
        mean_chosen_length: [] where `needs_mean_chosen_length(method)`: the mean over the groups of the global batch of
            the mean length of their chosen responses, on the context of the preference loss.
        log_squares: [N] where `needs_log_squares(method)`, see `Responses`.

    Raises:
        ValueError: ``reference``, ``mean_chosen_length`` or the alignment's weight is missing, or the preference loss
            does not return one value for each response or pair.
    """
    if not needs_mean_chosen_length(method):
        mean_chosen_length = None
    elif mean_chosen_length is None:
        raise ValueError("--sft-normalization token needs the mean chosen length of the global batch")
    kind = preference_loss(method)
    responses = Responses(log_probs, segments.lengths.to(log_probs.dtype), reference, log_squares)
    rewards = kind.reward(responses)
    _check_shapes({"reward": rewards}, log_probs, "response")
    chosen, rejected = pairs.unbind(1)
    compared = Pairs(responses[chosen], responses[rejected], rewards[chosen], rewards[rejected], mean_chosen_length)
    margin, listed = compared.margin, compared
    if method.pair_reduction == "plackett_luce":
        every = group_logsumexp(chosen, len(segments))(compared.rejected_rewards)
        listed = replace(compared, rejected_rewards=every)
    preference = kind.loss(listed)
    of_pairs = {
        "reward_chosen": compared.chosen_rewards,
        "reward_rejected": compared.rejected_rewards,
        "margin": margin,
        "accuracy": pair_accuracy(margin),
        "logp_chosen": compared.chosen.log_probs,
        "logp_rejected": compared.rejected.log_probs,
        "po_loss": preference,
    }
    measured, counted = kind.pair_metrics(listed), kind.response_counts(responses)
    _check_shapes({"loss": preference} | measured, margin, "pair")
    _check_shapes(counted, log_probs, "response")
    each = preference
    if adds_likelihood(method):
        likelihood = negative_log_likelihood(compared.chosen.log_probs, compared.chosen.lengths, mean_chosen_length)
        each = each + method.sft_weight * likelihood
        of_pairs["sft_loss"] = likelihood
    mean = group_mean(segments.groups[chosen], segments.group_count)
    loss = mean(each)
    metrics = {name: mean(values) for name, values in (of_pairs | measured).items()}
    count = group_sum(segments.groups, segments.group_count)
    metrics |= {name: count(values) for name, values in counted.items()}
    if method.context_mode == "solo":
        if method.alignment_weight is None:
            raise ValueError(
                "alignment_weight is missing; the defaults of a loss are filled in by `config_load.resolve`"
            )
        alignment, of_alignment = _alignment(responses, rewards, segments, alignments, method)
        loss = loss + method.alignment_weight * alignment
        metrics |= {"alignment_loss": alignment} | of_alignment
    return GroupLosses(loss, {name: value.detach() for name, value in metrics.items()})


def _check_shapes(values: Mapping[str, Tensor], like: Tensor, what: str) -> None:
    """Refuses other shapes: a sum or mean over the pack would be broadcast to every group and silently train another
    loss."""
    for name, each in values.items():
        if each.shape != like.shape:
            raise ValueError(
                f"{name} has shape {[*each.shape]} for {len(like)} {what}s; it must have one value a {what}"
            )


def pair_accuracy(margin: Tensor) -> Tensor:
    """Returns 1 where the chosen reward is higher, 0 where it is lower, and 0.5 where the two are equal.

    Rewards are equal at step 1 of a loss with a reference, where the policy is the reference. TRL 1.16 counts a tie as
    0 (`chosen_rewards > rejected_rewards`), as if every pair were ranked wrongly.

    Args:
        margin: [P] chosen minus rejected reward.
    """
    return torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # torch's sign of NaN is 0


def _alignment(
    responses: Responses, rewards: Tensor, segments: Segments, alignments: Tensor, method: MethodConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the distance of short and long rewards.

    Returns:
        [n] means over a side's responses, summed over the aligned sides; and metrics of [n].
    """
    short, long = alignments.unbind(1)
    short_rewards = rewards[short].detach() if method.alignment_stop_short_gradient else rewards[short]
    distance = alignment_distance(
        short_rewards - rewards[long], method.alignment_distance, method.alignment_huber_delta
    )
    sides = segments.sides[short]
    # One row for each side of a group; the mean is over a row.
    by_side = group_mean(segments.groups[short] * len(Side) + sides, segments.group_count * len(Side))
    rows = {
        "reward_long": rewards[long],
        "logp_long": responses.log_probs[long],
        "gap": (responses.log_probs[short] - responses.log_probs[long]) / responses.lengths[short],
    }
    means = {name: by_side(values).reshape(-1, len(Side)) for name, values in rows.items()}
    metrics = {"short_long_gap_nats_per_token": means["gap"][:, Side.CHOSEN]}
    for side in aligned_sides(method):
        for name in ("reward_long", "logp_long"):
            metrics[f"{name}_{side.name.lower()}"] = means[name][:, side]
    return by_side(distance).reshape(-1, len(Side)).sum(1), metrics
