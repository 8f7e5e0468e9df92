"""The jobs file: the finished jobs of a command, so that the same command, repeated after a kill, does only the rest.

A log of JSON lines. The first line holds the settings that the work started with, every other line a finished job: its
name and its results. Large results go to streams, files beside the log that grow with the jobs; the line of a job has
the size of each stream after it. A kill therefore loses the jobs in flight and nothing else: the next start drops a
line that is not complete, and truncates the streams to the sizes in the last complete line.
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
"""A line of a log. This package wrote it, so that its fields are not validated."""


def differences(
    earlier: Mapping[str, object], now: Mapping[str, object], where: str = ""
) -> list[tuple[str, object, object]]:
    """Returns (name, earlier value, value now) of settings that are not equal; names of nested ones are joined by
    dots."""
    differing: list[tuple[str, object, object]] = []
    for key in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differing += differences(before, after, f"{where}{key}.")
        elif before != after:
            differing.append((f"{where}{key}", before, after))
    return differing


class Jobs:
    """The jobs of one output; only one process at a time has them open.

    Work without a finished job is deleted when it is closed, and so restricts no later command.

    Args:
        place: the log, or, with ``streams``, a folder that holds the log, the streams and other files of the work.
        streams: names of the files in the folder that grow with the jobs.

    Attributes:
        settings: those that the work started with; {} before `begin` of new work.
        head: the log's first line: the settings, and the ``head`` of `restart`.
        lines: byte offset of the line of each finished job, by the job's name. A subclass may keep another index
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
            file.close()  # another process has just finished and removed this file
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
        """Deletes the work, when its output is complete or no job is finished."""
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
        """Resumes the work, or starts it where no job is finished.

        Args:
            settings: everything that determines the output.
            preparation: names of jobs that are cheap: with other settings they are done again, without an error.
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
                    f"{self.place}: was started with {name} = {before!r}, now {after!r}; repeat the first settings to "
                    "resume, or delete it to start again",
                )
            self._empty = True
        elif not self._empty:
            self._resume()
        if self._empty:
            self.restart(settings, head)

    def restart(self, settings: Mapping[str, object], head: Mapping[str, object] | None = None) -> None:
        """Discards the finished jobs and starts again; ``head`` holds further fields of the first line."""
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
            # A power failure may leave a stream shorter than the log records: this and later jobs are done again.
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
        """Yields (byte offset, record) of each complete line; `_end` is the offset of its end."""
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
        """Keeps the offset of a finished job's line; called for each job when the work is resumed, and by `add`."""
        name = job["job"]
        self.lines[tuple(name) if isinstance(name, list) else name] = start

    def __contains__(self, name: object) -> bool:
        return name in self.lines

    @property
    def empty(self) -> bool:
        """Whether no job is finished."""
        return self._empty

    def add(self, name: object, results: Mapping[str, object], parts: Mapping[str, bytes] | None = None) -> None:
        """Records a finished job.

        Args:
            name: any JSON value.
            results: further fields of its line.
            parts: bytes to append to each stream.

        Raises:
            UserError: the disk is full; the job is not recorded, later ones can be.
        """
        job: Line = {"job": name, **results}
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
                f"{self.place}: {system_reason(error)}; free disk space and repeat the command (finished work is kept)",
            ) from None

    def read(self, start: int) -> Line:
        """Returns the job whose line is at a byte offset of the log."""
        if self._reader is None:
            self._reader = self._log.open("rb")
        self._reader.seek(start)
        return parse_line(self._reader.readline(), f"{self._log}, byte {start}")

    def finished(self) -> Iterator[Line]:
        """Yields the finished jobs, in the order they were finished in."""
        for _, job in self._jobs():
            yield job

    def stream(self, name: str) -> Path:
        """Returns the file of a stream."""
        return self.place / name

    def put(self, targets: Mapping[str, str | Path]) -> None:
        """Renames streams to files of the output; after that no job can be added.

        The log stays until `remove`, so that a kill in between loses no job.
        """
        for file in self._streams.values():
            file.close()
        for name, target in targets.items():
            put_file(self.stream(name), Path(target))


def lock(file: BinaryIO, place: Path) -> None:
    """Locks an open file until it is closed, so that no second process writes to the same output.

    Raises:
        UserError: another process has locked it.
    """
    with contextlib.suppress(OSError):  # not every network file system has locks
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "output-in-use", f"{place}: another process is writing it; wait for its end, or end it first"
            ) from None
