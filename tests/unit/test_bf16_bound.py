"""Fused paths are within the bound of bfloat16 (`bf16_bound`), as far as the CPU has their kernels."""

from __future__ import annotations

import pytest
import torch
from bf16_bound import CASES, CPU_CASES, SEEDS, check_bound
from torch import Tensor

from megatron_solopo.model import log_probs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*CASES, *CPU_CASES])
def test_a_fused_path_is_as_near_to_float64_as_the_plain_one(name: str, seed: int) -> None:
    check_bound((CASES | CPU_CASES)[name], seed, "cpu")


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_in_float32_are_nearer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's product of bfloat16 matrices in float32, which is that of the same values in float32."""

    def logits(hidden: Tensor, weight: Tensor, total: torch.dtype) -> Tensor:
        return hidden.to(total) @ weight.to(total).t()

    monkeypatch.setattr(log_probs, "logits_of", logits)
    monkeypatch.setattr(log_probs, "kept_dtype", lambda hidden: hidden.dtype)
    for name in ("head", "head that keeps products"):
        check_bound(CASES[name], seed, "cpu")
