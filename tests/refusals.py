"""What tests expect of a refused input: the error's code, and the flags, files and lines that its message must name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_solopo.errors import UserError

LINE = re.compile(r"^error: (?P<message>.*) \[(?P<code>[a-z0-9-]+)\]$", re.M)


@contextmanager
def refused(code: str, *named: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises a `UserError` of this code whose message holds each of ``named``."""
    with pytest.raises(UserError) as caught:
        yield caught
    check(caught.value.code, caught.value.message, code, *named)


def check_refusal(stderr: str, code: str, *named: str) -> str:
    """A command's stderr has one error line, of this code, that holds each of ``named``; returns its message."""
    lines = LINE.findall(stderr)
    assert len(lines) == 1, stderr
    message, actual = lines[0]
    check(actual, message, code, *named)
    return message


def check(actual: str, message: str, code: str, *named: str) -> None:
    assert actual == code, f"{actual}: {message}"
    assert "\n" not in message
    for part in named:
        assert part in message, f"{part!r} is not in {message!r}"
