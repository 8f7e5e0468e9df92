"""Length-normalised DPO: Olmo 3's ``dpo_norm`` (arXiv 2512.13961; open-instruct), TRL 1.16's ``sigmoid_norm``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.dpo import dpo_reward
from megatron_solopo.losses.terms import logistic_loss


@dataclass(frozen=True)
class DPONorm(PreferenceLoss):
    """L = -log sigmoid(r(x, y_w) - r(x, y_l)), with r(x, y) = (beta / |y|) (log pi(y|x) - log pi_ref(y|x))."""

    name = "dpo_norm"
    reward_text = "beta * the mean of log pi - log pi_ref over a response's tokens"
    needs_reference = True
    defaults = {"beta": 5.0, "alignment_weight": 1.0}
    reads = frozenset({"label_smoothing", "sft_weight"})
    listwise = True

    def reward(self, responses: Responses) -> Tensor:
        return dpo_reward(responses.log_probs, responses.reference, self.beta) / responses.lengths

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic_loss(pairs.margin, self.label_smoothing, self.label_smoothing_form)
