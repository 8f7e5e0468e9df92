"""A user's preference loss, from Python: python examples/api/user_loss.py MODEL GROUPS.jsonl"""

import sys
from dataclasses import dataclass

from torch import Tensor

from megatron_solopo import Config, PreferenceLoss, train
from megatron_solopo.losses import Pairs, Responses, option


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """max(0, hinge_margin - (r(x, y_w) - r(x, y_l))), with r(x, y) = beta log pi(y|x) / |y|."""

    reward_text = "beta * the mean log pi of a response's tokens"
    defaults = {"beta": 1.0, "alignment_weight": 1.0}

    hinge_margin: float = option(1.0, "margin beyond which a pair teaches nothing, in reward units", minimum=0)

    def reward(self, responses: Responses) -> Tensor:
        return self.beta * responses.log_probs / responses.lengths

    def loss(self, pairs: Pairs) -> Tensor:
        return (self.hinge_margin - pairs.margin).clamp(min=0)


options = dict(train_iters=5, global_batch_size=4, seq_length=2048, lr=1e-5, save="runs/hinge")
config = Config.from_options(
    hf_path=sys.argv[1], train_data=sys.argv[2], preference_loss=Hinge, hinge_margin=0.5, **options
)
print(f"loss of the pairs: {train(config).metrics['po_loss']:.3f}")
