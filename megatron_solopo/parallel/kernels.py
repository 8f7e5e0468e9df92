"""Which kernels compute the attention of a run; without torch, since options and batches depend on it."""

from __future__ import annotations

from enum import Enum, auto


class Kernels(Enum):
    """What a pack's attention layout is made for."""

    ENGINE = auto()
    """Transformer Engine's kernel for packed sequences."""
    BLOCKS = auto()
    """torch's scaled dot product attention, one call for the pieces of each shape."""
    PROMPTS = auto()
    """The same for each prompt, on cuDNN or the flash kernel as torch prefers; one flash call for all completions."""
    CUDNN = auto()
    """The same, prompts on cuDNN alone."""
    FLASH = auto()
    """One flash call for all pieces."""


BACKENDS = {"auto": Kernels.PROMPTS, "fused": Kernels.CUDNN, "flash": Kernels.FLASH}
"""--attention-backend -> the kernels of portable layers on CUDA in 16 bits."""

HEAD_DIMS = range(8, 257, 8)
"""head_dim of torch 2.11's flash kernel on CUDA (flash_attn/flash_api.cpp)."""

PLANNED = Kernels.PROMPTS, Kernels.CUDNN
"""Kernels for which lengths of prompts are rounded up (`context.none`)."""


def kernels_for(engine: bool, on_cuda: bool, sixteen_bits: bool, backend: str, deterministic: bool) -> Kernels:
    """Returns the kernels of a run without context parallelism.

    The flash kernels of CUDA take 16 bits only, and those of the CPU have no call for several sequences.

    Args:
        engine: whether the layers are Transformer Engine's.
        backend: --attention-backend.
        deterministic: --deterministic-mode, for which torch has no cuDNN attention.
    """
    if engine:
        return Kernels.ENGINE
    if deterministic and backend == "auto":
        backend = "flash"
    return BACKENDS[backend] if on_cuda and sixteen_bits else Kernels.BLOCKS
