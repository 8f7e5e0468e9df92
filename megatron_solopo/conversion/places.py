"""Folders that appear whole or not at all: written aside, then renamed, an earlier one kept until then."""

from __future__ import annotations

import shutil
from pathlib import Path


def aside_of(folder: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return folder.with_name(folder.name + ".partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def restore(folder: Path) -> None:
    """Ends what a command that was killed in `put_in_place` began: an earlier folder gets its name back, or goes."""
    earlier = _replaced(folder)
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """Gives a finished folder its name. Whatever stood there is complete until then, under this name or beside it."""
    if folder.exists():
        folder.rename(_replaced(folder))
    aside.rename(folder)
    shutil.rmtree(_replaced(folder), ignore_errors=True)
