"""A range of a flattened tensor as rectangles of the tensor."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_solopo.parallel.optimizer_shards import rectangles


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 1, 6), (2, 3, 4, 2), (1, 8)])
def test_rectangles_hold_a_range_in_its_order(shape: tuple[int, ...]) -> None:
    draw, count = random.Random(1), math.prod(shape)
    tensor = torch.arange(count).view(shape)
    ranges = [(0, count), (0, 0), (count - 1, count)]
    for begin, end in ranges + [sorted((draw.randrange(count), draw.randrange(count))) for _ in range(40)]:
        parts = list(rectangles(shape, begin, end))
        held = [tensor[tuple(slice(at, at + size) for at, size in zip(*part, strict=True))].flatten() for part in parts]
        assert torch.cat([torch.zeros(0, dtype=torch.int64), *held]).tolist() == list(range(begin, end))
        assert len(parts) <= 2 * len(shape) - 1 and all(part.numel() for part in held)


def test_rows_that_are_complete_are_one_rectangle() -> None:
    assert list(rectangles((6, 4), 3, 22)) == [((0, 3), (1, 1)), ((1, 0), (4, 4)), ((5, 0), (1, 2))]
