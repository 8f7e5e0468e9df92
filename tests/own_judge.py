"""A user's scorer, in a module that the processes of the tests can import."""

from __future__ import annotations

from collections.abc import Sequence


def judge(response: str, answers: Sequence[str]) -> float:
    return float(any(answer in response.split() for answer in answers))
