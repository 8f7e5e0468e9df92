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
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_solopo.conversion.pieces import write_in_pieces
from megatron_solopo.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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

    `finish` reports a failed write, so that the sender of the tensors can continue to the end.

    Args:
        folder: created; an existing one is deleted.
        shapes: of every tensor, in the order of the files.
        dtype: of the files.
        limit: bytes of a file, which a single larger tensor may exceed.
        dtypes: of tensors that have another than the files.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, torch.Size],
        dtype: torch.dtype,
        limit: int,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.folder, self._shapes = folder, shapes
        self._dtypes = dict.fromkeys(shapes, dtype) | {**(dtypes or {})}
        self._error: OSError | None = None
        self._open: dict[int, BinaryIO] = {}
        self._closing: list[Future[None]] = []
        self._closer = ThreadPoolExecutor(1)
        self._files = self._cut(limit)
        self._left = [set(tensors) for tensors in self._files]
        self._names = [
            SINGLE if len(self._files) == 1 else f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            for number in range(1, len(self._files) + 1)
        ]
        self._headers = [_header(tensors, shapes, self._dtypes) for tensors in self._files]
        self._file_of = {name: number for number, tensors in enumerate(self._files) for name in tensors}
        shutil.rmtree(folder, ignore_errors=True)
        self._try(lambda: folder.mkdir(parents=True))

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
        """Writes a tensor, of any dtype, and closes its file after the last missing one."""
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(self._shapes[name])}")
        number = self._file_of[name]
        self._left[number].remove(name)
        self._try(lambda: self._write(number, name, tensor.to(self._dtypes[name]).contiguous()))
        if not self._left[number] and number in self._open:
            self._closing.append(self._closer.submit(_to_the_disk, self._open.pop(number)))

    def _write(self, number: int, name: str, tensor: Tensor) -> None:
        if number not in self._open:
            self._open[number] = (self.folder / self._names[number]).open("wb", buffering=0)
            write_in_pieces(self._open[number], self._headers[number])
        file = self._open[number]
        file.seek(len(self._headers[number]) + self._files[number][name])
        write_in_pieces(file, tensor.reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Waits until all files are on the disk, then writes the index.

        Raises:
            OSError: a write failed.
        """
        for closing in self._closing:
            self._try(closing.result)
        self._closer.shutdown()
        for file in self._open.values():
            file.close()
        if self._error is not None:
            raise self._error
        missing = next((name for names in self._left for name in names), None)
        if missing is not None:
            raise ValueError(f"{missing} was not written")
        if len(self._files) > 1:
            total = sum(shape.numel() * self._dtypes[name].itemsize for name, shape in self._shapes.items())
            files = {name: self._names[number] for name, number in sorted(self._file_of.items())}
            document = {"metadata": {"total_size": total}, "weight_map": files}
            (self.folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


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


def _to_the_disk(file: BinaryIO) -> None:
    with file:
        os.fsync(file.fileno())
