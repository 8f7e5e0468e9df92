"""The slowest copy of the model by the time of its passes for the same work; test_survival.py has a real one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

PLACES = [(stage, copy) for stage in range(2) for copy in range(4)]
"""(pipeline stage, copy) of eight ranks."""


@pytest.mark.parametrize(
    ("seconds", "loads", "expected"),
    [
        ([2, 2, 3, 2, 5, 5, 5, 5], [1, 1, 1, 1], ((2,), 1.5, 1.0)),  # a stage is compared with itself
        ([2, 4, 2, 2.2, 5, 10, 5, 5], [1, 2, 1, 1], ((3,), 1.1, 0.2)),  # as long for twice the work is not slow
        ([1, 1, 1, 0, 1, 1, 2, 0], [1, 1, 1, 0], ((6,), 2.0, 1.0)),  # a copy without examples
        ([1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0], None),
    ],
)
def test_a_copy_is_compared_by_its_work(
    seconds: Sequence[float], loads: Sequence[float], expected: tuple[tuple[int, ...], float, float] | None
) -> None:
    from megatron_solopo.training.stragglers import slowest

    found = slowest(PLACES, seconds, loads)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.ranks == expected[0] and found[1:] == pytest.approx(expected[1:])


def test_ranks_that_share_a_copy_are_named_together() -> None:
    """They wait for each other, so that one of them is as slow as both."""
    from megatron_solopo.training.stragglers import in_words, slowest

    found = slowest([(0, 0), (0, 0), (0, 1), (0, 1)], [1, 1, 3, 2.9], [1, 1])
    assert found is not None and (found.ranks, found.ratio) == ((2, 3), 3.0)
    assert [in_words(ranks) for ranks in ((5,), (2, 3), (1, 5))] == ["rank 5", "ranks 2-3", "ranks 1, 5"]
