"""Files and folders that are replaced atomically.

Each is written beside its target, flushed to the disk and renamed over it, so that a reader sees the old or the new
content whenever a process is killed. A file is written to ``NAME.new``, a folder to ``NAME.partial``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from megatron_solopo.errors import UserError

Keep = Callable[[Path, Path], None]
"""Moves the parts of an earlier folder (first argument) that are kept into the new one (second)."""


def check_place(option: str, path: str | Path) -> None:
    """Refuses a path that cannot be created because it is below a file.

    Args:
        option: the flag that names the path.

    Raises:
        UserError: names the file.
    """
    above = next(parent for parent in Path(path).resolve().parents if parent.exists())
    if not above.is_dir():
        raise UserError("not-a-folder", f"{option} {path}: {above} is a file, not a folder; choose another place")


def file_aside(path: Path) -> Path:
    """Returns the temporary path at which a file is written before it is renamed."""
    return path.with_name(path.name + ".new")


@contextlib.contextmanager
def new_file(
    path: str | Path, mode: Literal["w", "wb"] = "w", *, shared: bool = False, errors: str | None = None
) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` when the block ends, and is removed if the block fails.

    Args:
        mode: text (UTF-8) or bytes.
        shared: several processes may write the same file, each under a random name beside it; the last one wins. The
            next write does not overwrite the temporary file of a killed one.
        errors: how characters that cannot be encoded are written (see `open`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = file_aside(path)
    if shared:
        aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
    try:
        with aside.open(mode, encoding=None if "b" in mode else "utf-8", errors=errors) as file:
            yield file
            _flush(file)
        rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may have failed
            aside.unlink()
        raise


def write_text(path: str | Path, text: str, errors: str | None = None) -> None:
    """Writes a file atomically; see `new_file`."""
    with new_file(path, errors=errors) as file:
        file.write(text)


def put_file(source: Path, path: Path) -> None:
    """Links or, to another disk, copies a finished file to ``path``; ``source`` stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = file_aside(path)
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    rename(aside, path)
    aside.unlink(missing_ok=True)  # a rename of one of two names of a file leaves both


def finish_file(path: Path) -> None:
    """Renames the temporary file of a process that was killed in `new_file`; the caller knows that it is complete."""
    with contextlib.suppress(FileNotFoundError):  # another process has just done it
        rename(file_aside(path), path)


def folder_aside(folder: Path) -> Path:
    """Returns the temporary path at which a folder is written before it is renamed."""
    return _beside(folder, ".partial")


def replaced(folder: Path) -> Path:
    """Returns the path of an earlier folder while the new one is renamed."""
    return _beside(folder, ".replaced")


def _beside(folder: Path, ending: str) -> Path:
    """Returns a path beside a link's target: a folder cannot replace a link, whose target may be on another disk."""
    real = folder.resolve()
    return real.parent / (real.name + ending)


def put_folder(aside: Path, folder: Path, keep: Keep | None = None) -> None:
    """Renames a finished folder. An earlier one is complete until then, under its name or beside it."""
    folder = folder.resolve()
    if folder.exists():
        folder.rename(replaced(folder))
    rename(aside, folder)
    _delete_earlier(folder, keep)


def restore_folder(folder: Path, keep: Keep | None = None) -> None:
    """Completes a `put_folder` that was killed: restores the earlier folder's name, or deletes that folder."""
    earlier, folder = replaced(folder), folder.resolve()
    if earlier.exists() and not folder.exists():
        rename(earlier, folder)
    _delete_earlier(folder, keep)


def _delete_earlier(folder: Path, keep: Keep | None) -> None:
    earlier = replaced(folder)
    if keep is not None and earlier.exists():
        keep(earlier, folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def rename(aside: Path, path: Path) -> None:
    """Renames a file or folder, and flushes the folder's entry to the disk."""
    aside.rename(path)
    with contextlib.suppress(OSError):  # not every network file system can open folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
