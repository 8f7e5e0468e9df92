"""Reading tensors of a Hugging Face folder one at a time, and writing such a folder."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_solopo import template_kwargs
from megatron_solopo.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
MAX_SHARD_SIZE = "1GB"
"""A process that writes holds one shard in memory."""

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
    """The tensors of a folder's weight files, sharded or not, read when asked for.

    Safetensors files, or else ``pytorch_model.bin`` as older folders have it, of which only tensors are loaded: a
    pickle that would run code is refused.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
            if (self.folder / index).is_file():
                self._file_of = _read_index(self.folder / index)
                break
            if (self.folder / single).is_file():
                self._file_of = dict.fromkeys(self._names_in(single), single)
                break
        else:
            raise UserError(
                f"{folder}: no {SINGLE}, {INDEX}, {BIN_SINGLE} or {BIN_INDEX}; give a folder with weights, "
                "or start with --random-init"
            )
        for name in sorted(set(self._file_of.values())):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: the shard is missing (named in {index})")

    def _names_in(self, file: str) -> list[str]:
        if file.endswith(".bin"):
            return list(_load_bin(self.folder / file))
        with self._open(file) as opened:
            return list(opened.keys())

    def _open(self, name: str) -> Any:
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

    def dtype(self) -> torch.dtype:
        """Of the weights, told by the smallest-named norm: a small tensor."""
        return self.get(min((name for name in self._file_of if "norm" in name), default=min(self._file_of))).dtype

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype.

        Raises:
            UserError: the tensor is not in its file.
        """
        if name not in self._file_of:
            raise UserError(f"{self.folder}: the tensor {name!r} is missing; the folder does not match its config.json")
        file = self._file_of[name]
        missing = f"{self.folder / file}: the tensor {name!r} is missing there; copy or download the folder again"
        if file.endswith(".bin"):
            tensors = _load_bin(self.folder / file)
            if name not in tensors:
                raise UserError(missing)
            return tensors[name]
        with self._open(file) as opened:
            try:
                return opened.get_tensor(name)
            except SafetensorError:
                raise UserError(missing) from None


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index.json."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not valid JSON with a 'weight_map'; copy or download it again") from None


@lru_cache(maxsize=1)
def _load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file; mapped, so that only those that are read take memory."""
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"  # the format of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = "Unsupported" in str(error) or "WeightsUnpickler" in str(error)
        what = "holds more than tensors, which could run code" if code else "not a complete file of torch.save"
        remedy = "convert it to safetensors where you trust it" if code else "copy or download it again"
        raise UserError(f"{path}: {what}; {remedy}") from None


def write_folder(
    folder: Path,
    source: Path,
    config_json: str,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: str = MAX_SHARD_SIZE,
    force: bool = False,
    chat_template: Path | None = None,
    chat_template_kwargs: str | None = None,
) -> None:
    """Writes config, tokenizer files and weights, aside first and renamed at the end.

    A shard is written when it is full, so that one shard and one tensor are in memory at a time. ``tensors`` is read to
    its end even if writing fails, because other processes send them.

    Args:
        max_shard_size: "5GB", "500MB", ...; decimal units as in the names of the hub.
        chat_template: a file that takes the place of ``source``'s template.
        chat_template_kwargs: a JSON object that takes the place of the values in ``source``'s tokenizer_config.json.

    Raises:
        UserError: the folder holds a model and ``force`` is off, or the disk is full.
    """
    check_target(folder, force, filling=True)
    shards = _Shards(folder.with_name(folder.name + ".partial"), parse_size(max_shard_size))
    for name, tensor in tensors:
        shards.add(name, tensor)
    try:
        aside = shards.finish()
        (aside / "config.json").write_text(config_json, encoding="utf-8")
        for name in CARRIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        if chat_template is not None:
            shutil.copyfile(chat_template, aside / "chat_template.jinja")
        if chat_template_kwargs is not None:
            path = aside / "tokenizer_config.json"
            document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            document[template_kwargs.KEY] = json.loads(chat_template_kwargs)
            path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _put_in_place(aside, folder)
    except OSError as error:
        shutil.rmtree(shards.folder, ignore_errors=True)
        raise UserError(
            f"--save-hf {folder}: {error.strerror or error}; the checkpoint of the run is complete, export it elsewhere"
        ) from None


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500MB".

    Raises:
        UserError: naming --max-shard-size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.I)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: must be a size such as 5GB or 500MB")
    return size


class _Shards:
    """Files of tensors in a folder; `finish` gives them their final names. A failed write is told there."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        self._open: dict[str, Tensor] = {}
        self._file_of: dict[str, int] = {}
        self._written = self._total = self._bytes = 0
        self._error: OSError | None = None
        shutil.rmtree(folder, ignore_errors=True)
        self._try(lambda: folder.mkdir(parents=True))

    def _try(self, work: Callable[[], Any]) -> None:
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error
            except SafetensorError as error:  # safetensors tells of a full disk so
                number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
                self._error = OSError(number, os.strerror(number))

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._open and self._bytes + size > self._limit:
            self._flush()
        if self._error is None:
            self._open[name] = tensor.contiguous()
            self._bytes += size
            self._total += size

    def _flush(self) -> None:
        self._written += 1
        path = self.folder / f"{self._written}.safetensors"
        self._try(lambda: save_file(self._open, path, metadata={"format": "pt"}))
        self._file_of |= dict.fromkeys(self._open, self._written)
        self._open, self._bytes = {}, 0

    def finish(self) -> Path:
        """Raises OSError if any write failed."""
        self._flush()
        if self._error is not None:
            raise self._error
        count = self._written
        name_of = {n: f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE for n in range(1, count + 1)}
        for number, name in name_of.items():
            (self.folder / f"{number}.safetensors").rename(self.folder / name)
        if count > 1:
            files = {tensor: name_of[number] for tensor, number in sorted(self._file_of.items())}
            document = {"metadata": {"total_size": self._total}, "weight_map": files}
            (self.folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return self.folder


def in_a_storage_of_its_own(part: Tensor) -> Tensor:
    """The same memory on the CPU, not as a part of a larger tensor.

    Writers copy such parts (megatron-core's) or refuse them (safetensors'), because they might overlap.
    """
    part = part.detach()
    if part.device.type != "cpu" or not part.is_contiguous() or part.dim() == 0:
        return part
    return torch.from_numpy(part.view(torch.uint8).numpy()).view(part.dtype)


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


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as config.json writes it."""
    return str(dtype).removeprefix("torch.")
