"""Terms of the losses, from rewards and log-probs, and means over the pairs of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GroupLosses:
    """The loss and metrics of each group.

    Attributes:
        loss: [n groups], differentiable, in nats.
        metrics: name -> [n groups], detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def group_sum(groups: Tensor, group_count: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that sums [K] values to [group_count] by their [K] ``groups``."""
    return lambda values: values.new_zeros(group_count).index_add(0, groups, values)


def group_logsumexp(groups: Tensor, group_count: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that maps [K] values to [K] the logarithms of the sums of exponentials over their
    ``groups``."""

    def total(values: Tensor) -> Tensor:
        fixed = values.detach()
        largest = fixed.new_full((group_count,), float("-inf")).scatter_reduce(0, groups, fixed, "amax")[groups]
        return largest + group_sum(groups, group_count)((values - largest).exp()).log()[groups]

    return total


def group_mean(groups: Tensor, group_count: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that averages [K] values to [group_count] by their [K] ``groups``; empty groups get 0."""
    counts = groups.new_zeros(group_count).index_add(0, groups, torch.ones_like(groups))[groups]
    return lambda values: values.new_zeros(group_count).index_add(0, groups, values / counts)


def logistic_loss(margin: Tensor, label_smoothing: float = 0.0, form: str = "conservative") -> Tensor:
    """Computes l(m) = -log sigmoid(m) of a reward margin, for labels swapped with probability e = ``label_smoothing``.

    ``conservative``: (1 - e) l(m) + e l(-m), the expected loss (cDPO; TRL 1.16's CPO trainer).
    ``robust``: ((1 - e) l(m) - e l(-m)) / (1 - 2 e), whose expectation over swapped labels is l(m) of the true ones
    (arXiv 2403.00409; TRL 1.16's DPO trainer, loss type robust).

    Args:
        margin: [n], in reward units.
        label_smoothing: in [0, 0.5).
    """
    if label_smoothing == 0:
        return -F.logsigmoid(margin)
    kept = -(1 - label_smoothing) * F.logsigmoid(margin)
    swapped = -label_smoothing * F.logsigmoid(-margin)
    if form == "robust":
        return (kept - swapped) / (1 - 2 * label_smoothing)
    return kept + swapped


def alignment_distance(difference: Tensor, distance: str, huber_delta: float) -> Tensor:
    """Computes the distance of two rewards; 0 with gradient 0 where they are equal.

    ``l1`` is the upper bound that the paper derives for the logistic loss, up to a constant. ``l2`` and ``huber`` are
    not in the paper: their gradients are smaller where the rewards nearly agree.

    Args:
        difference: [n], in reward units.
        distance: l1: |d|; l2: d^2; huber: d^2 / 2 up to ``huber_delta``, huber_delta (|d| - huber_delta / 2) beyond.
    """
    if distance == "l2":
        return difference**2
    if distance == "huber":
        return F.huber_loss(difference, difference.new_zeros(()).expand_as(difference), "none", huber_delta)
    return difference.abs()


def negative_log_likelihood(log_prob: Tensor, length: Tensor, tokens_per_group: Tensor | None = None) -> Tensor:
    """Returns -log pi(y|x) / |y|, in nats per token.

    Args:
        log_prob: [n] sums over the response's tokens.
        length: [n] number of those tokens.
        tokens_per_group: [] mean of ``length`` over the global batch; used instead of ``length``, it makes the mean
            over groups the mean over tokens.
    """
    return -log_prob / (length if tokens_per_group is None else tokens_per_group)
