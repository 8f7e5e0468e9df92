"""SimPO, simple preference optimization (arXiv 2405.14734, equation 6)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.terms import logistic_loss
from megatron_solopo.option import option


def simpo_reward(log_prob: Tensor, length: Tensor, beta: float) -> Tensor:
    """Returns (beta / |y|) * log pi(y|x)."""
    return beta * log_prob / length


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """L = -log sigmoid(r(x, y_w) - r(x, y_l) - gamma), with r(x, y) = (beta / |y|) log pi(y|x)."""

    name = "simpo"
    reward_text = "beta * the mean log pi of a response's tokens"
    defaults = {"beta": 2.0, "alignment_weight": 1.0}
    reads = frozenset({"label_smoothing", "sft_weight"})
    listwise = True

    simpo_gamma: float = option(1.0, "SimPO's target margin, in reward units", minimum=0)

    def reward(self, responses: Responses) -> Tensor:
        return simpo_reward(responses.log_probs, responses.lengths, self.beta)

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic_loss(pairs.margin - self.simpo_gamma, self.label_smoothing, self.label_smoothing_form)
