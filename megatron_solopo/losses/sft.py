"""Supervised fine-tuning, --objective sft: the negative log-likelihood of each conversation's trained tokens."""

from __future__ import annotations

from torch import Tensor

from megatron_solopo.losses.terms import GroupLosses, group_mean, negative_log_likelihood
from megatron_solopo.pack import Segments


def sft_loss(log_probs: Tensor, segments: Segments) -> GroupLosses:
    """Computes the mean negative log-likelihood of each conversation's trained tokens, in nats per token.

    Args:
        log_probs: [N] summed log-probs of the trained tokens.
        segments: N plain segments of n conversations, on the device of ``log_probs``.
    """
    each = negative_log_likelihood(log_probs, segments.lengths.to(log_probs.dtype))
    loss = group_mean(segments.groups, segments.group_count)(each)
    return GroupLosses(loss, {"nll": loss.detach()})
