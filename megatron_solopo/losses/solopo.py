"""The SoLoPO loss of each preference group (arXiv 2505.11166):

    L = L_PO(x_short, y_w, y_l) + alpha * s( r(x_short, y_w) - r(x_long, y_w) )

with DPO, IPO, SimPO or ORPO as L_PO, r its reward and s a distance (|.| unless `--alignment-distance` says another).
`--context-mode short | long` are plain preference optimization on that context; `--alignment-target both` adds the
same alignment term for y_l. `--sft-weight` adds the negative log-likelihood of y_w to DPO, IPO and SimPO.

LongPO (arXiv 2502.13922) is a baseline beside it: the policy on the long context, the reference on the short one,

    L = NLL(y_w | x_long) - lambda * log sigmoid( beta log [pi(y_w | x_long) / pi_ref(y_w | x_short)]
                                                - beta log [pi(y_l | x_long) / pi_ref(y_l | x_short)] )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_solopo.config import LOSSES_WITH_REFERENCE, MethodConfig
from megatron_solopo.losses.rewards import dpo_reward, orpo_clamped, orpo_log_odds, simpo_reward
from megatron_solopo.losses.terms import alignment_distance, ipo_loss, logistic_loss, negative_log_likelihood
from megatron_solopo.metrics import Metric, register

SHORT_CHOSEN, SHORT_REJECTED = "short_chosen", "short_rejected"
LONG_CHOSEN, LONG_REJECTED = "long_chosen", "long_rejected"
RESPONSE = "response"
"""Roles: which log-prob of a group a tensor holds. RESPONSE is the only one of --objective sft."""

register(
    Metric("ipo_margin", "IPO margin", "nats per token", True, figure=None),
    Metric("orpo_clamped", "clamped log-odds", "of the scored answers", False, figure=None),
)


@dataclass(frozen=True)
class GroupLosses:
    """The loss of each group and what to watch.

    Attributes:
        loss: [n groups], differentiable, in nats.
        metrics: name -> [n groups], detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def roles(method: MethodConfig) -> tuple[str, ...]:
    """The log-probs of the policy that the method needs of each group, short context first."""
    if method.objective == "sft":
        return (RESPONSE,)
    short, long = (SHORT_CHOSEN, SHORT_REJECTED), (LONG_CHOSEN, LONG_REJECTED)
    if method.context_mode == "short":
        return short
    if method.context_mode == "long":
        return long
    return short + (long if method.alignment_target == "both" else long[:1])


def reference_roles(method: MethodConfig) -> tuple[str, ...]:
    """The log-probs of the reference model that the method reads of each group, short context first; () without one."""
    if method.objective == "sft" or method.preference_loss not in LOSSES_WITH_REFERENCE:
        return ()
    return tuple(dict.fromkeys(_reference_role(role, method) for role in roles(method)))


def _reference_role(role: str, method: MethodConfig) -> str:
    """Which reference log-prob a policy role is compared with."""
    on_short = method.preference_loss == "longpo" or (
        method.context_mode == "solo" and method.alignment_reference == "short"
    )
    return role.replace("long_", "short_") if on_short else role


def scored_roles(method: MethodConfig) -> tuple[str, ...]:
    """What the policy or the reference scores, short context first."""
    wanted = {*roles(method), *reference_roles(method)}
    return tuple(
        role for role in (SHORT_CHOSEN, SHORT_REJECTED, LONG_CHOSEN, LONG_REJECTED, RESPONSE) if role in wanted
    )


def needs_reference(method: MethodConfig) -> bool:
    """Whether the loss compares with reference log-probs."""
    return bool(reference_roles(method))


def chosen_role(method: MethodConfig) -> str:
    """The chosen answer on the context of the preference loss."""
    return LONG_CHOSEN if method.context_mode == "long" else SHORT_CHOSEN


def has_likelihood(method: MethodConfig) -> bool:
    """Whether the chosen answer's negative log-likelihood is a term of its own (ORPO's is part of its loss)."""
    return method.objective == "preference" and (method.preference_loss == "longpo" or method.sft_weight > 0)


def needs_tokens_per_group(method: MethodConfig) -> bool:
    """Whether the loss depends on the mean chosen length of the global batch."""
    return has_likelihood(method) and method.sft_normalization == "token"


