"""Folders that appear whole or not at all: what they replace, what stays, and what is refused before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refused

from megatron_solopo.atomic import folder_aside
from megatron_solopo.config import Config, flag
from megatron_solopo.conversion.hf_folder import write_folder
from megatron_solopo.conversion.places import check_apart, check_target, put_in_place, restore
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.training.resume import check_folders

TENSORS = {"weight": torch.arange(6.0)}


def write(folder: Path, text: str = "new", **options: bool) -> None:
    """A folder of one tensor, whose config.json and tokenizer.json hold ``text``."""
    source = folder.parent / "source"
    source.mkdir(exist_ok=True)
    (source / "tokenizer.json").write_text(text)
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    write_folder(folder, SidecarFiles(source, text), shapes, torch.float32, iter(TENSORS.items()), **options)


def model(folder: Path, *others: str) -> Path:
    """What passes for a model: config.json, and other files by their names."""
    folder.mkdir(parents=True)
    for name in ("config.json", *others):
        (folder / name).write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITTEN = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("force", [True, False])
def test_nothing_of_an_earlier_model_stays_but_those_of_the_steps(tmp_path: Path, force: bool) -> None:
    """Its chat template or pickled weights would be read in place of the new ones. Without --overwrite there is no
    model yet, only those of the steps so far."""
    folder = tmp_path / "hf"
    if force:
        model(folder, "chat_template.jinja", "pytorch_model.bin", "model-00002-of-00002.safetensors")
    model(folder / "iter_0000002")
    model(folder / "iter_0000004", "model.bin")
    (folder / "iter_0000006.partial").mkdir()
    write(folder, force=force)
    assert names(folder) == ["config.json", "iter_0000002", "iter_0000004", *WRITTEN[1:]]
    assert names(folder / "iter_0000004") == ["config.json", "model.bin"]
    assert names(tmp_path) == ["hf", "source"]


def test_checkpoints_of_an_earlier_model_do_not_stay(tmp_path: Path) -> None:
    """A Megatron folder that is overwritten would still be loaded from its iteration 0."""
    folder = model(tmp_path / "hf")
    (folder / "iter_0000000").mkdir()
    write(folder, force=True)
    assert names(folder) == WRITTEN


@pytest.mark.parametrize("left", [["config.json"], ["weights"]], ids=["whole", "half deleted"])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_model_of_a_step_killed_while_it_was_replaced(tmp_path: Path, replaced: bool, left: list[str]) -> None:
    """It is the only one before the new one has its name, and of no use behind that."""
    folder = tmp_path / "hf"
    earlier = folder / "iter_0000003.replaced"
    earlier.mkdir(parents=True)
    for name in left:
        (earlier / name).write_text("earlier")
    if replaced:
        model(folder / "iter_0000003")
    check_target("--save-hf", folder, force=False, filling=True)
    write(folder)
    whole = replaced or left == ["config.json"]
    assert names(folder) == ["config.json", *(["iter_0000003"] if whole else []), *WRITTEN[1:]]
    if whole:
        assert (folder / "iter_0000003/config.json").read_text() == ("old" if replaced else "earlier")


@pytest.mark.parametrize("existing", [True, False], ids=["over a model", "around models of the steps"])
@pytest.mark.parametrize("moment", range(5))
def test_killed_between_renames(tmp_path: Path, moment: int, existing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One complete model is there or beside it, and the next command finds the models of all steps."""
    folder = tmp_path / "hf"
    for name in ("iter_0000002", "iter_0000004"):
        model(folder / name)
    if existing:
        (folder / "config.json").write_text("old")
    aside = model(folder_aside(folder))
    (aside / "config.json").write_text("new")
    rename, done = Path.rename, []

    def until_killed(path: Path, target: Path) -> Path:
        if len(done) == moment:
            raise KeyboardInterrupt
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", until_killed)
    try:
        put_in_place(aside, folder)
    except KeyboardInterrupt:
        assert moment < 4
    monkeypatch.undo()
    restore(folder)
    assert [name for name in names(folder) if name != "config.json"] == ["iter_0000002", "iter_0000004"]
    earlier = "old" if existing else None
    config = folder / "config.json"
    assert (config.read_text() if config.exists() else None) == (earlier if moment < 2 else "new")
    assert names(tmp_path) == (["hf", "hf.partial"] if moment < 2 else ["hf"])


