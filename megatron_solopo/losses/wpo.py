"""WPO, weighted preference optimization (arXiv 2406.11827, equation 2, sampled alignment; TRL 1.16's
``use_weighting``)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_solopo.losses.base import Pairs, Responses
from megatron_solopo.losses.dpo import DPO
from megatron_solopo.metrics import Metric


@dataclass(frozen=True)
class WPO(DPO):
    """w(x, y_w) w(x, y_l) times DPO's loss, with w(x, y) = exp of the mean over y's tokens of log p - log sum_v p(v)^2.

    p is the policy's distribution at a token; the weights have no gradient. A response that the policy would sample
    itself has a weight near 1, an off-policy one a smaller weight.
    """

    name = "wpo"
    reward_text = "beta * (log pi - log pi_ref), summed over a response's tokens; pairs are weighted by WPO's weights"
    listwise = False
    needs_log_squares = True
    metrics = (Metric("wpo_weight", "WPO weight", "of a pair", None, figure=None),)

    def loss(self, pairs: Pairs) -> Tensor:
        return _weight(pairs) * super().loss(pairs)

    def pair_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        return {"wpo_weight": _weight(pairs)}


def _weight(pairs: Pairs) -> Tensor:
    """Returns [P] w(x, y_w) w(x, y_l), without gradient."""
    return (_log_weight(pairs.chosen) + _log_weight(pairs.rejected)).exp()


def _log_weight(responses: Responses) -> Tensor:
    return (responses.log_probs.detach() - responses.squares) / responses.lengths
