"""IPO, identity preference optimization (arXiv 2310.12036, equation 17; beta is its tau)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.dpo import dpo_reward
from megatron_solopo.metrics import Metric


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """L = (m - 1 / (2 beta))^2, with m the chosen minus the rejected log-ratio (log pi - log pi_ref) / |y|.

    The loss uses means over tokens, in nats, as the paper's authors computed it and TRL 1.16's DPO trainer does. The
    reward, and so margin, accuracy and alignment, is DPO's: beta times the sum.
    """

    name = "ipo"
    reward_text = "beta * (log pi - log pi_ref), summed over a response's tokens; the loss takes means per token"
    needs_reference = True
    defaults = {"beta": 0.1, "alignment_weight": 3.0}
    reads = frozenset({"sft_weight"})
    metrics = (Metric("ipo_margin", "IPO margin", "nats per token", True, figure=None),)

    def reward(self, responses: Responses) -> Tensor:
        return dpo_reward(responses.log_probs, responses.reference, self.beta)

    def loss(self, pairs: Pairs) -> Tensor:
        return (self._margin(pairs) - 1 / (2 * self.beta)) ** 2

    def pair_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        return {"ipo_margin": self._margin(pairs)}

    def _margin(self, pairs: Pairs) -> Tensor:
        chosen = pairs.chosen_rewards / pairs.chosen.lengths
        rejected = pairs.rejected_rewards / pairs.rejected.lengths
        return (chosen - rejected) / self.beta
