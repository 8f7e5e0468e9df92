"""The SoLoPO loss of each preference group (arXiv 2505.11166):

    L = L_PO(x_short, y_w, y_l) + alpha * | r(x_short, y_w) - r(x_long, y_w) |

with DPO, SimPO or ORPO as L_PO and r its reward. `--context-mode short | long` are plain preference
optimization on that context; `--alignment-target both` adds the same alignment term for y_l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.config import MethodConfig
from megatron_solopo.losses.rewards import dpo_reward, orpo_clamped, orpo_log_odds, simpo_reward

SHORT_CHOSEN, SHORT_REJECTED = "short_chosen", "short_rejected"
LONG_CHOSEN, LONG_REJECTED = "long_chosen", "long_rejected"
RESPONSE = "response"
"""Roles: which log-prob of a group a tensor holds. RESPONSE is the only one of --objective sft."""


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
    """The log-probs that the method needs of each group, short context first."""
    if method.objective == "sft":
        return (RESPONSE,)
    short, long = (SHORT_CHOSEN, SHORT_REJECTED), (LONG_CHOSEN, LONG_REJECTED)
    if method.context_mode == "short":
        return short
    if method.context_mode == "long":
        return long
    return short + (long if method.alignment_target == "both" else long[:1])


def needs_reference(method: MethodConfig) -> bool:
    """Whether the loss compares with reference log-probs."""
    return method.objective == "preference" and method.preference_loss == "dpo"


def sft_loss(log_probs: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> GroupLosses:
    """The mean negative log-likelihood of each example's learnt tokens, in nats per token."""
    loss = -log_probs[RESPONSE] / lengths[RESPONSE]
    return GroupLosses(loss, {"nll": loss.detach()})


def solopo_loss(
    log_probs: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    method: MethodConfig,
) -> GroupLosses:
    """The loss of each of n groups; nothing is averaged over groups.

    Args:
        log_probs: role -> [n], summed log-probs of the policy over a response's tokens, nats.
        lengths: role -> [n], the number of those tokens.
        reference: role -> [n], the same sums under the reference model; None unless DPO.
        method: resolved options (beta and alignment_weight set).

    Raises:
        KeyError: a role of `roles(method)` is missing.
    """
    log_probs = {role: log_probs[role] for role in roles(method)}
    rewards = {role: _reward(role, log_probs, lengths, reference, method) for role in log_probs}
    chosen, rejected = (LONG_CHOSEN, LONG_REJECTED) if method.context_mode == "long" else (SHORT_CHOSEN, SHORT_REJECTED)
    margin = rewards[chosen] - rewards[rejected]
    preference = _preference_loss(margin, log_probs[chosen], lengths[chosen], method)
    loss = preference
    metrics = {
        "po_loss": preference,
        "reward_chosen": rewards[chosen],
        "reward_rejected": rewards[rejected],
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
        "logp_chosen": log_probs[chosen],
        "logp_rejected": log_probs[rejected],
    }
    if method.preference_loss == "orpo":
        metrics["orpo_clamped"] = sum(orpo_clamped(log_probs[role], lengths[role]) for role in log_probs)
    if method.context_mode == "solo":
        alignment = _alignment(rewards, method)
        loss = loss + method.alignment_weight * alignment
        gap = (log_probs[SHORT_CHOSEN] - log_probs[LONG_CHOSEN]) / lengths[SHORT_CHOSEN]
        metrics |= {
            "alignment_loss": alignment,
            "reward_long_chosen": rewards[LONG_CHOSEN],
            "short_long_gap_nats_per_token": gap,
        }
    return GroupLosses(loss, {name: value.detach() for name, value in metrics.items()})


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
        raise KeyError("DPO needs reference log-probs")
    short_reference = method.context_mode == "solo" and method.alignment_reference == "short"
    return dpo_reward(
        log_probs[role], reference[role.replace("long_", "short_") if short_reference else role], method.beta
    )


def _preference_loss(margin: Tensor, chosen_log_prob: Tensor, chosen_length: Tensor, method: MethodConfig) -> Tensor:
    if method.preference_loss == "simpo":
        return -F.logsigmoid(margin - method.simpo_gamma)
    if method.preference_loss == "orpo":
        return -chosen_log_prob / chosen_length - method.orpo_lambda * F.logsigmoid(margin)
    return -F.logsigmoid(margin)


def _alignment(rewards: Mapping[str, Tensor], method: MethodConfig) -> Tensor:
    """The l1 distance of short and long rewards; its gradient at 0 is 0 (torch.abs)."""
    pairs = [(SHORT_CHOSEN, LONG_CHOSEN)]
    if method.alignment_target == "both":
        pairs.append((SHORT_REJECTED, LONG_REJECTED))
    distance = torch.zeros_like(rewards[SHORT_CHOSEN])
    for short, long in pairs:
        short_reward = rewards[short].detach() if method.alignment_stop_short_gradient else rewards[short]
        distance = distance + (short_reward - rewards[long]).abs()
    return distance
