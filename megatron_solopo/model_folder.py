"""Messages about a path that is not a Hugging Face folder: where the model is, or how to download it."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_solopo.errors import UserError

_HUB = re.compile(
    r"(?:https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/{1,2}|hub:)?([A-Za-z0-9][\w.-]*/[\w.-]+?)/?"
)

OTHER_FORMATS = (
    ("*.gguf", "GGUF of llama.cpp"),
    ("*.ggml", "GGML of llama.cpp"),
    ("*.pth", "the format of the original authors' code"),
    ("consolidated*.safetensors", "the format of the original authors' code"),
    ("*.msgpack", "Flax"),
    ("*.h5", "TensorFlow"),
    ("*.onnx", "ONNX"),
    ("onnx/*.onnx", "ONNX"),
    ("*.nemo", "NeMo"),
)
"""Patterns of weight files that are not read -> their format."""


def download(name: str | Path, kind: str = "model") -> str | None:
    """Returns the download command for a path of the form of a hub name; None for any other path.

    Args:
        kind: ``model`` or ``dataset``.
    """
    match = _HUB.fullmatch(str(name))
    if match is None or Path(str(name).split("/")[0]).exists():  # a mistyped path in an existing folder
        return None
    repository = match[1]
    option = "" if kind == "model" else f" --repo-type {kind}"
    return (
        f"a {kind} of the Hugging Face hub is downloaded first: hf download {repository}{option} --local-dir "
        f"{repository.split('/')[1]}"
    )


def check_is_folder(where: str, folder: str | Path, remedy: str) -> None:
    """Refuses a path that is not a folder.

    Args:
        where: the option and its value, with which the message starts.
        remedy: what to use instead, if the path does not look like a name on the hub.

    Raises:
        UserError: see above.
    """
    path = Path(folder)
    if path.is_dir():
        return
    if path.is_file():
        raise UserError(
            "not-a-folder", f"{where}: is a file; {_of_file(path) or f'set the folder that it is in, {path.parent}'}"
        )
    hub = download(folder)
    raise UserError("folder-missing", f"{where}: no such folder; {f'{hub}; use that folder' if hub else remedy}")


def _of_file(path: Path) -> str | None:
    kind = next((kind for pattern, kind in OTHER_FORMATS if path.match(pattern)), None)
    return kind and f"{kind} is not read: use the folder of the original model, with config.json and safetensors"


def seen_in(folder: str | Path) -> str | None:
    """Returns what a folder holds that may be mistaken for a model, and what to do; None if nothing is recognised."""
    folder = Path(folder)
    snapshots = sorted(folder.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    if snapshots:
        return f"it is a model in the hub's cache: use its snapshot, {snapshots[-1].parent}"
    if any(folder.glob("models--*")):
        return "it is the hub's cache: use the snapshot of one model, models--ORGANISATION--NAME/snapshots/REVISION"
    if any(folder.glob("*.incomplete")) or any(folder.glob(".cache/huggingface/download/*.incomplete")):
        return "its download is not complete: run the same hf download again"
    if (folder / "adapter_config.json").is_file():
        return (
            "it holds an adapter of PEFT alone (adapter_config.json): merge it into its base model (merge_and_unload "
            "of the package peft, save_pretrained) and use that folder"
        )
    for pattern, kind in OTHER_FORMATS:
        if files := sorted(path.name for path in folder.glob(pattern)):
            return (
                f"it holds {files[0]}, and {kind} is not read: download the folder of the original model, with "
                "config.json and safetensors"
            )
    if any(folder.glob("iter_*/manifest.json")):
        return (
            "it holds checkpoints of a run: write one as a Hugging Face folder, solopo convert-checkpoint "
            f"megatron-to-hf --load {folder} --save-hf NEW, and use that"
        )
    inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    if inside:
        return f"the model is in a folder inside it: use {' or '.join(inside[:3])}"
    return None
