"""ORPO, odds ratio preference optimization (arXiv 2403.07691, equations 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.terms import logistic_loss, negative_log_likelihood
from megatron_solopo.metrics import Metric
from megatron_solopo.option import option

LARGEST_MEAN = -1e-6
"""The odds p / (1 - p) diverge as the mean log-prob nears 0; beyond this it is clamped (and counted)."""


def orpo_log_odds(log_prob: Tensor, length: Tensor) -> Tensor:
    """Returns log(P / (1 - P)) with log P the mean log-prob of a token.

    It is computed as p - log(-expm1(p)): log1p(-exp(p)) overflows in value and gradient near p = 0, which one-token
    answers reach.
    """
    mean = (log_prob / length).clamp(max=LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))


@dataclass(frozen=True)
class ORPO(PreferenceLoss):
    """L = -log P(y_w|x) - lambda log sigmoid(r(x, y_w) - r(x, y_l)), with r(x, y) = log(P / (1 - P)).

    log P(y|x) = log pi(y|x) / |y|, the mean over a response's tokens.
    """

    name = "orpo"
    reward_text = "log odds of the mean log pi of a response's tokens"
    defaults = {"alignment_weight": 1.0}
    holds_likelihood = True
    listwise = True
    metrics = (Metric("orpo_clamped", "clamped log-odds", "responses a group", False, figure=None),)

    orpo_lambda: float = option(0.1, "ORPO's weight of the odds-ratio term", minimum=0)

    def reward(self, responses: Responses) -> Tensor:
        return orpo_log_odds(responses.log_probs, responses.lengths)

    def loss(self, pairs: Pairs) -> Tensor:
        likelihood = negative_log_likelihood(pairs.chosen.log_probs, pairs.chosen.lengths)
        return likelihood + self.orpo_lambda * logistic_loss(pairs.margin)

    def response_counts(self, responses: Responses) -> dict[str, Tensor]:
        clamped = responses.log_probs / responses.lengths > LARGEST_MEAN
        return {"orpo_clamped": clamped.to(responses.log_probs.dtype)}
