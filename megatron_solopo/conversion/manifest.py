"""The manifest of a checkpoint, ``manifest.json``: written last, it lists every file with its size and digest.

This module does not need Megatron, so a run folder can be checked before the engine starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_solopo.atomic import write_text
from megatron_solopo.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
"""Megatron's name for the file that holds the number of the last complete checkpoint."""

RELEASE = "release"
"""Megatron's name for weights without an optimizer, in `LATEST` and as the folder; here iteration 0."""

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of a checkpoint's content."""

Files = dict[str, dict[str, Any]]
"""Size and digest of each file, by name."""

READERS = 16
"""Files that are read at the same time: one process checks those of all before a run resumes."""

WHOLE = 64 * 2**20
BLOCK, BLOCKS = 2**20, 64
"""Files up to WHOLE bytes are hashed completely; of larger ones BLOCKS evenly spread blocks, with the first and last.

So a manifest costs the same for a checkpoint of any size. It detects a truncated, swapped or zero-filled file, but not
every changed bit of a large one.
"""


def checkpoint_folder(folder: str | Path, iteration: int) -> Path:
    """``iter_0000100`` or `RELEASE`, as Megatron names them."""
    return Path(folder) / (f"iter_{iteration:07d}" if iteration else RELEASE)


def existing_folder(folder: Path, iteration: int) -> Path:
    """Returns `checkpoint_folder`, or of iteration 0 that of earlier versions, if only that is there."""
    named, earlier = checkpoint_folder(folder, iteration), folder / f"iter_{iteration:07d}"
    return earlier if earlier.is_dir() and not named.is_dir() else named


def iterations(folder: str | Path) -> list[int]:
    """Iterations of a run's checkpoint folders, ascending, complete or not."""
    matches = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in Path(folder).glob("iter_*"))
    return sorted(int(match[1]) for match in matches if match)


def latest_iteration(folder: str | Path) -> int | None:
    """Returns the iteration in a run folder's `LATEST` file; None if there is no file.

    Raises:
        UserError: the file does not hold a number.
    """
    path = Path(folder) / LATEST
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    if text == RELEASE:
        return 0
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            "file-damaged",
            f"{path}: must hold the number of an iteration, found {text[:20]!r}"
            + (_offer(Path(folder)) or "; write the number of a complete one there, or start in another folder"),
        )
    return int(text)


def write_latest(folder: Path, iteration: int) -> None:
    """Records the iteration of the last complete checkpoint; atomic."""
    write_text(folder / LATEST, f"{iteration or RELEASE}\n")


def describe_files(folder: Path, process: int = 0, processes: int = 1) -> Files:
    """Returns sizes and digests of the files that one of several processes wrote.

    megatron-core names a file ``__PROCESS_NUMBER.distcp``; process 0 has those with other names too.
    """
    names = ((path, re.match(r"__(\d+)_", path.name)) for path in _files(folder))
    paths = sorted(path for path, match in names if int(match[1] if match else 0) % processes == process)
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }


def write_manifest(
    folder: Path, iteration: int, layout: dict[str, int], progress: dict[str, Any], files: Files
) -> None:
    """Writes the manifest of a folder whose files are all written; ``files`` is of `describe_files`."""
    document = {
        "format": FORMAT,
        "iteration": iteration,
        "layout": layout,
        "progress": progress,
        "files": dict(sorted(files.items())),
    }
    write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")


def is_marked(folder: Path) -> bool:
    """Whether a folder has a manifest; its files are not checked."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint; its files are not checked.

    Raises:
        ValueError: it is missing, unreadable or of another version.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = document["format"]
        if version == FORMAT:
            document["iteration"], document["progress"], document["files"].items()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing, so its writing was not finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ValueError(f"{MANIFEST} is not readable") from None
    if version != FORMAT:
        raise ValueError(f"{MANIFEST} has format {version!r}, this version reads {FORMAT}")
    return document


def problem_of(folder: Path) -> str | None:
    """Returns the problem of a checkpoint folder, with the file's name; None if it is complete and unchanged."""
    if not folder.is_dir():
        return "the folder is missing"
    try:
        document = read_manifest(folder)
        if existing_folder(folder.parent, document["iteration"]).name != folder.name:
            return f"{MANIFEST} belongs to iteration {document['iteration']}"
        present = {path.name: path for path in _files(folder)}
        for name, written in document["files"].items():
            if name not in present:
                return f"{name} is missing"
            size = present[name].stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes, {written['bytes']:,} were written"
        digests = _digests([present[name] for name in document["files"]])
        for (name, written), digest in zip(document["files"].items(), digests, strict=True):
            if digest != written["sha256"]:
                return f"{name} does not hold what was written"
        left_over = sorted(present.keys() - document["files"].keys())
    except ValueError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"{MANIFEST} or a file it names is not readable ({getattr(error, 'strerror', None) or error})"
    return f"{left_over[0]} does not belong to it" if left_over else None


def find_checkpoint(folder: str | Path, ckpt_step: int | None, option: str = "--load") -> Path:
    """Returns the checkpoint to resume from: the latest, or that of ``ckpt_step``; every file is compared with the
    manifest.

    Args:
        option: the flag that names the folder.

    Raises:
        UserError: there is none, or it is incomplete or changed; names the file and the previous complete checkpoint.
    """
    folder = Path(folder)
    iteration = latest_iteration(folder) if ckpt_step is None else ckpt_step
    if iteration is None:
        raise UserError(
            "checkpoint-missing",
            f"{option} {folder}: no complete checkpoint there ({LATEST} is missing)"
            + (_offer(folder) or f"; {mistaken(folder) or 'use the folder of a run'}"),
        )
    source = existing_folder(folder, iteration)
    problem = problem_of(source)
    if problem:
        source_option = f"{option} {folder}" if ckpt_step is None else f"--ckpt-step {ckpt_step}"
        raise UserError(
            "checkpoint-incomplete",
            f"{source_option}: the checkpoint {source} cannot be used: {problem}"
            + (
                _offer(folder, iteration, " in place of --auto-resume, once" if option == "--save" else "")
                or "; there is no earlier complete checkpoint: start in another folder"
            ),
        )
    return source


def mistaken(folder: Path) -> str | None:
    """Returns what a folder is that may be mistaken for a run folder, and what to do; None if nothing is recognised."""
    folder = folder.resolve()
    number = "0" if folder.name == RELEASE else folder.name.removeprefix("iter_")
    if (is_marked(folder) or (folder / ".metadata").is_file()) and number.isdecimal():
        return f"it is one checkpoint: use the folder of its run, {folder.parent}, and --ckpt-step {int(number)}"
    if (folder / "config.json").is_file():
        return "it is a Hugging Face folder: pass it as --hf-path"
    return None


def _offer(folder: Path, before: int | None = None, note: str = "") -> str:
    """Returns the end of a message, or "": the newest complete checkpoint before an iteration, and the flags to resume
    from."""
    for number in reversed(iterations(folder)):
        if (before is None or number < before) and problem_of(checkpoint_folder(folder, number)) is None:
            return f"; iteration {number} is complete: resume from it with --load {folder} --ckpt-step {number}{note}"
    return ""


def _files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint, without ``.nfs*``, which NFS keeps for deleted files that are still open."""
    return [path for path in folder.iterdir() if path.name != MANIFEST and not path.name.startswith(".nfs")]


def _digests(paths: Sequence[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(_digest, paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for block in range(BLOCKS):
            file.seek((size - BLOCK) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
        return digest.hexdigest()
