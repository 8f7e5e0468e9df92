"""The weights a run starts from: a Hugging Face folder, or a Megatron folder made of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.manifest import LATEST, MANIFEST, find_checkpoint


def is_megatron_folder(folder: str | Path) -> bool:
    """Whether weights lie there in megatron-core's format (the folder of a run has no config.json)."""
    return (Path(folder) / LATEST).is_file() and (Path(folder) / "config.json").is_file()


def check_weights(folder: str | Path) -> None:
    """Refuses a folder without complete weights, reading as little as that takes.

    Raises:
        UserError: naming the file.
    """
    if is_megatron_folder(folder):
        find_checkpoint(folder, None, "--hf-path")
    else:
        TensorReader(folder)


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 that changes with the weights: of the files' contents, or of a Megatron folder's digests of them."""
    digest = hashlib.sha256()
    if is_megatron_folder(folder):
        digest.update((find_checkpoint(folder, None, "--hf-path") / MANIFEST).read_bytes())
        return digest.hexdigest()
    for path in TensorReader(folder).files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_start(models: Sequence[Any], hf_config: Any, folder: str | Path) -> None:
    """Copies a folder's weights into the chunks of a model, cut for this process, in the model's dtype.

    Raises:
        UserError: a tensor is missing, left over, or has the wrong shape.
    """
    from megatron_solopo.conversion.hf import load_weights
    from megatron_solopo.conversion.megatron_folder import load_weights_from

    if is_megatron_folder(folder):
        load_weights_from(find_checkpoint(folder, None, "--hf-path"), models)
        return
    for model in models:
        load_weights(model, hf_config, folder)
