"""Pure losses: log-probs, lengths and counts in, a loss for each group out."""

from megatron_solopo.losses.rewards import dpo_reward, orpo_log_odds, simpo_reward
from megatron_solopo.losses.solopo import GroupLosses, sft_loss, solopo_loss
from megatron_solopo.losses.terms import alignment_distance, ipo_loss, logistic_loss, negative_log_likelihood

__all__ = [
    "GroupLosses",
    "alignment_distance",
    "dpo_reward",
    "ipo_loss",
    "logistic_loss",
    "negative_log_likelihood",
    "orpo_log_odds",
    "sft_loss",
    "simpo_reward",
    "solopo_loss",
]