def test_a_link_is_followed_again_and_again(tmp_path: Path) -> None:
    """The folder that it leads to is written, and aside on that disk, not beside the link."""
    disk, home = tmp_path / "disk", tmp_path / "home"
    disk.mkdir()
    home.mkdir()
    (home / "link").symlink_to(disk / "hf")
    for text in ("first", "second", "third"):
        write(home / "link", text, force=True)
        assert (home / "link").is_symlink() and (disk / "hf" / "config.json").read_text() == text
        assert names(disk / "hf") == WRITTEN and names(disk) == ["hf"] and names(home) == ["link", "source"]


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("precious")


def run_folder(folder: Path) -> None:
    (folder / "iter_0000002").mkdir(parents=True)


def file(folder: Path) -> None:
    folder.write_text("precious")


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    ("make", "code"),
    [(adapter, "folder-not-a-model"), (run_folder, "folder-not-a-model"), (file, "not-a-folder")],
)
def test_what_is_not_a_model_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], None], code: str, force: bool
) -> None:
    """Not even at the end of a run, where it came after the start; no tensor is read for it."""
    make(tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    with refused(code, f"--save-hf {tmp_path}/mine: "):
        check_target("--save-hf", tmp_path / "mine", force, filling=True)
    read = []
    tensors = ((name, read.append(name) or tensor) for name, tensor in TENSORS.items())
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    with refused(code, f"--save-hf {tmp_path}/mine: "):
        write_folder(tmp_path / "mine", SidecarFiles(tmp_path, "{}"), shapes, torch.float32, tensors, force=force)
    assert not read and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["disk", "bound", "bound here"])
def test_a_mount_point_is_refused_with_a_folder_inside_it(tmp_path: Path, name: str) -> None:
    """A separate disk, and a folder of the same disk, as containers have them."""
    for folder in ("disk", "bound", "bound here", "elsewhere"):
        (tmp_path / folder).mkdir()
    script = (
        "mount -t tmpfs tmpfs disk && mount --bind elsewhere bound && mount --bind elsewhere 'bound here' || exit 77\n"
        f'exec {sys.executable} -c "from pathlib import Path\n'
        "from megatron_solopo.conversion.places import check_target\n"
        f"check_target('--save-hf', Path('{name}/inside'), True)\n"
        f"check_target('--save-hf', Path('{name}'), True)\""
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("this machine lets no user mount anything")
    last = done.stderr.splitlines()[-1]
    assert f"--save-hf {name}: is a mount point" in last and last.endswith(f": {name}/model"), done.stderr


@pytest.mark.parametrize("target", ["out", "out/model", "link", "out/model/megatron.partial/x/..", "new"])
def test_a_target_never_replaces_a_source(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "out/model/megatron")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    others = {"--hf-path": None, "--load": source}
    if target in ("out", "out/model", "link"):
        with refused("folder-overlap", f"--save {target}: ", f"--load {source}"):
            check_apart("--save", Path(target), others)
    else:
        check_apart("--save", Path(target), others)
    check_apart("--save", Path("out/model/megatron/hf"), others)
    for kept in (folder_aside(source), source.with_name("megatron.replaced")):  # both are emptied on the way
        with refused("folder-overlap", f"--save {source}: ", f"--load {kept}"):
            check_apart("--save", source, {"--load": kept})


@pytest.mark.parametrize("target", [".", "..", "../work"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with refused("folder-overlap", f"--save {target}: ", f"the folder that the command runs in, {tmp_path}/work"):
        check_apart("--save", Path(target), {})


@pytest.mark.parametrize("option", ["save", "save_hf", "tensorboard_dir"])
@pytest.mark.parametrize("below", ["", "/new/folder"], ids=["a file", "below a file"])
def test_a_run_does_not_write_where_a_file_is(tmp_path: Path, option: str, below: str) -> None:
    """Before any work, and by the flag: the system's own error names the file alone."""
    (tmp_path / "file").write_text("")
    config = Config()
    for name, value in ({"save": f"{tmp_path}/run"} | {option: f"{tmp_path}/file{below}"}).items():
        config.assign(name, value)
    with refused("not-a-folder", f"{flag(option)} {tmp_path}/file{below}: ", "choose another"):
        check_folders(config)
