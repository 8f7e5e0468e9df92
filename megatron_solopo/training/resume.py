"""How a run starts: new, from a checkpoint of --load, or with --auto-resume from the latest one of --save."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from pathlib import Path

import torch.distributed as dist

from megatron_solopo.atomic import check_place, write_text
from megatron_solopo.config import Config, flag
from megatron_solopo.conversion.manifest import (
    find_checkpoint,
    latest_iteration,
    write_latest,
)
from megatron_solopo.conversion.places import check_apart, check_target, holds_model, named_folder
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.platform import agreed
from megatron_solopo.training.reference import cache_folder, has_cache, shared

EXPORT = "export.json"
"""The file of a run folder that records what --save-hf holds, or is about to hold."""


def check_shared_folder(folder: Path, patience: float = 5.0) -> None:
    """Refuses a run folder that a rank does not share with rank 0, because all ranks write into one checkpoint;
    collective, where there are processes.

    Args:
        patience: seconds to wait; a network file system may show a new file late.

    Raises:
        UserError: names the rank and its machine.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    probe, added = shared(lambda: _probe(folder), "folders")

    def look() -> None:
        start = time.monotonic()
        while probe and not (folder / probe).exists():
            if time.monotonic() - start > patience:
                raise UserError(
                    "folder-not-shared",
                    f"--save {folder}: is not rank 0's folder there, and all ranks write into one checkpoint; use a "
                    "folder on a disk that all nodes share",
                )
            time.sleep(0.1)

    try:
        agreed(look, "folders")
    finally:
        # No rank continues before: one that looks at the folder meanwhile sees it disappear.
        shared(lambda: _remove_probe(folder, probe, added), "folders")


def _probe(folder: Path) -> tuple[str | None, list[Path]]:
    """Returns the name of a new file in a folder, and the folders created for it; (None, []) where it cannot be
    written, which other checks report."""
    added = [path for path in (folder, *folder.parents) if not path.exists()]
    name = f".shared-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None, []
    return name, added


def _remove_probe(folder: Path, probe: str | None, added: list[Path]) -> None:
    if probe:
        with contextlib.suppress(OSError):
            (folder / probe).unlink()
            for path in added:
                path.rmdir()


APART = (
    "save",
    "load",
    "hf_path",
    "chat_template",
    "train_data",
    "valid_data",
    "eval_generate",
    "tensorboard_dir",
    "wandb_save_dir",
)
"""Options with paths that --save-hf must not replace."""


def check_folders(config: Config) -> None:
    """Refuses to overwrite an earlier run or an exported model before any work is done.

    Raises:
        UserError: a folder is in use, missing or not a folder.
    """
    output = config.output
    save, load = Path(output.save), output.load
    for name in ("save", "tensorboard_dir"):
        if (folder := config.value(name)) is not None:
            check_place(flag(name), folder)
            if Path(folder).exists() and not Path(folder).is_dir():
                raise UserError("not-a-folder", f"{flag(name)} {folder}: is not a folder; choose another name")
    has_checkpoint = latest_iteration(save) is not None
    if load is None and has_checkpoint and not output.auto_resume:
        raise UserError(
            "run-exists",
            f"--save {save}: holds checkpoints of an earlier run; resume it with --load {save} or --auto-resume, "
            "or choose another folder",
        )
    if load is not None and not _same_folder(load, save) and has_checkpoint:
        raise UserError(
            "run-exists",
            f"--save {save}: holds checkpoints of another run than --load {load}; "
            f"resume with --save {load}, or choose an empty folder",
        )
    if load is not None and not Path(load).is_dir():
        raise UserError("folder-missing", f"--load {load}: no such folder; leave --load out to start a new run")
    if load is not None and output.ckpt_step is None and latest_iteration(load) is None:
        find_checkpoint(load, None)
    if output.save_hf is not None:
        target = named_folder(flag("save_hf"), output.save_hf)
        others = {flag(name): config.value(name) for name in APART}
        if has_cache(config.method):
            others[flag("reference_cache")] = cache_folder(config)
        check_apart(flag("save_hf"), target, others, run=save)
        if not (output.auto_resume and has_checkpoint):
            # With --auto-resume the run may have exported, and been killed before its first checkpoint.
            resumes = output.auto_resume or (load is not None and _same_folder(load, save))
            check_target(flag("save_hf"), target, output.overwrite, filling=resumes and output.save_hf_interval > 0)


