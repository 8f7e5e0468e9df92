"""A conversion killed at any moment, or out of disk, leaves nothing that loads and no finished model the worse."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from convert_child import convert
from refusals import check_refusal
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.start import check_weights, is_megatron_folder
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.training.convert import main


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
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        assert run(main, list(map(str, command))) == 0, output.getvalue()


def command(home: Home, direction: str, target: Path) -> list[str]:
    ways = {
        "hf-to-megatron": ["--hf-path", home.folder / "hf", "--save", target],
        "megatron-to-hf": ["--load", home.folder / "megatron", "--save-hf", target, "--max-shard-size", "20kB"],
    }
    return [direction, *map(str, ways[direction])]


def contents(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a complete Hugging Face folder, marks of a complete Megatron folder, None of anything else."""
    if not (folder / "config.json").is_file():
        return None
    try:
        check_weights(folder, read_hf_config(folder), padded_vocab_size=128)
    except UserError:
        return None
    if is_megatron_folder(folder):
        return {path.name: torch.tensor(path.stat().st_size) for path in (folder / "release").glob("*.distcp")}
    reader = TensorReader(folder)
    return {name: reader.get(name) for name in sorted(reader.names())}


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> bool:
    if one is None or other is None or one.keys() != other.keys():
        return one is other
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
def test_a_conversion_killed_again_and_again(home: Home, direction: str, existing: bool, tmp_path: Path) -> None:
    """At changes of files from the first to the last one, with what the kill before left where less is left to do than
    that: the folder is what it was, and the same command ends well. Only between two renames at the end an earlier
    model is under another name."""
    kind = direction.rpartition("-")[2]
    earlier, wanted = (contents(home.folder / name) for name in (f"earlier-{kind}", kind))
    target, printed = tmp_path / "work" / "target", tmp_path / "printed"
    target.parent.mkdir()

    def restore() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if existing:
            shutil.copytree(home.folder / f"earlier-{kind}", target)

    argv = [*command(home, direction, target), *(["--overwrite"] if existing else [])]
    restore()
    assert convert(argv, printed, moment=0) == 0, printed.read_text()
    last = int(re.search(r"changes: (\d+)", printed.read_text())[1])
    restore()
    seen = []
    for moment in (1, last // 3, last // 3, last - 2, last - 1, last):
        if moment >= last - 2:
            shutil.rmtree(target.with_name("target.partial"), ignore_errors=True)
        assert convert(argv, printed, moment=moment) == -signal.SIGKILL, printed.read_text()
        present = contents(target)
        seen.append("wanted" if same(present, wanted) else "earlier" if same(present, earlier) else "none")
        if present is None:
            assert not target.exists()
        if present is None and existing:
            assert same(contents(target.with_name("target.replaced")), earlier)
            # A command that then refuses to overwrite it has renamed it back.
            assert convert(command(home, direction, target), printed) == 2 and "[folder-exists]" in printed.read_text()
            assert same(contents(target), earlier)
        elif seen[-1] == "wanted":
            restore()
    assert seen[:3] == ["earlier" if existing else "none"] * 3 and (not existing or "none" in seen), seen
    succeed(argv)
    assert same(contents(target), wanted) and [path.name for path in target.parent.iterdir()] == ["target"]


def test_files_that_are_complete_are_kept_for_the_same_checkpoint_alone(home: Home, tmp_path: Path) -> None:
    """Killed half way: the same command writes the rest, another checkpoint under the same name all."""
    source, target, printed = tmp_path / "megatron", tmp_path / "work" / "target", tmp_path / "printed"
    target.parent.mkdir()
    aside = target.with_name("target.partial")
    shutil.copytree(home.folder / "megatron", source)
    argv = ["megatron-to-hf", "--load", str(source), "--save-hf", str(target), "--max-shard-size", "20kB"]

    def complete() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in aside.glob("*.safetensors")}

    assert convert(argv, printed, moment=0) == 0, printed.read_text()
    half = int(re.search(r"changes: (\d+)", printed.read_text())[1]) // 2
    shutil.rmtree(target)
    assert convert(argv, printed, moment=half) == -signal.SIGKILL, printed.read_text()
    kept = complete()
    (aside / max(kept)).write_bytes(b"cut")  # not by this command
    kept.pop(max(kept))
    assert kept and convert(argv, printed) == 0, printed.read_text()
    count = len([*target.glob("*.safetensors")])
    assert f"{target}: {len(kept)} of {count} files were complete before, and are kept\n" in printed.read_text()
    assert same(contents(target), contents(home.folder / "hf")) and not (target / "unfinished.txt").exists()
    assert {name: (target / name).stat().st_ino for name in kept} == kept
    shutil.rmtree(target)

    assert convert(argv, printed, moment=half) == -signal.SIGKILL and complete(), printed.read_text()
    shutil.rmtree(source)
    upcast = tmp_path / "float32"
    succeed(["megatron-to-hf", "--load", home.folder / "earlier-megatron", "--dtype", "float32", "--save-hf", upcast])
    succeed(["hf-to-megatron", "--hf-path", upcast, "--save", source])
    assert convert(argv, printed) == 0 and " are kept" not in printed.read_text()
    assert same(contents(target), contents(upcast)) and not same(contents(target), contents(home.folder / "hf"))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_one_line(home: Home, direction: str, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    disk, printed = tmp_path / "disk", tmp_path / "printed"
    disk.mkdir()
    assert convert(command(home, direction, disk / "target"), printed, disk=48 * 1024) == 2, printed.read_text()
    option = {"hf-to-megatron": "--save", "megatron-to-hf": "--save-hf"}[direction]
    message = check_refusal(printed.read_text(), "write-failed", f"{option} {disk}/target: ")
    assert "No space left on device" in message or "File too large" in message
    assert "left: []" in printed.read_text() and "Traceback" not in printed.read_text()
