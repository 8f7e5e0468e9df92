"""Files and folders that appear whole or not at all.

Each is written beside its place, flushed to the disk and renamed over it, so that a reader sees the old content or the
new, whatever is killed when. A file is written to ``NAME.new``, a folder to ``NAME.partial``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

Keep = Callable[[Path, Path], None]
"""Moves on what stays of an earlier folder (first argument) when a new one has taken its place (second)."""


def file_aside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".new")


@contextlib.contextmanager
def new_file(
    path: str | Path, mode: Literal["w", "wb"] = "w", *, shared: bool = False, errors: str | None = None
) -> Iterator[IO[Any]]:
    """Opens a file that takes the place of ``path`` where the block ends, and is removed where the block fails.

    Args:
        mode: text (UTF-8) or bytes.
        shared: several processes may write the same file, each under a random name beside it; the last one wins. What
            a kill leaves of such a file is not overwritten by the next write.
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
        with contextlib.suppress(OSError):  # what failed may be the folder
            aside.unlink()
        raise


def write_text(path: str | Path, text: str, errors: str | None = None) -> None:
    """Writes a whole file; see `new_file`."""
    with new_file(path, errors=errors) as file:
        file.write(text)


def put_file(source: Path, path: Path) -> None:
    """Gives a finished file its place, which may lie on another disk, under a second name; ``source`` stays."""
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
    aside.unlink(missing_ok=True)  # two names of one file are left as they are by a rename


def finish_file(path: Path) -> None:
    """Renames what a process that was killed in `new_file` had written; the caller knows that it is whole."""
    with contextlib.suppress(FileNotFoundError):  # another process has just done it
        rename(file_aside(path), path)


def folder_aside(folder: Path) -> Path:
    """Where a folder is written before it takes its name."""
    return _beside(folder, ".partial")


def replaced(folder: Path) -> Path:
    """Where an earlier folder waits while the new one takes its name."""
    return _beside(folder, ".replaced")


def _beside(folder: Path, ending: str) -> Path:
    """Beside what a link leads to: a link cannot be replaced by a folder, and may lead to another disk."""
    real = folder.resolve()
    return real.parent / (real.name + ending)


def put_folder(aside: Path, folder: Path, keep: Keep | None = None) -> None:
    """Gives a finished folder its name. Whatever was there is complete until then, under this name or beside it."""
    folder = folder.resolve()
    if folder.exists():
        folder.rename(replaced(folder))
    rename(aside, folder)
    _delete_earlier(folder, keep)


def restore_folder(folder: Path, keep: Keep | None = None) -> None:
    """Ends what a process that was killed in `put_folder` began: an earlier folder gets its name back, or goes."""
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
    """Renames a file or folder, and writes the new entry of the folder around to the disk."""
    aside.rename(path)
    with contextlib.suppress(OSError):  # some network file systems have no descriptors of folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
