"""The jobs file: what a command has finished, so that the same command, repeated after a kill, does only the rest.

A log of JSON lines. The first line holds the settings that the work was begun with, every other one a finished job: its
name and what is known of it. The bulk of a job may go to streams, files beside the log that grow with the jobs; a job's
line says how long each stream was behind it. So a kill costs the jobs in flight and nothing else: a line that it cut is
dropped at the next start, and what no line speaks of is cut from the streams.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from megatron_solopo.atomic import put_file
from megatron_solopo.data.files.records import parse_line
from megatron_solopo.errors import UserError, system_reason

LOG = "jobs.jsonl"
"""The log of work that has a folder."""


Line = dict[str, Any]
"""A line of a log, which this package wrote: whoever reads a field knows what it wrote there."""


def differences(
    made: Mapping[str, object], now: Mapping[str, object], where: str = ""
) -> list[tuple[str, object, object]]:
    """(name, value then, value now) of settings that are not equal; names of nested ones are joined by dots."""
    differing: list[tuple[str, object, object]] = []
    for key in sorted(made.keys() | now.keys()):
        before, after = made.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differing += differences(before, after, f"{where}{key}.")
        elif before != after:
            differing.append((f"{where}{key}", before, after))
    return differing


class Jobs:
    """The jobs of one output; only one process at a time has them open.

    Work on which no job is finished binds nobody: it is deleted when it is closed.

    Args:
        place: the log, or, with ``streams``, a folder that holds it, them, and whatever else the work needs.
        streams: names of the files in the folder that grow with the jobs.

    Attributes:
        settings: those the work was begun with; {} before `begin` where nothing was begun.
        head: the log's first line: the settings, and what `restart` was given beside them.
        lines: where the line of each finished job begins, by the job's name. A subclass may keep another index
            (`_finished`).

    Raises:
        UserError: another process has them open.
    """

    def __init__(self, place: Path, streams: Sequence[str] | None = None) -> None:
        self.place = place
        self.lines: dict[object, int] = {}
        self._folder = place if streams is not None else None
        self._log = place if streams is None else place / LOG
        self._names = tuple(streams or ())
        self._streams: dict[str, BinaryIO] = {}
        self._empty, self._size = True, 0
        self._reader: BinaryIO | None = None
        self._file = self._open()
        try:
            first = self._lines()
            _, self.head = next(first, (0, {}))
            self._empty = next(first, None) is None
            first.close()
        except BaseException:
            self._file.close()
            raise

    @property
    def settings(self) -> Line:
        return self.head.get("settings", {})

    def _open(self) -> BinaryIO:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = self._log.open("ab", buffering=0)
            try:
                lock(file, self.place)
            except UserError:
                file.close()
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._log.stat()):
                    return file
            file.close()  # of a process that has just finished, and removed it
            self._log.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._empty:
            self.remove()
        self.close()

    def close(self) -> None:
        for file in (*self._streams.values(), self._reader, self._file):
            if file is not None:
                file.close()

    def remove(self) -> None:
        """Deletes the work: its output is complete, or there is none."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self._log.unlink(missing_ok=True)

    def begin(
        self,
        settings: Mapping[str, object],
        preparation: Sequence[object] = (),
        head: Mapping[str, object] | None = None,
    ) -> None:
        """Resumes the work, or begins it where nothing is finished.

        Args:
            settings: all that decides the output.
            preparation: jobs that other settings need not respect: nothing is lost if they are done again.
            head: see `restart`.

        Raises:
            UserError: jobs were finished under other settings, or the log is damaged.
        """
        settings = json.loads(json.dumps(settings))
        if differing := differences(self.settings, settings):
            if any(job["job"] not in preparation for _, job in self._jobs()):
                name, before, after = differing[0]
                raise UserError(
                    "unfinished-other-settings",
                    f"{self.place}: begun with {name} = {before!r}, now {after!r}; repeat the first settings to "
                    "resume, or delete it to start again",
                )
            self._empty = True
        elif not self._empty:
            self._resume()
        if self._empty:
            self.restart(settings, head)

    def restart(self, settings: Mapping[str, object], head: Mapping[str, object] | None = None) -> None:
        """Begins anew, whatever is finished; ``head`` is what the first line says beside the settings."""
        self.lines.clear()
        for path in self._folder.iterdir() if self._folder is not None else ():
            if path != self._log:
                path.unlink() if not path.is_dir() else shutil.rmtree(path)
        self._empty, self._size, self.head = True, 0, {"settings": dict(settings), **(head or {})}
        self._file.truncate(0)
        self._open_streams(dict.fromkeys(self._names, 0))
        self._write(self.head)

    def _resume(self) -> None:
        sizes = dict.fromkeys(self._names, 0)
        self._empty, self._size = True, 0
        for start, job in self._jobs():
            # A power failure may have cost a stream what the log speaks of; then this job and the later are done again.
            if any(self._length(name) < size for name, size in job.get("sizes", {}).items()):
                break
            self._finished(job, start)
            self._empty, self._size = False, self._end
            sizes |= job.get("sizes", {})
        if not self._empty:
            self._file.truncate(self._size)
            self._open_streams(sizes)

    def _length(self, name: str) -> int:
        path = self.stream(name)
        return path.stat().st_size if path.is_file() else 0

    def _open_streams(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            self.stream(name).parent.mkdir(exist_ok=True)
            self._streams[name] = file = self.stream(name).open("ab", buffering=0)
            file.truncate(size)
            file.seek(size)

    def _lines(self) -> Generator[tuple[int, Line]]:
        """Where each whole line begins, and what it says; `_end` is where it ends."""
        self._end = 0
        with self._log.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                record = parse_line(line, f"{self._log}:{number}")
                if ("settings" if number == 1 else "job") not in record:
                    raise UserError(
                        "unfinished-other-version",
                        f"{self._log}:{number}: not a line of unfinished work of this version; delete {self.place} to "
                        "start again",
                    )
                start, self._end = self._end, self._end + len(line)
                yield start, record

    def _jobs(self) -> Iterator[tuple[int, Line]]:
        lines = self._lines()
        next(lines, None)
        yield from lines

    def _finished(self, job: Line, start: int) -> None:
        """Keeps where a finished job's line begins; called for each when the work is resumed, and by `add`."""
        name = job["job"]
        self.lines[tuple(name) if isinstance(name, list) else name] = start

    def __contains__(self, name: object) -> bool:
        return name in self.lines

    @property
    def empty(self) -> bool:
        """Whether no job is finished."""
        return self._empty

    def add(self, name: object, known: Mapping[str, object], parts: Mapping[str, bytes] | None = None) -> None:
        """Notes a finished job.

        Args:
            name: any value of JSON.
            known: what its line says beside the name.
            parts: what each stream gets.

        Raises:
            UserError: the disk is full; the job is not noted, and others still can be.
        """
        job: Line = {"job": name, **known}
        start, before = self._size, {stream: self._streams[stream].tell() for stream in parts or ()}
        try:
            for stream, part in (parts or {}).items():
                self._append(self._streams[stream], part)
            if self._names:
                job["sizes"] = {stream: file.tell() for stream, file in self._streams.items()}
            self._write(job)
        except UserError:
            for stream, size in before.items():
                self._streams[stream].truncate(size)
                self._streams[stream].seek(size)
            raise
        self._empty = False
        self._finished(job, start)

    def _write(self, record: Mapping[str, object]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            self._append(self._file, line)
        except UserError:
            self._file.truncate(self._size)
            raise
        self._size += len(line)

    def _append(self, file: BinaryIO, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise UserError(
                "write-failed",
                f"{self.place}: {system_reason(error)}; make room and repeat the command, what is finished is kept",
            ) from None

    def read(self, start: int) -> Line:
        """The job whose line begins at a byte of the log."""
        if self._reader is None:
            self._reader = self._log.open("rb")
        self._reader.seek(start)
        return parse_line(self._reader.readline(), f"{self._log}, byte {start}")

    def finished(self) -> Iterator[Line]:
        """The finished jobs, in the order they were finished in."""
        for _, job in self._jobs():
            yield job

    def stream(self, name: str) -> Path:
        """The file of a stream."""
        return self.place / name

    def put(self, targets: Mapping[str, str | Path]) -> None:
        """Gives streams their places as files of the output; then no job can be added.

        The work stays until it is removed, so that a kill in between costs no job.
        """
        for file in self._streams.values():
            file.close()
        for name, target in targets.items():
            put_file(self.stream(name), Path(target))


def lock(file: BinaryIO, place: Path) -> None:
    """Locks an open file until it is closed, so that no second process writes there.

    Raises:
        UserError: another process has locked it.
    """
    with contextlib.suppress(OSError):  # some network file systems have no locks
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "output-in-use", f"{place}: another process is writing it; wait for its end, or end it first"
            ) from None