def sft_loss(log_probs: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> GroupLosses:
    """The mean negative log-likelihood of each example's learnt tokens, in nats per token."""
    loss = negative_log_likelihood(log_probs[RESPONSE], lengths[RESPONSE])
    return GroupLosses(loss, {"nll": loss.detach()})


def solopo_loss(
    log_probs: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    method: MethodConfig,
    tokens_per_group: Tensor | None = None,
) -> GroupLosses:
    """The loss of each of n groups; nothing is averaged over groups.

    Args:
        log_probs: role -> [n], summed log-probs of the policy over a response's tokens, nats.
        lengths: role -> [n], the number of those tokens.
        reference: role -> [n], the sums of `reference_roles(method)` under the reference model; None without one.
        method: resolved options (beta and alignment_weight set).
        tokens_per_group: [] the mean of ``lengths[chosen_role(method)]`` over the global batch, where
            `needs_tokens_per_group(method)`.

    Raises:
        KeyError: a role of `roles(method)` is missing, or the reference.
        ValueError: ``tokens_per_group`` is missing.
    """
    if needs_tokens_per_group(method) and tokens_per_group is None:
        raise ValueError("--sft-normalization token needs the mean chosen length of the global batch")
    log_probs = {role: log_probs[role] for role in roles(method)}
    rewards = {role: _reward(role, log_probs, lengths, reference, method) for role in log_probs}
    chosen, rejected = chosen_role(method), chosen_role(method).replace("chosen", "rejected")
    margin = rewards[chosen] - rewards[rejected]
    metrics = {
        "reward_chosen": rewards[chosen],
        "reward_rejected": rewards[rejected],
        "margin": margin,
        "accuracy": pair_accuracy(margin),
        "logp_chosen": log_probs[chosen],
        "logp_rejected": log_probs[rejected],
    }
    if method.preference_loss == "ipo":
        # The loss sees means over tokens, in nats; reward, margin and accuracy stay DPO's, as TRL logs them.
        per_token = rewards[chosen] / lengths[chosen] - rewards[rejected] / lengths[rejected]
        metrics["ipo_margin"] = margin = per_token / method.beta
    if method.preference_loss == "orpo":
        metrics["orpo_clamped"] = sum(orpo_clamped(log_probs[role], lengths[role]) for role in log_probs)
    preference = _preference_loss(margin, log_probs[chosen], lengths[chosen], method)
    metrics["po_loss"] = preference
    loss = method.longpo_lambda * preference if method.preference_loss == "longpo" else preference
    if has_likelihood(method):
        mean_length = tokens_per_group if method.sft_normalization == "token" else None
        likelihood = negative_log_likelihood(log_probs[chosen], lengths[chosen], mean_length)
        loss = loss + (1.0 if method.preference_loss == "longpo" else method.sft_weight) * likelihood
        metrics["sft_loss"] = likelihood
    if method.context_mode == "solo":
        alignment = _alignment(rewards, method)
        loss = loss + method.alignment_weight * alignment
        gap = (log_probs[SHORT_CHOSEN] - log_probs[LONG_CHOSEN]) / lengths[SHORT_CHOSEN]
        metrics |= {
            "alignment_loss": alignment,
            "reward_long_chosen": rewards[LONG_CHOSEN],
            "logp_long_chosen": log_probs[LONG_CHOSEN],
            "short_long_gap_nats_per_token": gap,
        }
        if LONG_REJECTED in log_probs:
            metrics |= {
                "reward_long_rejected": rewards[LONG_REJECTED],
                "logp_long_rejected": log_probs[LONG_REJECTED],
            }
    return GroupLosses(loss, {name: value.detach() for name, value in metrics.items()})


def pair_accuracy(margin: Tensor) -> Tensor:
    """1 where the chosen reward is the higher one, 0 where it is the lower one, and 0.5 where the two are equal.

    Rewards are equal at step 1 of a loss with a reference, where the policy is the reference. TRL 1.16 counts a tie as
    0 (`chosen_rewards > rejected_rewards`), which reads as if every pair were ranked wrong.

    Args:
        margin: [n] chosen minus rejected reward.
    """
    return torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # torch's sign of NaN is 0


def _reward(
    role: str,
    log_probs: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    method: MethodConfig,
) -> Tensor:
    if method.preference_loss == "simpo":
        return simpo_reward(log_probs[role], lengths[role], method.beta)
    if method.preference_loss == "orpo":
        return orpo_log_odds(log_probs[role], lengths[role])
    if reference is None:
        raise KeyError(f"{method.preference_loss} needs reference log-probs")
    return dpo_reward(log_probs[role], reference[_reference_role(role, method)], method.beta)


def _preference_loss(margin: Tensor, chosen_log_prob: Tensor, chosen_length: Tensor, method: MethodConfig) -> Tensor:
    if method.preference_loss == "ipo":
        return ipo_loss(margin, method.beta)
    if method.preference_loss == "orpo":
        return negative_log_likelihood(chosen_log_prob, chosen_length) + method.orpo_lambda * logistic_loss(margin)
    if method.preference_loss == "longpo":
        return logistic_loss(margin)
    if method.preference_loss == "simpo":
        margin = margin - method.simpo_gamma
    return logistic_loss(margin, method.label_smoothing, method.label_smoothing_form)


def _alignment(rewards: Mapping[str, Tensor], method: MethodConfig) -> Tensor:
    """The distance of short and long rewards, summed over the aligned responses."""
    pairs = [(SHORT_CHOSEN, LONG_CHOSEN)]
    if method.alignment_target == "both":
        pairs.append((SHORT_REJECTED, LONG_REJECTED))
    total = torch.zeros_like(rewards[SHORT_CHOSEN])
    for short, long in pairs:
        short_reward = rewards[short].detach() if method.alignment_stop_short_gradient else rewards[short]
        difference = short_reward - rewards[long]
        total = total + alignment_distance(difference, method.alignment_distance, method.alignment_huber_delta)
    return total
