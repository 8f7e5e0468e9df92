"""Which kernels compute the attention of a run; without torch, since options and batches depend on it."""

from __future__ import annotations

from enum import Enum, auto


class Kernels(Enum):
    """What a pack's attention layout is made for."""

    ENGINE = auto()
    """Transformer Engine's kernel for packed sequences."""
    CPU = auto()
    """torch's flash kernel for the CPU, without masks (`parallel.cpu_attention`)."""
    BLOCKS = auto()
    """torch's scaled dot product attention on CUDA in 32 bits, and for heads beyond the flash kernel's in 16, one call
    for the pieces of each shape."""
    PROMPTS = auto()
    """torch's scaled dot product attention for each prompt, on cuDNN or flash as torch prefers; one flash call for all
    completions."""
    CUDNN = auto()
    """The same, prompts on cuDNN alone."""
    FLASH = auto()
    """One flash call for all pieces."""


BACKENDS = {"auto": Kernels.PROMPTS, "fused": Kernels.CUDNN, "flash": Kernels.FLASH}
"""--attention-backend -> the kernels of portable layers on CUDA in 16 bits."""

HEAD_DIMS = range(8, 257, 8)
"""head_dim of torch 2.11's flash kernel on CUDA (flash_attn/flash_api.cpp)."""


def is_wide(size: int) -> bool:
    """Whether heads are beyond the flash kernel's, and so of the memory-efficient kernel, which takes any multiple of 8
    (mem_eff_attention/kernel_forward.h)."""
    return size > HEAD_DIMS[-1] and size % HEAD_DIMS.step == 0


PLANNED = Kernels.PROMPTS, Kernels.CUDNN
"""Kernels for which lengths of prompts are rounded up (`context.none`)."""


def kernels_for(engine: bool, on_cuda: bool, sixteen_bits: bool, backend: str, deterministic: bool) -> Kernels:
    """Returns the kernels of a run without context parallelism; on the CPU it has the same.

    The flash kernels of CUDA take 16 bits only.

    Args:
        engine: whether the layers are Transformer Engine's.
        backend: --attention-backend.
        deterministic: --deterministic-mode, for which torch has no cuDNN attention.
    """
    if engine:
        return Kernels.ENGINE
    if not on_cuda:
        return Kernels.CPU
    if deterministic and backend == "auto":
        backend = "flash"
    return BACKENDS[backend] if sixteen_bits else Kernels.BLOCKS
