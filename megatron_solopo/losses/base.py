"""The interface of a preference loss: a frozen dataclass with a reward, a loss of pairs, and its options.

A loss is one class in one file, in this folder or anywhere (``--preference-loss module:NAME``):

    @dataclass(frozen=True)
    class Hinge(PreferenceLoss):
        "max(0, hinge_margin - (r(x, y_w) - r(x, y_l))), with r(x, y) = beta log pi(y|x) / |y|."

        name = "hinge"
        reward_text = "beta * the mean log pi of a response's tokens"
        defaults = {"beta": 1.0, "alignment_weight": 1.0}

        hinge_margin: float = option(1.0, "margin beyond which a pair has no loss, in reward units", minimum=0)

        def reward(self, responses: Responses) -> Tensor:
            return self.beta * responses.log_probs / responses.lengths

        def loss(self, pairs: Pairs) -> Tensor:
            return (self.hinge_margin - pairs.margin).clamp(min=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_solopo.metrics import Metric


@dataclass(frozen=True)
class Responses:
    """n scored responses.

    Attributes:
        log_probs: [n] log pi(y|x), summed over a response's tokens, nats.
        lengths: [n] |y|, the number of those tokens, in the dtype of ``log_probs``.
        compared: [n] log pi_ref(y|x), summed over the same tokens; None for a loss without a reference.
        log_squares: [n] log of the sum over the vocabulary of pi^2, summed over the same tokens and without gradient;
            None unless `PreferenceLoss.needs_log_squares`.
    """

    log_probs: Tensor
    lengths: Tensor
    compared: Tensor | None = None
    log_squares: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """[n] log pi_ref(y|x).

        Raises:
            ValueError: there are no reference log-probs.
        """
        if self.compared is None:
            raise ValueError("the loss needs reference log-probs; its class must set needs_reference = True")
        return self.compared

    @property
    def squares(self) -> Tensor:
        """[n] `log_squares`.

        Raises:
            ValueError: there are none.
        """
        if self.log_squares is None:
            raise ValueError("the loss needs log_squares; its class must set needs_log_squares = True")
        return self.log_squares

    def __getitem__(self, indices: Tensor) -> Responses:
        further = (None if each is None else each[indices] for each in (self.compared, self.log_squares))
        return Responses(self.log_probs[indices], self.lengths[indices], *further)


@dataclass(frozen=True)
class Pairs:
    """P pairs of a chosen and a rejected response to one prompt, on the context of the preference loss.

    Attributes:
        chosen, rejected: [P] each.
        chosen_rewards, rejected_rewards: [P] `PreferenceLoss.reward` of the responses.
        mean_chosen_length: [] the mean length of the chosen responses of the global batch, with --sft-normalization
            token; None with sequence.
    """

    chosen: Responses
    rejected: Responses
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    mean_chosen_length: Tensor | None = None

    @property
    def margin(self) -> Tensor:
        """[P] r(x, y_w) - r(x, y_l)."""
        return self.chosen_rewards - self.rejected_rewards


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of pairs and its reward r(x, y). Subclasses are frozen dataclasses whose docstring has the formula.

    A subclass's fields are its options, declared with `option` under names that no other option has;
    `__post_init__` may refuse their values with a ValueError. The fields of this class are common options, which a loss
    reads only where ``defaults`` or ``reads`` names them.

    Attributes:
        name: the value of --preference-loss; the name of a user's loss is module:CLASS.
        reward_text: a description of the reward in one line.
        needs_reference: whether the loss compares with the starting weights.
        reference_on_short: whether the reference scores each response on the short context.
        needs_log_squares: whether the loss reads `Responses.squares`.
        listwise: whether the loss reads rejected responses through `Pairs.margin` alone, so that --pair-reduction
            plackett_luce can put the logarithm of the sum of their exponentials in the place of one reward.
        defaults: default of "beta", where the loss reads it, and of "alignment_weight", where it supports
            --context-mode solo.
        reads: other common options that have an effect: "label_smoothing" (with its form), "sft_weight" (the
            likelihood of the chosen response may be added to the loss), "sft_normalization" (the loss reads
            `Pairs.mean_chosen_length`).
        holds_likelihood: whether the loss itself contains the likelihood of the chosen response.
        context_modes: the values of --context-mode that the loss supports.
        metrics: the metrics of `pair_metrics` and `response_counts`.
        beta: the reward's scale; NaN where the loss has no default for it.
        label_smoothing, label_smoothing_form: see `terms.logistic_loss`.
    """

    name: ClassVar[str]
    reward_text: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    reference_on_short: ClassVar[bool] = False
    needs_log_squares: ClassVar[bool] = False
    listwise: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, float]] = {}
    reads: ClassVar[frozenset[str]] = frozenset()
    holds_likelihood: ClassVar[bool] = False
    context_modes: ClassVar[tuple[str, ...]] = ("solo", "short", "long")
    metrics: ClassVar[tuple[Metric, ...]] = ()

    beta: float
    label_smoothing: float
    label_smoothing_form: str

    @property
    def tail_weight(self) -> float:
        """The weight in `Responses.log_probs` and `Responses.compared` of a response's tokens beyond the length of the
        shortest response of its group."""
        return 1.0

    def reward(self, responses: Responses) -> Tensor:
        """Returns [n] rewards r(x, y)."""
        raise NotImplementedError

    def loss(self, pairs: Pairs) -> Tensor:
        """Returns [P] losses, one for each pair, in nats."""
        raise NotImplementedError

    def pair_metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Returns metrics of [P], averaged over the pairs of a group; they replace those of losses/solopo.py of the
        same name."""
        return {}

    def response_counts(self, responses: Responses) -> dict[str, Tensor]:
        """Returns metrics of [n], summed over all scored responses of a group."""
        return {}
