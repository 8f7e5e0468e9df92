"""Rewards r(x, y) of a response y after a prompt x, from summed log-probs (arXiv 2505.11166, table of PO losses)."""

from __future__ import annotations

import torch
from torch import Tensor

ORPO_LARGEST_MEAN = -1e-6
"""ORPO's odds p / (1 - p) diverge as the mean log-prob nears 0; beyond this it is clamped (and counted)."""


def dpo_reward(log_prob: Tensor, reference_log_prob: Tensor, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)), from sums over the response's tokens, in nats."""
    return beta * (log_prob - reference_log_prob)


def simpo_reward(log_prob: Tensor, length: Tensor, beta: float) -> Tensor:
    """(beta / |y|) * log pi(y|x)."""
    return beta * log_prob / length


def orpo_log_odds(log_prob: Tensor, length: Tensor) -> Tensor:
    """log(P / (1 - P)) with log P the mean log-prob of a token.

    Computed as p - log(-expm1(p)): log1p(-exp(p)) overflows in value and gradient near p = 0, which
    one-token answers reach.
    """
    mean = (log_prob / length).clamp(max=ORPO_LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))


def orpo_clamped(log_prob: Tensor, length: Tensor) -> Tensor:
    """1 where `orpo_log_odds` clamped, else 0."""
    return (log_prob / length > ORPO_LARGEST_MEAN).to(log_prob.dtype)
