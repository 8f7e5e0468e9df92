"""--deterministic-mode: the same bits from the same run on the same machine and layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch refuses products without it
    "NCCL_ALGO": "Ring",  # NCCL otherwise chooses by what it measures
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # megatron-core requires it of Transformer Engine's attention
}
"""Environment variables that CUDA's libraries read when they start; those that the user set are kept."""


@contextmanager
def fixed_order() -> Iterator[None]:
    """Sums are computed in a fixed order inside the block, which begins before the first use of CUDA.

    torch then sorts what `index_add` and the gradient of `index_select` sum (log-probs of segments, gradients of shared
    prompts' keys), and makes the flash kernels sum the gradients of queries in order; an operator that has no such
    algorithm raises a RuntimeError that names it.
    """
    added = {name: value for name, value in VARIABLES.items() if name not in os.environ}
    settings: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    os.environ.update(added)
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a pass over each new tensor, for debugging
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
        for name in added:
            os.environ.pop(name, None)
