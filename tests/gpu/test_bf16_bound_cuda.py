"""Fused paths are within the bound of bfloat16 (`bf16_bound`) on a GPU, in the kernels that training takes there."""

from __future__ import annotations

import pytest
from bf16_bound import CASES, CUDA_CASES, SEEDS, check_bound

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*CASES, *CUDA_CASES])
def test_a_fused_path_is_as_near_to_float64_as_the_plain_one(name: str, seed: int) -> None:
    check_bound((CASES | CUDA_CASES)[name], seed, "cuda")
