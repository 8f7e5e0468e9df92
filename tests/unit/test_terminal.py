"""Lines of several processes on one terminal."""

from __future__ import annotations

import io
import sys

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
