"""Reading tensors of a Hugging Face folder one at a time, and writing such a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_solopo.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a trained folder takes over from the one it started from."""


class TensorReader:
    """The tensors of a folder's safetensors files, sharded or not, read when asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{index}: not valid JSON with a 'weight_map'; copy or download it again") from None
        elif (self.folder / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(
                f"{folder}: no {SINGLE} and no {INDEX}; give a folder with safetensors weights, "
                "or start with --random-init"
            )
        for name in sorted(set(self._file_of.values())):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: the shard is missing (named in {INDEX})")

    def _open(self, name: str):
        path = self.folder / name
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error}); copy or download it again") from None

    def names(self) -> set[str]:
        """Every tensor of the folder."""
        return set(self._file_of)

    def files(self) -> list[Path]:
        """The weight files, in a fixed order."""
        return [self.folder / name for name in sorted(set(self._file_of.values()))]

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype.

        Raises:
            UserError: the tensor is not in its file.
        """
        if name not in self._file_of:
            raise UserError(f"{self.folder}: the tensor {name!r} is missing; the folder does not match its config.json")
        with self._open(self._file_of[name]) as file:
            return file.get_tensor(name)


def write_folder(
    folder: Path,
    source: Path,
    config_json: str,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: str = "5GB",
    force: bool = False,
    chat_template: Path | None = None,
) -> None:
    """Writes config, tokenizer files and weights, aside first and renamed at the end.

    Args:
        chat_template: a file that takes the place of ``source``'s template.

    Raises:
        UserError: the folder holds a model and ``force`` is off, or the disk is full.
    """
    check_target(folder, force, filling=True)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        state = {name: tensor.contiguous() for name, tensor in tensors}  # first: other processes send them
        aside.mkdir(parents=True)
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, aside / file, metadata={"format": "pt"})
        if split.is_sharded:
            (aside / INDEX).write_text(
                json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2) + "\n",
                encoding="utf-8",
            )
        (aside / "config.json").write_text(config_json, encoding="utf-8")
        for name in CARRIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        if chat_template is not None:
            shutil.copyfile(chat_template, aside / "chat_template.jinja")
        _put_in_place(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"--save-hf {folder}: {error.strerror or error}; the checkpoint of the run is complete, export it elsewhere"
        ) from None


def _put_in_place(aside: Path, folder: Path) -> None:
    """A folder of --save-hf-interval keeps its models; config.json comes last, so that half a model is not a model."""
    if (folder / "config.json").is_file() and not list(folder.glob("iter_*")):
        shutil.rmtree(folder)
    if not folder.exists():
        aside.rename(folder)
        return
    for path in (folder / "config.json", folder / INDEX, *folder.glob("*.safetensors")):
        path.unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    aside.rmdir()


def check_target(folder: Path, force: bool, filling: bool = False) -> None:
    """Refuses an existing target before any work is done.

    Args:
        filling: a folder without config.json, as --save-hf-interval makes it, will do.
    """
    if folder.exists() and not force and not (filling and not (folder / "config.json").exists()):
        raise UserError(f"--save-hf {folder}: exists already; choose another folder, or overwrite it with --force")


def state_fingerprint(reader: TensorReader) -> str:
    """sha256 of the weight files' contents."""
    import hashlib

    digest = hashlib.sha256()
    for path in reader.files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as config.json writes it."""
    return str(dtype).removeprefix("torch.")
