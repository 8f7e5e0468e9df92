"""Folders that appear whole or not at all: written aside, then renamed, an earlier one kept until then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_solopo.errors import UserError


def aside_of(folder: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return _beside(folder, ".partial")


def _replaced(folder: Path) -> Path:
    return _beside(folder, ".replaced")


def _beside(folder: Path, ending: str) -> Path:
    """Beside what a link leads to: a link cannot be replaced by a folder, and may lead to another disk."""
    real = folder.resolve()
    return real.parent / (real.name + ending)


def restore(folder: Path) -> None:
    """Ends what a command that was killed in `put_in_place` began: an earlier folder gets its name back, or goes."""
    earlier, folder = _replaced(folder), folder.resolve()
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    _take_over(earlier, folder)


def put_in_place(aside: Path, folder: Path) -> None:
    """Gives a finished folder its name. Whatever stood there is complete until then, under this name or beside it."""
    folder = folder.resolve()
    if folder.exists():
        folder.rename(_replaced(folder))
    aside.rename(folder)
    _take_over(_replaced(folder), folder)


def _take_over(earlier: Path, folder: Path) -> None:
    """An earlier folder goes; the models inside it that --save-hf-interval wrote stay."""
    for path in filter(_is_export, earlier.glob("iter_*")):
        if path.suffix != ".partial" and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(earlier, ignore_errors=True)


def _is_export(path: Path) -> bool:
    """A model of --save-hf-interval, finished or not; the checkpoints of a run have no config.json."""
    return path.name.startswith("iter_") and ((path / "config.json").is_file() or path.name.endswith(".partial"))


def check_target(option: str, folder: Path, force: bool, filling: bool = False) -> None:
    """Refuses a folder that cannot be written, or that is not to be replaced, before any work is done.

    Args:
        option: the flag that named the folder.
        filling: a folder that holds only models of --save-hf-interval will do without ``force``.

    Raises:
        UserError: what stands there, and what to do.
    """
    real = folder.resolve()
    if not real.exists():
        return
    if not real.is_dir():
        raise UserError(f"{option} {folder}: is not a folder; choose another name")
    if _is_mounted(real):
        raise UserError(
            f"{option} {folder}: is a mount point, which cannot be renamed; give a folder inside it: {folder / 'model'}"
        )
    model = (real / "config.json").is_file()
    if not force and (model or not filling):
        raise UserError(f"{option} {folder}: exists already; choose another folder, or overwrite it with --force")
    if not model and not all(map(_is_export, real.iterdir())):
        raise UserError(f"{option} {folder}: holds no model, so --force does not overwrite it; choose another folder")


def _is_mounted(folder: Path) -> bool:
    """Linux's own list too, because `os.path.ismount` overlooks a folder of the same disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        mounts = []
    return os.path.ismount(folder) or str(folder).replace(" ", r"\040") in (line.split()[4] for line in mounts)
