"""Returning freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes


def release_freed_memory() -> None:
    """Returns the memory that this process has freed to the system.

    glibc keeps freed memory below the last used piece of its heap. A process that has read Qwen2's tokenizer.json holds
    553 MB without this and 440 MB with it, from ext4 and from tmpfs alike. prepare-data on 100,000 short questions
    (first pass on all, contexts of 3,000, two workers) takes 1.38 GB with it and 1.51 GB without, and the same
    processor time (2026-11-29).

    A conversion calls it after every parameter, which takes 0.02 to 0.14 ms: those below 32 MiB (`platform.MAPPED`) lie
    in the heap, 0.38 GiB of a process that has a quarter of Qwen2.5-7B.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no malloc_trim, or no dlopen
        ctypes.CDLL(None).malloc_trim(0)
