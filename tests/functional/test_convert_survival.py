"""A conversion killed at any moment, or out of disk, leaves nothing that loads and no finished model the worse."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.start import check_weights, is_megatron_folder
from megatron_solopo.errors import UserError
from megatron_solopo.training.convert import main

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile"}
"""What Python tells of a change of files, before it happens."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The home's model in both forms, and the same with other weights as `earlier` ones."""
    home = furnish(tmp_path_factory.mktemp("home"))
    succeed(["hf-to-megatron", "--hf-path", home.folder / "hf", "--save", home.folder / "megatron"])
    write = ["megatron-to-hf", "--load", home.folder / "megatron", "--dtype", "bfloat16"]
    succeed([*write, "--save-hf", home.folder / "earlier-hf"])
    succeed(["hf-to-megatron", "--hf-path", home.folder / "earlier-hf", "--save", home.folder / "earlier-megatron"])
    return home


def succeed(command: list) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert run(main, list(map(str, command))) == 0, said.getvalue()


def command(home: Home, direction: str, target: Path) -> list[str]:
    ways = {
        "hf-to-megatron": ["--hf-path", home.folder / "hf", "--save", target],
        "megatron-to-hf": ["--load", home.folder / "megatron", "--save-hf", target, "--max-shard-size", "20kB"],
    }
    return [direction, *map(str, ways[direction])]


def in_a_child(argv: list[str], before: Callable[[], None], told: Path) -> int:
    """Exit status of a command in a process forked from this one, in which ``before`` runs first."""

    def work() -> None:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        before()
        status = run(main, argv)
        print("left:", os.listdir(Path(argv[4]).parent), flush=True)  # a disk of this process ends with it
        os._exit(status)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    return child.exitcode


def kill_at(moment: int, folder: Path) -> None:
    """Kills this process, as SIGKILL does, before its ``moment``-th change of files in a folder."""
    left = [moment]

    def see(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.fsdecode(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def contents(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a complete Hugging Face folder, marks of a complete Megatron folder, None of anything else."""
    if not (folder / "config.json").is_file():
        return None
    try:
        check_weights(folder)
    except UserError:
        return None
    if is_megatron_folder(folder):
        return {path.name: torch.tensor(path.stat().st_size) for path in (folder / "iter_0000000").glob("*.distcp")}
    reader = TensorReader(folder)
    return {name: reader.get(name) for name in sorted(reader.names())}


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> bool:
    if one is None or other is None or one.keys() != other.keys():
        return one is other
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
def test_a_killed_conversion(home: Home, direction: str, existing: bool, tmp_path: Path) -> None:
    """At every third change of files, the first and the last ones: the folder is what it was, and the same command
    ends well. Only between two renames at the end an earlier model stands under another name for a moment."""
    kind = direction.rpartition("-")[2]
    earlier, wanted = (contents(home.folder / name) for name in (f"earlier-{kind}", kind))
    target = tmp_path / "work" / "target"
    argv = [*command(home, direction, target), *(["--force"] if existing else [])]
    killed = 0
    for moment in itertools.chain([1, 2], itertools.count(3, 3)):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if existing:
            shutil.copytree(home.folder / f"earlier-{kind}", target)
        status = in_a_child(argv, lambda moment=moment: kill_at(moment, target.parent), tmp_path / "told")
        if status == 0:
            break
        killed += 1
        assert status == -signal.SIGKILL, (tmp_path / "told").read_text()
        found = contents(target)
        if existing and found is None:
            assert not target.exists() and same(contents(target.with_name("target.replaced")), earlier)
        else:
            assert found is None or same(found, earlier if existing else wanted) or same(found, wanted)
            assert existing or found is None or moment > 3
        succeed([*argv, *([] if existing or found is None else ["--force"])])
        assert same(contents(target), wanted) and [path.name for path in target.parent.iterdir()] == ["target"]
    assert killed >= 5 and same(contents(target), wanted)


def small_disk(folder: Path, size: int) -> None:
    """A real disk of so many bytes in a folder, seen by this process alone; where no user may mount one, a limit on the
    size of a file."""
    user, group = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    except (OSError, subprocess.CalledProcessError):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 8, resource.RLIM_INFINITY))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_one_line(home: Home, direction: str, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    disk, told = tmp_path / "disk", tmp_path / "told"
    disk.mkdir()

    def before() -> None:
        small_disk(disk, 48 * 1024)

    assert in_a_child(command(home, direction, disk / "target"), before, told) == 2, told.read_text()
    full = r"(No space left on device|File too large)"
    answers = {
        "hf-to-megatron": rf"^error: --save \S+/disk/target: not written \({full}\)$",
        "megatron-to-hf": rf"^error: --save-hf \S+/disk/target: {full}; .*export it elsewhere$",
    }
    assert re.search(answers[direction], told.read_text(), re.M), told.read_text()
    assert "left: []" in told.read_text() and "Traceback" not in told.read_text()
