"""DPO, direct preference optimization (arXiv 2305.18290, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.terms import logistic_loss


def dpo_reward(log_prob: Tensor, reference_log_prob: Tensor, beta: float) -> Tensor:
    """Returns beta * (log pi(y|x) - log pi_ref(y|x)), from sums over the response's tokens, in nats."""
    return beta * (log_prob - reference_log_prob)


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """L = -log sigmoid(r(x, y_w) - r(x, y_l)), with r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))."""

    name = "dpo"
    reward_text = "beta * (log pi - log pi_ref), summed over a response's tokens"
    needs_reference = True
    defaults = {"beta": 0.1, "alignment_weight": 3.0}
    reads = frozenset({"label_smoothing", "sft_weight"})
    listwise = True

    def reward(self, responses: Responses) -> Tensor:
        return dpo_reward(responses.log_probs, responses.reference, self.beta)

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic_loss(pairs.margin, self.label_smoothing, self.label_smoothing_form)
