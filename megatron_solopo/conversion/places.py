"""Output folders of models: which may be replaced, and what is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_solopo.atomic import check_place, folder_aside, put_folder, replaced, restore_folder
from megatron_solopo.conversion.manifest import RELEASE, is_marked
from megatron_solopo.errors import UserError
from megatron_solopo.lora_options import CONFIG


def restore(folder: Path) -> None:
    """Completes a `put_in_place` that was killed."""
    restore_folder(folder, _keep_exports)


def put_in_place(aside: Path, folder: Path) -> None:
    """Renames a finished model; see `put_folder`."""
    put_folder(aside, folder, _keep_exports)


def _keep_exports(earlier: Path, folder: Path) -> None:
    """Moves the models of --save-hf-interval inside an earlier folder into the new one."""
    for path in list(earlier.glob("iter_*.replaced")):  # the replacement of a model inside was killed
        restore(path.with_suffix(""))
    for path in filter(_is_export, earlier.glob("iter_*")):
        if path.suffix != ".partial" and not (folder / path.name).exists():
            path.rename(folder / path.name)


def _is_export(path: Path) -> bool:
    """A model of --save-hf-interval, finished or not; the checkpoints of a run are none."""
    unfinished = path.suffix in (".partial", ".replaced")
    return path.name.startswith("iter_") and (unfinished or holds_model(path))


def holds_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model, or a PEFT folder of adapters."""
    return any((folder / name).is_file() for name in ("config.json", CONFIG))


def named_folder(option: str, text: str) -> Path:
    """Returns the folder that an option names.

    Raises:
        UserError: the text is empty, which would mean the current folder.
    """
    if not text:
        raise UserError("option-value", f"{option}: the name of the folder is empty; set one")
    return Path(text)


def check_target(option: str, folder: Path, force: bool, filling: bool = False) -> None:
    """Refuses a folder that cannot be written or must not be replaced, before any work is done.

    Args:
        option: the flag that names the folder.
        force: an existing model may be replaced.
        filling: a folder that holds only models of --save-hf-interval is accepted without ``force``.

    Raises:
        UserError: what the folder is, and what to do.
    """
    check_place(option, folder)
    real = folder.resolve()
    if not real.exists():
        return
    if not real.is_dir():
        raise UserError("not-a-folder", f"{option} {folder}: is not a folder; choose another name")
    if _is_mounted(real):
        raise UserError(
            "folder-mounted",
            f"{option} {folder}: is a mount point, which cannot be renamed; use a folder inside it: {folder / 'model'}",
        )
    model = holds_model(real)
    if not force and (model or not filling):
        raise UserError(
            "folder-exists",
            f"{option} {folder}: exists already; choose another folder, or overwrite it with --overwrite",
        )
    if not model and not all(map(_is_export, real.iterdir())):
        raise UserError(
            "folder-not-a-model",
            f"{option} {folder}: holds no model, and only models are replaced; choose another folder",
        )


def _is_mounted(folder: Path) -> bool:
    """Whether a folder is a mount point, by Linux's list too: `os.path.ismount` misses binds of the same disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        mounts = []
    return os.path.ismount(folder) or str(folder).replace(" ", r"\040") in (line.split()[4] for line in mounts)


def check_apart(option: str, folder: Path, others: Mapping[str, str | Path | None], run: Path | None = None) -> None:
    """Refuses a target that would replace a folder which the command reads or writes.

    The target may lie inside another folder, whose readers ignore unknown names; only the manifest of a checkpoint
    lists all files of its folder.

    Args:
        option: the flag that names the target.
        others: flag -> folder.
        run: the folder in which checkpoints will be written.

    Raises:
        UserError: naming both.
    """
    targets = (folder.resolve(), folder_aside(folder), replaced(folder))
    current = {"the folder that the command runs in,": Path.cwd()}  # else the shell's folder would be deleted
    for name, other in (others | current).items():
        # Also if nothing exists yet: the next start would find one model inside the other.
        if other is not None and any(Path(other).resolve().is_relative_to(target) for target in targets):
            raise UserError(
                "folder-overlap",
                f"{option} {folder}: would take the place of {name} {other}; choose a folder that does not hold it",
            )
    runs = (run.resolve(),) if run is not None else ()
    for place in (targets[0], *targets[0].parents):
        weights = place.name == RELEASE and is_marked(place)
        if weights or (place.name.startswith("iter_") and (is_marked(place) or place.parent in runs)):
            raise UserError(
                "folder-overlap",
                f"{option} {folder}: lies in the checkpoint {place}, whose manifest would not match; choose another "
                "folder",
            )
