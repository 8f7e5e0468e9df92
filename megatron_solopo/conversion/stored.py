"""Reads the weights of a checkpoint in megatron-core's distributed format, one parameter at a time and in place.

torch's reader holds a stored tensor's bytes and the tensor beside the parameter, and loads everything at once. Here the
part of the file that a parameter needs is mapped and copied straight into it. A process reads what it holds, without
communication.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_solopo.conversion.stored_index import StoredIndex
from megatron_solopo.data.memory import release_freed_memory
from megatron_solopo.errors import UserError
from megatron_solopo.model.transformer_engine import FUSED_NORMS
from megatron_solopo.progress import ProgressBar


def sharded_tensors(states: object) -> Iterator[ShardedTensor]:
    """Yields the sharded tensors in nested states, after `apply_factories`."""
    if isinstance(states, ShardedTensor):
        yield states
    elif isinstance(states, dict | list):
        for value in states.values() if isinstance(states, dict) else states:
            yield from sharded_tensors(value)


def parts_of_parameters(
    models: Sequence[GPTModel], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[torch.nn.Parameter, list[ShardedTensor]]]:
    """Yields (parameter, its sharded tensors) for each parameter of the chunks of a model; after `apply_factories`."""
    for model, state in zip(models, states, strict=True):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in state.items():
            if name in parameters:
                yield parameters[name], list(sharded_tensors(value))


_OTHER_NORM = FUSED_NORMS | {own: fused for fused, own in FUSED_NORMS.items()}
"""The other name of a layer's norm in checkpoints. Which one megatron-core writes depends on the layer's spec, and
before experts on the implementation."""


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint has a part of a parameter: from ``offset`` on, in this shape, in the tensor ``key`` with the
    shape ``whole``. Each has an axis of 1 in ``shape`` for each axis that the parameter lacks."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]


def _places(part: ShardedTensor, layers: int) -> Iterator[_Place]:
    """Yields the forms in which megatron-core may have written a part: as the model has it, then a tensor of all layers
    or one of each layer (`TransformerBlock.sharded_state_dict`, by its metadata and config), and each with the other
    name of a norm."""
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    place = _Place(part.key, tuple(part.global_offset), shape, tuple(part.global_shape))
    yield place
    match = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", part.key)
    if match is None:
        return
    if match[1] is None:
        layer, place = place.offset[0], _Place("", place.offset[1:], place.shape[1:], place.whole[1:])
    else:
        layer = int(match[1])
    for name in filter(None, (match[2], _OTHER_NORM.get(match[2]))):
        yield _Place(f"decoder.layers.{layer}.{name}", place.offset, place.shape, place.whole)
        stacked = (layer, *place.offset), (1, *place.shape), (layers, *place.whole)
        yield _Place(f"decoder.layers.{name}", *stacked)


class StoredWeights:
    """The weights of a complete checkpoint, for the chunks of a model.

    Args:
        source: the folder of the checkpoint.
        models: the chunks; their parameters may have any dtype.
        states: of each chunk, see `megatron_folder.model_states`.

    Raises:
        UserError: the checkpoint is another model's.
    """

    def __init__(self, source: Path, models: Sequence[GPTModel], states: Sequence[dict[str, Any]]) -> None:
        self._source, self._reader = source, StoredIndex(source)
        self._stored = self._reader.metadata
        self._parts: dict[int, list[tuple[ShardedTensor, _Place]]] = {}
        for state in states:
            apply_factories(state)
        layers = models[0].config.num_layers
        for parameter, parts in parts_of_parameters(models, states):
            self._parts[id(parameter)] = [(part, self._place(part, layers)) for part in parts]
        # Of a model with LoRA's adapters, a checkpoint holds either these or the frozen weights.
        self._parameters = [p for model in models for p in model.parameters() if id(p) in self._parts]

    def _place(self, part: ShardedTensor, layers: int) -> _Place:
        stored = self._stored.state_dict_metadata
        for place in _places(part, layers):
            if isinstance(tensor := stored.get(place.key), TensorStorageMetadata):
                break
        else:
            raise self._refusal(f"it has no {part.key}")
        # Padding rows of the vocabulary are allowed to differ, as megatron-core marks them.
        if tuple(tensor.size)[int(part.allow_shape_mismatch) :] != place.whole[int(part.allow_shape_mismatch) :]:
            raise self._refusal(f"its {place.key} has the shape {tuple(tensor.size)}, the model's {place.whole}")
        return place

    def _refusal(self, problem: str) -> UserError:
        return UserError(
            "checkpoint-other-model",
            f"{self._source} cannot be read ({problem}); its files are complete, so it is another model's: use the "
            "--hf-path of its run",
        )

    def keys(self) -> set[str]:
        """Returns the keys of the stored tensors that this process's parameters are read from."""
        return {place.key for parts in self._parts.values() for _, place in parts}

    def fill_all(self) -> None:
        """Fills every parameter of the model."""
        for parameter in ProgressBar(self._parameters, desc="reading weights", unit="parameter", leave=False):
            self.fill(parameter)

    @torch.no_grad()
    def fill(self, parameter: torch.nn.Parameter) -> None:
        """Copies a parameter's part of the checkpoint into it, converted to its dtype."""
        for part, place in self._parts[id(parameter)]:
            target = part.data.view(place.shape)
            if part.allow_shape_mismatch:
                target.zero_()
            for item in self._read_items(place):
                tensor = self._mapped(self._stored.storage_data[item.storage_index])
                narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(
                    narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                )

    def map(self, parameter: torch.nn.Parameter) -> None:
        """Like `fill`; but a parameter that equals one stored tensor is mapped from the file instead of copied."""
        (_, place), *others = self._parts[id(parameter)]
        items = self._read_items(place)
        if not others and len(items) == 1 and tuple(items[0].lengths) == place.shape:
            tensor = self._mapped(self._stored.storage_data[items[0].storage_index])
            if tensor.shape == items[0].lengths and tensor.dtype == parameter.dtype and parameter.device.type == "cpu":
                parameter.data = tensor.view(parameter.shape)
                return
        self.fill(parameter)

    def _read_items(self, place: _Place) -> list[ReadItem]:
        chunk = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape))
        return create_read_items_for_chunk_list(place.key, self._stored.state_dict_metadata[place.key], [chunk])

    def _mapped(self, place: _StorageInfo) -> Tensor:
        """Returns the tensor that torch.save wrote at a place of a file, mapped from the file.

        Only the header is read: a storage loaded to the device ``meta`` has the offset of its numbers
        (torch/serialization.py, ``_checkpoint_offset``).
        """
        path = self._source / place.relative_path
        with path.open("rb") as file:
            header = torch.load(self._reader._slice_file(file, place), map_location="meta", weights_only=True)
        storage = header.untyped_storage()
        numbers = np.memmap(path, np.uint8, "c", place.offset + storage._checkpoint_offset, storage.nbytes())
        return (
            torch.from_numpy(numbers)
            .view(header.dtype)
            .as_strided(header.shape, header.stride(), header.storage_offset())
        )

    def release(self, parameter: torch.nn.Parameter) -> None:
        """Frees a parameter's memory; it is empty afterwards, and may be released again."""
        self._parts.pop(id(parameter), None)  # views of its memory
        parameter.data = parameter.data.new_empty(0)
        release_freed_memory()
