"""Which checkpoints are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_solopo.conversion.manifest import MANIFEST, checkpoint_folder, is_marked, iterations


def surplus(folder: Path, latest: int, keep_last: int | None, retain_interval: int | None, best: int = 0) -> list[Path]:
    """Returns the checkpoint folders to delete by --keep-last and --save-retain-interval.

    Args:
        latest: iteration of the newest complete checkpoint; it and newer ones are kept.
        keep_last: number of complete checkpoints to keep, ``latest`` included; None with a ``retain_interval`` means 1,
            as in Megatron, and without one that all are kept.
        retain_interval: multiples of it are always kept.
        best: iteration of --save-best, which is always kept; 0: none.
    """
    if keep_last is None and retain_interval is None:
        return []
    older = [number for number in iterations(folder) if number < latest]
    complete = [number for number in older if is_marked(checkpoint_folder(folder, number))]
    newest = complete[len(complete) - min((keep_last or 1) - 1, len(complete)) :]
    kept = {best, *newest, *(number for number in complete if retain_interval and number % retain_interval == 0)}
    return [checkpoint_folder(folder, number) for number in older if number not in kept]


def delete(folders: list[Path]) -> None:
    """Deletes checkpoints; the manifest first, so that what a kill leaves of a folder is not taken for a checkpoint."""
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def delete_unfinished(folder: Path) -> None:
    """Deletes incomplete checkpoints of killed runs. Only one run may use a run folder at a time."""
    for path in folder.glob("iter_*.partial*"):
        shutil.rmtree(path, ignore_errors=True)
