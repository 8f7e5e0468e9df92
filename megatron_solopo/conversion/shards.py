"""Writes safetensors files one tensor at a time: first the header, then each tensor at its offset.

The safetensors library writes a file at once, with all its tensors in memory. The format is eight bytes with the length
of a JSON header, the header with every tensor's type, shape and offsets, and the tensors
(https://huggingface.co/docs/safetensors, "Format"), so the header can be written before the tensors exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_solopo.atomic import file_aside, rename, write_text
from megatron_solopo.conversion.pieces import write_in_pieces
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.operators import part_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

UNFINISHED = "unfinished.txt"
"""File of a folder that is being written: what its weights are made of."""

CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the supported dtypes in the format."""


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as "5GB" or "500MB".

    Raises:
        UserError: it is not such a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.I)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError("option-value", f"--max-shard-size {text}: must be a size such as 5GB or 500MB")
    return size


class Shards:
    """The weight files of a folder.

    `finish` reports a failed write, so that the sender of the tensors can continue to the end. A file has its name once
    it is complete and on the disk. Several processes write a folder: one creates the object and sends it to the others
    before anything is added, and each takes a part of the files (`take`).

    Args:
        folder: created; of an existing one only the files that ``made_of`` allows are kept.
        shapes: of every tensor, in the order of the files; parts of one (`part_of`) are written into it.
        dtype: of the files.
        limit: bytes of a file, which a single larger tensor may exceed.
        dtypes: of tensors that have another than the files.
        made_of: a text that differs when the tensors may. Complete files that a killed process made of the same, with
            the tensors, dtypes and shapes of this plan, are kept; None: nothing is kept, now or later.

    Attributes:
        kept: names of the tensors in such files and, after `take`, in those of other processes, which need not be
            added.
        kept_files: the number of complete files.
        files: the number of all.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, torch.Size],
        dtype: torch.dtype,
        limit: int,
        dtypes: Mapping[str, torch.dtype] | None = None,
        made_of: str | None = None,
    ) -> None:
        self.folder, self.shapes, self._made_of = folder, shapes, made_of
        self._shapes = whole_shapes(shapes)
        self._dtypes = dict.fromkeys(self._shapes, dtype) | {**(dtypes or {})}
        self._error: OSError | None = None
        self._open: dict[int, BinaryIO] = {}
        self._closing: list[Future[None]] = []
        self._closer: ThreadPoolExecutor | None = None  # the object is sent to other processes without it
        self._files = self._cut(limit)
        self._names = [
            SINGLE if len(self._files) == 1 else f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            for number in range(1, len(self._files) + 1)
        ]
        self._headers = [_header(tensors, self._shapes, self._dtypes) for tensors in self._files]
        self._file_of = {name: number for number, tensors in enumerate(self._files) for name in tensors}
        self._left: list[set[str]] = [set() for _ in self._files]
        kept: set[int] = set()
        self._try(lambda: kept.update(self._prepare()))
        self.files, self.kept_files = len(self._files), len(kept)
        self.kept = {name for name in shapes if self._file_of[part_of(name)[0]] in kept}
        for name in shapes.keys() - self.kept:
            self._left[self._file_of[part_of(name)[0]]].add(name)

    def is_here(self) -> bool:
        """Whether this process sees the unfinished folder, with the record of what its files are made of."""
        record = self.folder / UNFINISHED
        return self._made_of is not None and record.is_file() and record.read_text(encoding="utf-8") == self._made_of

    def take(self, share: int | None, shares: int, first: Collection[str]) -> None:
        """Leaves the files that are missing to other processes, except those of a share.

        Args:
            share: of this process, or None; the files are dealt out in turn.
            first: names of tensors that the first share alone has.
        """
        missing = [number for number, names in enumerate(self._left) if names]
        for turn, number in enumerate(missing):
            if share != (0 if self._left[number] & first else turn % shares):
                self.kept |= self._left[number]
                self._left[number] = set()

    def _prepare(self) -> set[int]:
        """Creates the folder, or deletes all but files that are kept from it; returns their numbers."""
        made_of, kept = self._made_of, set[int]()
        if self.is_here():
            kept = {number for number in range(len(self._files)) if self._is_complete(number)}
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        names = {UNFINISHED, *(self._names[number] for number in kept)}
        for path in list(self.folder.iterdir()):
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made_of is not None and not kept:
            write_text(self.folder / UNFINISHED, made_of)
        return kept

    def _is_complete(self, number: int) -> bool:
        path, header = self.folder / self._names[number], self._headers[number]
        if not path.is_file() or path.stat().st_size != len(header) + self._size(number):
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def _size(self, number: int) -> int:
        """Returns the bytes of a file's tensors."""
        return sum(self._shapes[name].numel() * self._dtypes[name].itemsize for name in self._files[number])

    def _cut(self, limit: int) -> list[dict[str, int]]:
        """Returns the tensors of each file, with their offsets after the header."""
        files: list[dict[str, int]] = [{}]
        end = 0
        for name, shape in self._shapes.items():
            size = shape.numel() * self._dtypes[name].itemsize
            if files[-1] and end + size > limit:
                files.append({})
                end = 0
            files[-1][name] = end
            end += size
        return files

    def _try(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor or part of one, of any dtype, and closes its file after the last missing one."""
        if tensor.shape != self.shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(self.shapes[name])}")
        if name in self.kept:
            return
        whole, _ = part_of(name)
        number = self._file_of[whole]
        self._left[number].remove(name)
        self._try(lambda: self._write(number, name, tensor.to(self._dtypes[whole]).contiguous()))
        if not self._left[number] and number in self._open:
            path = self.folder / self._names[number]
            self._closer = self._closer or ThreadPoolExecutor(1)
            self._closing.append(self._closer.submit(_to_the_disk, self._open.pop(number), path))

    def _write(self, number: int, name: str, tensor: Tensor) -> None:
        if number not in self._open:
            self._open[number] = file_aside(self.folder / self._names[number]).open("wb", buffering=0)
            write_in_pieces(self._open[number], self._headers[number])
        file, (whole, place) = self._open[number], part_of(name)
        start = (place or 0) * tensor.numel() * tensor.itemsize
        file.seek(len(self._headers[number]) + self._files[number][whole] + start)
        write_in_pieces(file, tensor.reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Waits until all files of this process are on the disk.

        Raises:
            OSError: a write failed.
        """
        for closing in self._closing:
            self._try(closing.result)
        if self._closer is not None:
            self._closer.shutdown()
        for file in self._open.values():
            file.close()
        if self._error is not None:
            raise self._error
        missing = next((name for names in self._left for name in names), None)
        if missing is not None:
            raise ValueError(f"{missing} was not written")

    def write_index(self) -> None:
        """Writes the index of several files."""
        if len(self._files) > 1:
            total = sum(map(self._size, range(len(self._files))))
            files = {name: self._names[number] for name, number in sorted(self._file_of.items())}
            document = {"metadata": {"total_size": total}, "weight_map": files}
            (self.folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def whole_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Returns the shapes of tensors as files have them: of parts (`part_of`) that of the tensor that they make up."""
    wholes: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        whole, place = part_of(name)
        if place is not None:
            count = max(place + 1, wholes[whole][0] if whole in wholes else 0)
            shape = torch.Size((count, *shape))
        wholes[whole] = shape
    return wholes


def _header(tensors: Mapping[str, int], shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """Returns the length and the JSON header of a file, padded so that the tensors start at a multiple of eight
    bytes."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, start in tensors.items():
        end = start + shapes[name].numel() * dtypes[name].itemsize
        document[name] = {"dtype": CODES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _to_the_disk(file: BinaryIO, path: Path) -> None:
    with file:
        os.fsync(file.fileno())
    rename(file_aside(path), path)
