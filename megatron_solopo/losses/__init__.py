"""Pure losses: log-probs, lengths and counts in, a loss for each group out."""

from megatron_solopo.losses.rewards import dpo_reward, orpo_log_odds, simpo_reward
from megatron_solopo.losses.solopo import GroupLosses, sft_loss, solopo_loss

__all__ = ["GroupLosses", "dpo_reward", "orpo_log_odds", "sft_loss", "simpo_reward", "solopo_loss"]
