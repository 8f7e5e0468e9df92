"""Lines that several processes write to one terminal or log."""

from __future__ import annotations

import sys


def write_line(text: str) -> None:
    """Writes ``text`` and its line end to stderr in one system call.

    `print` makes two calls if Python is unbuffered, so that lines of two processes could mix.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
