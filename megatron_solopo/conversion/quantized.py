"""Quantised weights of a folder, dequantised on reading: MXFP4, and FP8 in blocks.

MXFP4 (OCP Microscaling Formats 1.0, section 5.3) is that of gpt-oss's experts: ``NAME_blocks`` uint8 [experts, out,
in / 32, 16] with two numbers a byte, the first in the lower half, and ``NAME_scales`` uint8 [experts, out, in / 32],
the power of two of 32 numbers plus 127. The tensor itself, ``NAME``, is [experts, in, out].

FP8 in blocks (DeepSeek-V3, arXiv 2412.19437, section 3.3) is ``NAME`` float8_e4m3fn [..., out, in] and
``NAME_scale_inv`` [..., out / 128, in / 128] rounded up, the factor of a block.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.operators import part_of
from megatron_solopo.model.hf_config import FP8_BLOCK

BLOCKS, SCALES, FACTORS = "_blocks", "_scales", "_scale_inv"
STORED = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F32": torch.float32}
STORED |= {"BF16": torch.bfloat16}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the four bits of an E2M1 number without its sign."""


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantises an expert's matrix.

    Args:
        blocks: uint8 [out, in / 32, 16].
        scales: uint8 [out, in / 32].

    Returns:
        bfloat16 [in, out], which holds every such number exactly.
    """
    signed = torch.tensor([*VALUES, *(-value for value in VALUES)])
    pairs = torch.stack((signed.repeat(16), signed.repeat_interleave(16)), -1)  # of each byte
    numbers = pairs[blocks.int()].flatten(-2)
    numbers = torch.ldexp(numbers, scales.int()[..., None] - 127)
    return numbers.flatten(1).to(torch.bfloat16).t()


def fp8(weight: Tensor, factors: Tensor) -> Tensor:
    """Dequantises matrices in blocks.

    Args:
        weight: float8_e4m3fn [..., out, in].
        factors: [..., out / 128, in / 128], rounded up.

    Returns:
        float32 [..., out, in].
    """
    out, inner = weight.shape[-2:]
    of_rows = factors.float().repeat_interleave(FP8_BLOCK, -2)[..., :out, :]
    return weight.float() * of_rows.repeat_interleave(FP8_BLOCK, -1)[..., :inner]


class WeightReader(TensorReader):
    """`TensorReader` whose tensors are dequantised; their names, shapes and dtypes are those of the result.

    Raises:
        UserError: see `TensorReader`; or scales belong to no weight, or have another shape than its blocks.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        stored = super()._stored_names()
        self._packed = {name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)}
        self._scaled = {name.removesuffix(FACTORS) for name in stored if name.endswith(FACTORS)}
        self._names = {name for name in stored if not name.endswith((BLOCKS, SCALES, FACTORS))} | self._packed
        for name in self._packed:
            self._check(name + SCALES, super()._stored_shape(name + BLOCKS)[:-1])
        for name in self._scaled:
            *stacked, out, inner = super()._stored_shape(name)
            self._check(name + FACTORS, torch.Size((*stacked, -(-out // FP8_BLOCK), -(-inner // FP8_BLOCK))))

    def _check(self, name: str, expected: torch.Size) -> None:
        if (shape := super()._stored_shape(name)) != expected:
            raise UserError(
                "tensor-shape",
                f"{self.folder}: the tensor {name!r} has the shape {tuple(shape)}, its weight makes it "
                f"{tuple(expected)}; the copy is damaged, or its blocks have another size",
            )

    def _stored_names(self) -> Collection[str]:
        return self._names

    def _stored_file(self, name: str) -> str:
        whole, _ = part_of(name)
        return super()._stored_file(whole + BLOCKS if whole in self._packed else whole)

    def _stored_shape(self, name: str) -> torch.Size:
        whole, place = part_of(name)
        if whole not in self._packed:
            return super()._stored_shape(name)
        experts, out, blocks, size = super()._stored_shape(whole + BLOCKS)
        shape = experts, 2 * blocks * size, out
        return torch.Size(shape if place is None else shape[1:])

    def _stored_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor; bfloat16 of a quantised one."""
        whole, _ = part_of(name)
        return torch.bfloat16 if whole in self._packed | self._scaled else super()._stored_dtype(name)

    def get_stored(self, name: str) -> Tensor:
        """One tensor on the CPU, see `TensorReader.get`; FP8 in float32, which the model's dtype rounds once."""
        whole, place = part_of(name)
        part = "" if place is None else f"[{place}]"
        if whole in self._scaled:
            return fp8(self._quantized(name), self._quantized(whole + FACTORS + part))
        if whole not in self._packed:
            return super().get_stored(name)
        blocks, scales = self._quantized(whole + BLOCKS + part), self._quantized(whole + SCALES + part)
        if place is not None:
            return mxfp4(blocks, scales)
        return torch.stack([mxfp4(*each) for each in zip(blocks, scales, strict=True)])

    def _quantized(self, name: str) -> Tensor:
        code: Any = self._header(name).dtype
        if code not in STORED:
            raise UserError(
                "dtype-unsupported",
                f"{self.folder}: the tensor {name!r} is stored as {code}, and quantised weights are read as "
                f"{', '.join(STORED)}; use the folder of the unquantized weights",
            )
        return self._read(name, STORED[code])
