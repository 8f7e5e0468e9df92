"""Reads tensors of a Hugging Face folder one at a time, and writes such a folder."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_solopo.atomic import folder_aside
from megatron_solopo.config import MAX_SHARD_SIZE
from megatron_solopo.conversion.carried import Names
from megatron_solopo.conversion.places import check_target, put_in_place, restore
from megatron_solopo.conversion.shards import CODES, INDEX, SINGLE, UNFINISHED, Shards, parse_size
from megatron_solopo.conversion.sidecar_files import STACKED, SidecarFiles, dtype_name
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model.families.moe import are_in_one_tensor
from megatron_solopo.model.families.operators import part_of
from megatron_solopo.model_folder import seen_in

BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"

POINTER = b"version https://git-lfs"

NEVER_WEIGHTS = (".rotary_emb.inv_freq",)
"""Suffixes of tensors in old folders that the config defines."""


@dataclass(frozen=True)
class _Header:
    """A tensor's entry in a file: its shape, its dtype as safetensors names it, and the byte at which it starts (0 in
    a ``.bin``, whose tensors are loaded)."""

    shape: torch.Size
    dtype: str
    start: int = 0

    def part(self, place: int) -> _Header:
        """Returns the entry of one of the tensors that are stacked in this one."""
        shape = self.shape[1:]
        # of others than weights' codes (quantized.py) bytes
        size = next((dtype.itemsize for dtype, code in CODES.items() if code == self.dtype), 1)
        return _Header(shape, self.dtype, self.start + place * shape.numel() * size)


class TensorReader:
    """The weights in a folder's files, sharded or not, each read on request by its name in the families' tables, or a
    part of one (`part_of`).

    Reads safetensors files, else ``pytorch_model.bin`` of older folders, of which it loads only tensors and refuses a
    pickle that would run code.

    Raises:
        UserError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[str, dict[str, _Header]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._bins: dict[str, dict[str, Tensor]] = {}
        for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):  # transformers' order
            if (self.folder / single).is_file():
                self._file_of = dict.fromkeys(self._names_in(single), single)
                break
            if (self.folder / index).is_file():
                self._file_of = _read_index(self.folder / index)
                break
        else:
            raise UserError(
                "weights-missing",
                f"{folder}: no {SINGLE}, {INDEX}, {BIN_SINGLE} or {BIN_INDEX}; "
                + (seen_in(folder) or "use a folder with weights, or start with --random-init"),
            )
        self._file_of = {name: file for name, file in self._file_of.items() if not name.endswith(NEVER_WEIGHTS)}
        self._naming = Names.of(self._file_of)
        if not self._file_of:
            raise UserError("weights-missing", f"{folder}: its weight files hold no weights; copy or download it again")
        for name in sorted(set(self._file_of.values())):
            if not (self.folder / name).is_file():
                raise UserError("shard-missing", f"{self.folder / name}: the shard is missing (named in {index})")

    def _names_in(self, file: str) -> list[str]:
        _refuse_pointer(self.folder / file)
        if file.endswith(".bin"):
            return list(self._bin(file))
        with self._open(file) as opened:
            return list(opened.keys())

    def _open(self, name: str) -> Any:
        path = self.folder / name
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(
                "file-damaged", f"{path}: not a complete safetensors file ({error}); copy or download it again"
            ) from None

    def names(self) -> set[str]:
        """Returns the names of the weights of the language model."""
        return {plain for name in self._stored_names() if (plain := self._naming.plain(name)) is not None}

    def others(self) -> set[str]:
        """Returns the folder's names of the tensors outside the language model, see `carried`."""
        return {name for name in self._stored_names() if self._naming.plain(name) is None}

    def _stored_names(self) -> Collection[str]:
        return self._file_of.keys()

    def stored(self, name: str) -> str:
        """Returns the folder's name of a tensor."""
        return self._naming.stored(name)

    @property
    def is_nested(self) -> bool:
        """Whether the language model is part of another."""
        return bool(self._naming.form)

    def files(self) -> list[Path]:
        """Returns the weight files, in a fixed order."""
        return [self.folder / name for name in sorted(set(self._file_of.values()))]

    def dtype(self, without: Collection[str] = ()) -> torch.dtype:
        """Returns the dtype of all weights but some; no tensor is read.

        Raises:
            UserError: they have several dtypes, or see `dtype_of`.
        """
        names: dict[torch.dtype, str] = {}
        for name in sorted(self.names() - {*without}):
            names.setdefault(self.dtype_of(name), name)
        if len(names) > 1:
            several = ", ".join(f"{dtype_name(dtype)} ({name})" for dtype, name in names.items())
            raise UserError(
                "dtype-mixed", f"{self.folder}: its weights have several dtypes, {several}; choose one with --dtype"
            )
        return next(iter(names))

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor, which is not read.

        Raises:
            UserError: it is not a dtype of weights, or see `shape`.
        """
        return self._stored_dtype(self.stored(name))

    def _stored_dtype(self, name: str) -> torch.dtype:
        code = self._header(name).dtype
        if code not in CODES.values():
            raise UserError(
                "dtype-unsupported",
                f"{self.folder}: the tensor {name!r} is stored as {code}, and only {', '.join(CODES.values())} are "
                "read; use the folder of the unquantized weights",
            )
        return next(dtype for dtype, name in CODES.items() if name == code)

    def file_of(self, name: str) -> str:
        """Returns the name of the file that holds a tensor; "" if there is no such tensor."""
        return self._stored_file(self.stored(name))

    def _stored_file(self, name: str) -> str:
        return self._file_of.get(part_of(name)[0], "")

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype.

        Each file is opened once. Each tensor has a mapping, which ends with it; with one mapping of the file, all
        pages that were read would stay in memory.

        Raises:
            UserError: the tensor is not in its file, or see `dtype_of`.
        """
        return self.get_stored(self.stored(name))

    def get_stored(self, name: str) -> Tensor:
        """`get` by the folder's name, which tensors outside the language model have alone."""
        return self._read(name, self._stored_dtype(name))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        header, file = self._header(name), self._file_of[part_of(name)[0]]
        if file.endswith(".bin"):
            whole, place = part_of(name)
            return self._bin(file)[whole] if place is None else self._bin(file)[whole][place]
        if not (size := header.shape.numel() * dtype.itemsize):
            return torch.empty(header.shape, dtype=dtype)
        if file not in self._files:
            self._files[file] = (self.folder / file).open("rb")
        return (
            torch.from_numpy(np.memmap(self._files[file], np.uint8, "c", header.start, size))
            .view(dtype)
            .view(header.shape)
        )

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor, which is not read.

        Raises:
            UserError: the tensor is not in its file.
        """
        return self._stored_shape(self.stored(name))

    def _stored_shape(self, name: str) -> torch.Size:
        return self._header(name).shape

    def form_of(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Returns (shape, dtype) of a tensor by the folder's name."""
        return self._stored_shape(name), self._stored_dtype(name)

    def _header(self, name: str) -> _Header:
        name, place = part_of(name)
        if name not in self._file_of:
            raise UserError(
                "tensor-missing",
                f"{self.folder}: the tensor {name!r} is missing; the folder does not match its config.json",
            )
        file = self._file_of[name]
        if file not in self._headers:
            self._headers[file] = self._headers_in(file)
        if name not in self._headers[file]:
            raise UserError(
                "tensor-missing",
                f"{self.folder / file}: the tensor {name!r} is missing there; copy or download the folder again",
            )
        header = self._headers[file][name]
        return header if place is None else header.part(place)

    def _headers_in(self, file: str) -> dict[str, _Header]:
        _refuse_pointer(self.folder / file)
        if file.endswith(".bin"):
            tensors = self._bin(file).items()
            return {name: _Header(tensor.shape, CODES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors}
        with self._open(file), (self.folder / file).open("rb") as opened:  # the library validates the file
            size = int.from_bytes(opened.read(8), "little")
            document = json.loads(opened.read(size))
        return {
            name: _Header(torch.Size(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])
            for name, entry in document.items()
            if name != "__metadata__"
        }

    def _bin(self, file: str) -> dict[str, Tensor]:
        """Returns the tensors of a ``.bin`` file. Mapped files are kept; of those that cannot be mapped, the last
        one."""
        if file not in self._bins:
            tensors, mapped = _load_bin(self.folder / file)
            if not mapped:
                self._bins.clear()
            self._bins[file] = tensors
        return self._bins[file]


def has_stacked_experts(source: str | Path) -> bool:
    """Whether a Hugging Face folder, or the one that a Megatron folder was converted from, has the experts of each
    layer in one tensor; not where its weights cannot be read any more."""
    try:
        if json.loads((Path(source) / "config.json").read_text(encoding="utf-8")).get(STACKED):
            return True
        return are_in_one_tensor(TensorReader(source).names())
    except (UserError, OSError, ValueError):
        return False


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index.json."""
    check_json(path)
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values()):
            return files
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        "file-damaged",
        f"{path}: not valid JSON with a 'weight_map' of tensors and their files; copy or download it again",
    )


def _load_bin(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Returns (tensors of a ``.bin`` file, whether they are mapped, so that only those that are read take memory)."""
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"  # the format of torch before 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if "Unsupported" in str(error) or "WeightsUnpickler" in str(error):
            raise UserError(
                "pickle-unsafe",
                f"{path}: holds more than tensors, which could run code; convert it to safetensors if you trust it",
            ) from None
        raise UserError(
            "file-damaged", f"{path}: not a complete file of torch.save; copy or download it again"
        ) from None
    problem = f"holds no tensors by name (a {type(loaded).__name__})"
    if isinstance(loaded, dict):
        problem = next(
            (
                f"{name!r} in it is not a tensor ({type(value).__name__})"
                for name, value in loaded.items()
                if not (isinstance(name, str) and isinstance(value, Tensor))
            ),
            None,
        )
    if problem is not None:
        raise UserError("not-a-state-dict", f"{path}: {problem}; save the model's state_dict() alone")
    return loaded, mapped


def _refuse_pointer(path: Path) -> None:
    """Refuses the pointer file that git without git-lfs leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                "git-lfs-pointer", f"{path}: only a pointer of git-lfs, not the weights; run git lfs pull in its folder"
            )


class FolderWriter:
    """Writes config, tokenizer files and weights, beside the folder first, and renames them at the end.

    Args:
        shapes: of every tensor, in the order of the files.
        dtype: of the files.
        dtypes: of tensors that have another.
        max_shard_size: "5GB", "500MB", ...; decimal units as in the names of the hub.
        made_of: see `Shards`.

    Attributes:
        shards: the weight files, of which some may be complete.

    Raises:
        UserError: see `check_target`.
    """

    def __init__(
        self,
        folder: Path,
        sidecar_files: SidecarFiles,
        shapes: Mapping[str, torch.Size],
        dtype: torch.dtype,
        max_shard_size: str = MAX_SHARD_SIZE,
        force: bool = False,
        dtypes: Mapping[str, torch.dtype] | None = None,
        made_of: str | None = None,
    ) -> None:
        self._folder, self._sidecar_files = folder, sidecar_files
        try:
            restore(folder)
        except OSError as error:
            raise _not_written(folder, error) from None
        check_target("--save-hf", folder, force, filling=True)
        self.shards = Shards(folder_aside(folder), shapes, dtype, parse_size(max_shard_size), dtypes, made_of)

    def publish(self, problem: UserError | None) -> None:
        """Writes the other files and renames the folder.

        Args:
            problem: what `write_weights` returned, here or in another process.

        Raises:
            UserError: the problem, or the disk is full.
        """
        aside = self.shards.folder
        try:
            if problem is None:
                self.shards.write_index()
                self._sidecar_files.write(aside)
                (aside / UNFINISHED).unlink(missing_ok=True)
                put_in_place(aside, self._folder)
        except OSError as error:
            problem = _not_written(self._folder, error)
        if problem is not None:
            if problem.code == "write-failed":
                shutil.rmtree(aside, ignore_errors=True)
            raise problem


def write_weights(folder: Path, shards: Shards, tensors: Iterable[tuple[str, Tensor]]) -> UserError | None:
    """Writes each tensor as it arrives, so that one at a time is in memory; returns why that failed, or None.
    ``tensors`` is read to its end even if writing fails, because other processes send them.

    Args:
        folder: that the weights are for.
    """
    try:
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.finish()
    except UserError as error:
        return error
    except OSError as error:
        return _not_written(folder, error)
    return None


def write_folder(
    folder: Path,
    sidecar_files: SidecarFiles,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    **options: Any,
) -> None:
    """Writes a folder of tensors that this process has; see `FolderWriter`, also for ``options``."""
    writer = FolderWriter(folder, sidecar_files, shapes, dtype, **options)
    writer.publish(write_weights(folder, writer.shards, tensors))


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(
        "write-failed",
        f"--save-hf {folder}: {error.strerror or error}; the checkpoint of the run is complete, export it elsewhere",
    )
