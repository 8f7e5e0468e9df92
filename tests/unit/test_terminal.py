"""Lines of several processes on one terminal."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_solopo.cli import run
from megatron_solopo.errors import UserError
from megatron_solopo.terminal import write_line


class Calls(io.RawIOBase):
    """Keeps what each call of the system would write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.written.append(bytes(data))  # type: ignore[call-overload]
        return len(self.written[-1])


def unbuffered(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Makes stderr what it is with PYTHONUNBUFFERED; a fixture would do so before pytest replaces it."""
    raw = Calls()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
    return raw


def test_a_line_and_its_end_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = unbuffered(monkeypatch)
    write_line("two words")
    assert calls.written == [b"two words\n"]


def test_an_error_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str] | None) -> int:
        raise UserError("option-value", "--lr: no")

    calls = unbuffered(monkeypatch)
    assert run(command) == 2
    assert calls.written == [b"error: --lr: no [option-value]\n"]


SPEAKS = """
import logging, sys, warnings
from megatron_solopo.cli import run
from megatron_solopo.terminal import write_line

def main(argv):
    warnings.warn("from a library")
    logging.warning("of a logger")
    write_line("a line")
    print("half a line", end="", file=sys.stderr)
    raise RuntimeError("two\\nlines")

run(main, [])
"""


@pytest.mark.parametrize("rank", ["0", "3"])
def test_what_other_ranks_write_names_rank_and_machine(rank: str, tmp_path: Path) -> None:
    """Warnings, log records and the traceback of what ends the process; rank 0's log stays as it is."""
    (tmp_path / "speaks.py").write_text(SPEAKS)
    root = Path(__file__).resolve().parents[2]
    environment = {"RANK": rank, "PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run(
        [sys.executable, tmp_path / "speaks.py"], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stderr.splitlines()
    name = f"[rank 3 on {socket.gethostname()}] "
    assert done.returncode == 1 and any("from a library" in line for line in lines), done.stderr
    assert all(line.startswith(name) == (rank == "3") for line in lines), done.stderr
    said = [line.removeprefix(name) for line in lines]
    assert {"WARNING:root:of a logger", "a line", "RuntimeError: two", "lines"} < set(said)
