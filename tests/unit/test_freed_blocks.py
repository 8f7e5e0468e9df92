"""Memory of freed tensors on the CPU goes back to the system, unless the user configured glibc's malloc."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_solopo.parallel.platform import return_freed_blocks

KEEPS_HALF = """
import torch
from megatron_solopo.parallel.platform import return_freed_blocks

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

return_pages = return_freed_blocks()
before, kept = resident(), []
for number in range(24):
    freed = torch.ones(3 * 2**19 + 70_000 * number)  # fits into no hole between those that are kept
    kept.append(torch.ones(2**19))
    del freed
return_pages()
print((resident() - before) / 2**10)
"""


def test_a_process_holds_what_its_tensors_hold() -> None:
    """48 MiB of tensors; without the last call the process grows by GROWS."""
    done = subprocess.run([sys.executable, "-c", KEEPS_HALF], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 46 < float(done.stdout) < 56


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=0")]
)
def test_a_configured_malloc_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert return_freed_blocks() is None
