"""What is compared with the oracle and between launches, and how closely."""

from __future__ import annotations

from typing import Any

from launches import Launch, case_name
from torch import Tensor

BOUND = {"float64": 1e-10, "float32": 1e-5}
"""float64 leaves room for the sums' order only; float32 is compared tensor by tensor, never element by element."""


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| of each tensor."""
    assert ours.keys() == theirs.keys()
    return {
        name: ((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()).item()
        for name in ours
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of any tensor."""
    return max(differences(ours, theirs).values())


def check(launched: Launch, expected: Any, plan: tuple[str, ...], name: str | None = None) -> None:
    """Loss and gradient of a plan are the oracle's: every pair weighs 1 / G."""
    name = name or case_name(plan)
    dtype, method, model, _, batch = plan
    losses, gradient = expected(model, method, batch)
    mean = sum(losses) / len(losses)
    assert abs(launched.results[name]["means"]["loss"] - mean) <= BOUND[dtype] * max(1, abs(mean))
    worst = differences(launched.gradients[name], gradient)
    assert max(worst.values()) <= BOUND[dtype], (max(worst, key=worst.get), max(worst.values()))
    assert min(tensor.norm() for tensor in gradient.values()) > 0
