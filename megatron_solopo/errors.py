"""The one exception for mistakes a user can mend, and what the system says of its own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """A one-line message: where (file:line, flag or rank), what is wrong, what to change.

    Commands print it as ``error: <message>`` and exit with status 2; a traceback would only
    hide the line that matters.
    """


class LostProcess(UserError):
    """Another process of the run is gone: what it says of itself is the reason, and another start may go well."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean --seq-length?"``, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def system_reason(error: BaseException) -> str:
    """The system's words where there are any ("No space left on device"), else the error's last line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    system = re.search(r"\[Errno \d+\] ([^:'\"\n]+)|I/O error: ([^(\n]+)", str(error))
    if system:
        return (system[1] or system[2]).strip()
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
