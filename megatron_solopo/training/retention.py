"""Which checkpoints stay on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_solopo.conversion.manifest import MANIFEST, checkpoint_folder, is_marked, iterations


def surplus(folder: Path, latest: int, keep_last: int | None, retain_interval: int | None) -> list[Path]:
    """Checkpoint folders that --keep-last and --save-retain-interval let go.

    Args:
        latest: the newest complete checkpoint; it and whatever is newer always stay.
        keep_last: complete checkpoints that stay, ``latest`` included; None with a ``retain_interval`` means 1, as in
            Megatron, and without one that all stay.
        retain_interval: multiples of it stay for ever.
    """
    if keep_last is None and retain_interval is None:
        return []
    older = [number for number in iterations(folder) if number < latest]
    complete = [number for number in older if is_marked(checkpoint_folder(folder, number))]
    newest = complete[len(complete) - min((keep_last or 1) - 1, len(complete)) :]
    kept = {*newest, *(number for number in complete if retain_interval and number % retain_interval == 0)}
    return [checkpoint_folder(folder, number) for number in older if number not in kept]


def delete(folders: list[Path]) -> None:
    """The mark goes first, so that what a kill leaves of a folder is not taken for a checkpoint."""
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def delete_unfinished(folder: Path) -> None:
    """Takes away what killed runs left half written. Only one run may use a run folder at a time."""
    for path in folder.glob("iter_*.partial*"):
        shutil.rmtree(path, ignore_errors=True)
