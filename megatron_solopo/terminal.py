"""Lines that several processes write to one terminal or log."""

from __future__ import annotations

import sys


def write_line(text: str) -> None:
    """Writes ``text`` and its line end to stderr in one call of the system.

    `print` writes them in two calls where Python is unbuffered, and lines of two processes then run together.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
