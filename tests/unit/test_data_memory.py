"""Memory that the data commands free is the system's again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHATML = Path(__file__).parents[2] / "examples" / "chat_templates" / "chatml.jinja"
LOADING = """
import ctypes, sys
from megatron_solopo.data.options import TokenizerOptions

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

tokenizer = TokenizerOptions(*sys.argv[1:]).load()
before = resident()
ctypes.CDLL(None).malloc_trim(0)
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and malloc_trim are Linux's")
def test_loading_a_tokenizer_keeps_no_freed_memory(solopo_data: Path) -> None:
    """glibc alone keeps 115 MB after Qwen2's."""
    command = [sys.executable, "-c", LOADING, str(solopo_data / "tokenizers" / "qwen2"), str(CHATML)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20, f"{done.stdout.strip()} MB were free and not returned"
