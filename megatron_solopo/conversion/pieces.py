"""Writing large tensors."""

from __future__ import annotations

from typing import BinaryIO

PIECE = 64 * 2**10
"""Bytes of a write.

Linux gives a larger write larger pages of its cache. Where a virtual machine has given unused memory back to its host,
those must be made anew: 1.2 GB took 4.7 s in one write, 1.0 to 2.2 s in pieces of 1 MB, and 0.8 to 1.0 s in these, as
long as copying a file of that size (2-core x86-64 VM, Linux 6.18, ext4, 2026-11-26).
"""


def write_in_pieces(file: BinaryIO, data: bytes | memoryview) -> None:
    """All of it; a single write may write a part only, up to 2 GB or what fits on the disk."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left[:PIECE]) :]
