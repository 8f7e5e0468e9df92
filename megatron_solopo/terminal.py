"""Lines that several processes write to one terminal or log."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, TextIO


def rank_and_host() -> str:
    """``rank 3 on node7``, of the process that torchrun started."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def write_line(text: str, names_rank: bool = False) -> None:
    """Writes ``text`` and its line end to stderr in one system call.

    `print` makes two calls if Python is unbuffered, so that lines of two processes could mix.

    Args:
        names_rank: the text says which rank writes it, see `name_lines`.
    """
    stream = getattr(sys.stderr, "unnamed", sys.stderr) if names_rank else sys.stderr
    stream.write(f"{text}\n")
    stream.flush()


def name_lines() -> None:
    """Makes every line that Python writes to stderr in a process other than rank 0 begin with its rank and machine:
    warnings of libraries, log records, tracebacks. The log of a run is rank 0's and stays as it is.

    Where the variable with torchrun's prefix is set, torchrun names them (``--tee``).
    """
    stream: TextIO | NamedLines | None = sys.stderr
    if stream is None or isinstance(stream, NamedLines) or "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE" in os.environ:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = NamedLines(stream, f"[{rank_and_host()}] ")


class NamedLines:
    """A text stream whose lines begin with a name; each is written whole, so that lines of processes do not mix.

    Attributes:
        unnamed: the stream that it writes to.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.unnamed, self._name, self._rest = stream, name, ""

    def write(self, text: str) -> int:
        lines, end, self._rest = (self._rest + text).rpartition("\n")
        if end:
            self.unnamed.write("".join(f"{self._name}{line}\n" for line in lines.split("\n")))
        return len(text)

    def flush(self) -> None:
        if self._rest:
            self.write("\n")
        self.unnamed.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unnamed, name)
