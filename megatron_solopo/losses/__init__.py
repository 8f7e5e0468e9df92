"""Pure losses: from log-probs, lengths and indices to a loss for each group. Each preference loss is one file."""

from megatron_solopo.losses.base import Pairs, PreferenceLoss, Responses
from megatron_solopo.losses.dpo import dpo_reward
from megatron_solopo.losses.orpo import orpo_log_odds
from megatron_solopo.losses.sft import sft_loss
from megatron_solopo.losses.simpo import simpo_reward
from megatron_solopo.losses.solopo import solopo_loss
from megatron_solopo.losses.terms import GroupLosses, alignment_distance, logistic_loss, negative_log_likelihood
from megatron_solopo.metrics import Metric
from megatron_solopo.option import option

__all__ = [
    "GroupLosses",
    "Metric",
    "Pairs",
    "PreferenceLoss",
    "Responses",
    "alignment_distance",
    "dpo_reward",
    "logistic_loss",
    "negative_log_likelihood",
    "option",
    "orpo_log_odds",
    "sft_loss",
    "simpo_reward",
    "solopo_loss",
]
