"""LongPO (arXiv 2502.13922, equation 9), a baseline: the policy on the long context, the reference on the short one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.dpo import dpo_reward
from megatron_solopo.losses.terms import logistic_loss, negative_log_likelihood
from megatron_solopo.option import option


@dataclass(frozen=True)
class LongPO(PreferenceLoss):
    """L = NLL(y_w | x_long) - lambda log sigmoid(r(x, y_w) - r(x, y_l)).

    r(x, y) = beta (log pi(y | x_long) - log pi_ref(y | x_short)), and NLL the mean over tokens.
    """

    name = "longpo"
    reward_text = "beta * (log pi on the long context - log pi_ref on the short one), summed over a response's tokens"
    needs_reference = True
    reference_on_short = True
    defaults = {"beta": 0.1}
    reads = frozenset({"sft_normalization"})
    holds_likelihood = True
    listwise = True
    context_modes = ("long",)

    longpo_lambda: float = option(
        0.01, "LongPO's weight of the preference term, beside the chosen answer's likelihood at length", minimum=0
    )

    def reward(self, responses: Responses) -> Tensor:
        return dpo_reward(responses.log_probs, responses.reference, self.beta)

    def loss(self, pairs: Pairs) -> Tensor:
        return self._likelihood(pairs) + self.longpo_lambda * logistic_loss(pairs.margin)

    def pair_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        return {"po_loss": logistic_loss(pairs.margin), "sft_loss": self._likelihood(pairs)}

    def _likelihood(self, pairs: Pairs) -> Tensor:
        return negative_log_likelihood(pairs.chosen.log_probs, pairs.chosen.lengths, pairs.mean_chosen_length)