def find_start(config: Config) -> Path | None:
    """Returns the checkpoint to resume from, after its files were checked, or None for a new run.

    Raises:
        UserError: see `find_checkpoint`.
    """
    output = config.output
    if output.load is not None:
        return find_checkpoint(output.load, output.ckpt_step)
    if output.auto_resume and latest_iteration(output.save) is not None:
        return find_checkpoint(output.save, None, "--save")
    return None


def nothing_left(config: Config, resumed: int, steps: int) -> bool:
    """Whether an earlier start of the same command did all its work.

    Raises:
        UserError: --save-hf holds a model of another run.
    """
    output = config.output
    if not (output.auto_resume and resumed):
        return False
    if not output.save_hf:
        return resumed == steps
    state = _noted_export(config)
    exported = state == _noted(config, steps, complete=True) and holds_model(Path(output.save_hf))
    if exported and resumed == steps:
        return True
    if resumed == steps and state is None and not output.overwrite and holds_model(Path(output.save_hf)):
        raise UserError(
            "folder-exists",
            f"--save-hf {output.save_hf}: exists already, and {Path(output.save) / EXPORT} does not record it as this "
            "run's export; choose another folder, or overwrite it with --overwrite",
        )
    check_target(flag("save_hf"), Path(output.save_hf), output.overwrite or state is not None, filling=True)
    return False


def export_folder(config: Config) -> Path:
    """Returns --save-hf of a run that has it."""
    assert config.output.save_hf is not None
    return Path(config.output.save_hf)


def begin_export(config: Config, steps: int) -> None:
    """Records in the run folder that --save-hf is about to be this run's model, so that a start after a kill can
    distinguish it from an older model there.

    Raises:
        UserError: --save-hf holds another run's model.
    """
    of_this_run = _noted_export(config) is not None
    check_target(flag("save_hf"), export_folder(config), config.output.overwrite or of_this_run, filling=True)
    write_text(Path(config.output.save) / EXPORT, json.dumps(_noted(config, steps, complete=False)) + "\n")


def export_is_complete(config: Config, steps: int) -> None:
    """Records that --save-hf is the model of the run's last step."""
    write_text(Path(config.output.save) / EXPORT, json.dumps(_noted(config, steps, complete=True)) + "\n")


def forget_export(config: Config) -> None:
    """Deletes the record of an export, which is not the model that this start will train."""
    (Path(config.output.save) / EXPORT).unlink(missing_ok=True)


def _noted(config: Config, steps: int, complete: bool) -> dict[str, str | int]:
    return {"save_hf": str(export_folder(config).resolve()), "step": steps, "complete": complete}


def _noted_export(config: Config) -> dict[str, str | int] | None:
    """Returns the record of --save-hf, or None where there is none or it is of another folder."""
    try:
        note = json.loads((Path(config.output.save) / EXPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    of_folder = isinstance(note, dict) and note.get("save_hf") == _noted(config, 0, complete=False)["save_hf"]
    return note if of_folder else None


def go_back(config: Config) -> None:
    """Removes what the run folder records beyond the checkpoint that this start resumes from."""
    output = config.output
    if output.load is None:
        return  # --auto-resume resumes from the latest
    if not _same_folder(output.load, output.save):
        forget_export(config)  # of a run whose checkpoints are gone
    elif output.ckpt_step is not None:
        forget_export(config)
        write_latest(Path(output.save), output.ckpt_step)


def _same_folder(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
