"""Files that appear whole or not at all; folders are in test_places.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from megatron_solopo import atomic


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "new" / "a.txt", []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(
        Path, "rename", lambda source, to: (events.append(f"{source.name} -> {to.name}"), rename(source, to))
    )
    atomic.write_text(path, "äb")
    assert path.read_text(encoding="utf-8") == "äb"
    assert events == ["a.txt.new", "a.txt.new -> a.txt", "new"] and sync is not os.fsync
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask  # colleagues can read what the umask lets them


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.new_file(path, shared=shared) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_shared_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic.new_file(path, "wb", shared=True) as one, atomic.new_file(path, "wb", shared=True) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]  # the last to end


def test_leftovers_of_a_kill_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.file_aside(path).write_text("half of a longer text")
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_a_finished_file_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: Path) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    source, path = tmp_path / "work", tmp_path / "deep" / "a.txt"
    source.write_text("done")
    path.parent.mkdir()
    atomic.file_aside(path).write_text("left by a kill")
    for _ in range(2):
        atomic.put_file(source, path)
        assert path.read_text() == source.read_text() == "done" and list(path.parent.iterdir()) == [path]
