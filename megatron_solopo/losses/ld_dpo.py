"""LD-DPO, length-desensitised DPO (arXiv 2409.06411; TRL 1.16's ``ld_alpha``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_solopo.losses.dpo import DPO
from megatron_solopo.option import option


@dataclass(frozen=True)
class LDDPO(DPO):
    """DPO with weight alpha on the log-probs of the tokens that the other response is too short to have.

    log pi(y|x) = sum of log p(y_t), t <= l, + alpha times the sum over t > l, and the same for pi_ref; l is the length
    of the shortest response of the group, so that a response has one reward however many it is compared with.
    """

    name = "ld_dpo"
    reward_text = "beta * (log pi - log pi_ref), tokens beyond the group's shortest response weighted by --ld-alpha"
    defaults = {"beta": 0.1, "alignment_weight": 3.0}
    reads = frozenset({"label_smoothing"})  # the likelihood of --sft-weight has no such weights

    ld_alpha: float = option(
        0.5, "LD-DPO's weight of the tokens beyond the length of the group's shortest response, 0 to 1", minimum=0
    )

    def __post_init__(self) -> None:
        if self.ld_alpha > 1:
            raise ValueError(f"--ld-alpha {self.ld_alpha:g} must be at most 1, which is DPO")

    @property
    def tail_weight(self) -> float:
        return self.ld_alpha
