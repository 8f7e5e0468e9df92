"""What a run that may be killed at any moment leaves, so that it goes on from there: files, settings, a lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_solopo.errors import UserError

_PROGRESS, _READY = "progress.json", "ready.json"


def differences(made: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[tuple[str, Any, Any]]:
    """(name, value then, value now) of settings that are not equal; names of nested ones are joined by dots."""
    told = []
    for key in sorted(made.keys() | now.keys()):
        before, after = made.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            told += differences(before, after, f"{where}{key}.")
        elif before != after:
            told.append((f"{where}{key}", before, after))
    return told


def refuse_other_settings(path: Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where unfinished work was begun with other settings."""
    for name, before, after in differences(made, now):
        raise UserError(
            f"{path}: begun with {name} = {before!r}, now {after!r}; repeat the first settings to resume, or delete it "
            "to start again"
        )


def hold(descriptor: int, path: Path) -> None:
    """Locks an open file or folder until it is closed, so that no second process writes there.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.suppress(OSError):  # some network file systems have no locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for its end, or end it first") from None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the folder if need be and holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def begun_with(path: Path) -> dict[str, Any]:
    """The settings of unfinished work, {} where there is none: of a work folder, or of a file whose first line holds
    them."""
    try:
        with (path / _READY if path.is_dir() else path).open("rb") as file:
            settings = json.loads(file.readline())["settings"]
        return settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class WorkFolder:
    """A folder, `held` by the run, with its unfinished work and the settings it was begun with.

    ``ready`` says whether a first run finished its preparations there (`mark_ready`); what an earlier run left
    unprepared, or prepared with other settings and built nothing of, is deleted.

    Raises:
        UserError: work that is worth something was begun with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._state = path / _READY
        noted = _noted(self._state)
        if noted is not None and self.done:
            refuse_other_settings(path, noted["settings"], self._settings)
        self.ready = noted is not None and noted["settings"] == self._settings
        if not self.ready:  # the folder itself stays, for the lock is on it
            for file in path.iterdir():
                file.unlink()

    @property
    def done(self) -> int:
        """Items that a `Progress` in the folder has finished."""
        noted = _noted(self.path / _PROGRESS)
        return noted["done"] if noted else 0

    @property
    def prepared(self) -> Any:
        """What `mark_ready` was given."""
        return _noted(self._state)["prepared"]

    def mark_ready(self, prepared: Any) -> None:
        write_aside(self._state, {"settings": self._settings, "prepared": prepared})
        self.ready = True

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Progress:
    """Output files that grow together, each cut back to its length at the last `add` when a run goes on.

    Attributes:
        done: items finished; ``state`` is what the last `add` was given (None at the start).
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._path = folder / _PROGRESS
        self.done, self.state = 0, None
        sizes = dict.fromkeys(names, 0)
        if kept := _noted(self._path):
            # After a power failure a file may be shorter than what was noted; then all is built again.
            if all(_size(folder / name) >= size for name, size in kept["sizes"].items()):
                self.done, self.state, sizes = kept["done"], kept["state"], kept["sizes"]
        self._files = {}
        for name, size in sizes.items():
            file = (folder / name).open("ab")
            file.truncate(size)
            file.seek(size)
            self._files[name] = file

    def add(self, done: int, parts: Mapping[str, bytes], state: Any) -> None:
        """Appends to the files and notes that ``done`` items are finished."""
        for name, part in parts.items():
            self._files[name].write(part)
            self._files[name].flush()
        self.done, self.state = done, state
        sizes = {name: file.tell() for name, file in self._files.items()}
        write_aside(self._path, {"done": done, "sizes": sizes, "state": state})

    def finish(self, targets: Mapping[str, Path]) -> None:
        """Moves each named file to its place, complete."""
        for file in self._files.values():
            file.close()
        for name, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            # The work folder is beside the output, but a target may lie on another disk.
            aside = target.with_name(target.name + ".complete")
            shutil.move(self._path.with_name(name), aside)
            aside.replace(target)


def write_aside(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it, so that a reader sees the old or the new, never a part."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    aside.replace(path)


def _noted(path: Path) -> Any:
    """What `write_aside` wrote, None where there is no file; after a power failure it may be there and empty."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
