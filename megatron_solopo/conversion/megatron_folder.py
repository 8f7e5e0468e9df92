"""Weights of a model in megatron-core's distributed format, which any layout writes and any other reads.

A run's checkpoints hold them with the optimizer. A Megatron folder (`save_megatron_folder`) holds only weights, as
Megatron-LM's ``release``, with the config and tokenizer files of its Hugging Face folder, and may replace that folder
in every option; Megatron-LM and Megatron-Bridge start from it too where they have the model (`trainers`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_solopo.atomic import folder_aside
from megatron_solopo.conversion.hf_weights import HfWeights
from megatron_solopo.conversion.manifest import checkpoint_folder, describe_files, write_latest, write_manifest
from megatron_solopo.conversion.places import put_in_place, restore
from megatron_solopo.conversion.sharded_write import ShardedWrite, WriteItem
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.conversion.stored import StoredWeights, parts_of_parameters
from megatron_solopo.conversion.stored_index import StoredIndex
from megatron_solopo.data.memory import release_freed_memory
from megatron_solopo.errors import UserError
from megatron_solopo.model.lora import has_adapters, is_adapter
from megatron_solopo.model.transformer_engine import UNSAFE_PICKLES
from megatron_solopo.parallel.platform import first_error, run_on_rank0
from megatron_solopo.progress import ProgressBar, reporting

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Stores the optimizer's state by parameter, so that another layout can read it."""

FP8_SCALES = "._extra_state"
"""Part of the keys of Transformer Engine's scales of earlier batches. Only delayed scaling has scales; other layers
have empty entries, which would only tie a checkpoint to the implementation."""


def chunk_names(models: Sequence[GPTModel]) -> list[str]:
    """Megatron's keys of the model chunks. In the files, a tensor's key is its place in the unsplit model."""
    return ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]


def model_states(
    models: Sequence[GPTModel], source: Path | None = None, frozen: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, None]]]:
    """(states of the chunks of a model, the omitted entries of `FP8_SCALES`), both by chunk.

    Args:
        source: the checkpoint to load from; None when saving.
        frozen: of a model with LoRA's adapters, whether these are the states of its frozen weights or of its adapters.

    Raises:
        UserError: the checkpoint holds scales that are loaded only if an environment variable allows it.
    """
    states = {
        name: model.sharded_state_dict(metadata=dict(METADATA))
        for name, model in zip(chunk_names(models), models, strict=True)
    }
    keep = models[0].config.fp8 is not None and models[0].config.fp8_recipe == "delayed"
    stored = load_sharded_metadata(str(source)).keys() if keep and source is not None else None
    left_out: dict[str, dict[str, None]] = {}
    if has_adapters(models):
        states = {
            name: {key: value for key, value in state.items() if is_adapter(key) != frozen}
            for name, state in states.items()
        }
    for name, state in states.items():
        scales = [key for key in state if FP8_SCALES in key]
        missing = [key for key in scales if stored is not None and state[key].unique_key not in stored]
        left_out[name] = dict.fromkeys(missing if keep else scales)
        for key in left_out[name]:
            del state[key]
        if stored is not None and len(left_out[name]) < len(scales) and os.environ.get(UNSAFE_PICKLES) != "1":
            raise UserError(
                "pickle-unsafe",
                f"--fp8-recipe delayed: {source} holds FP8 scales that Transformer Engine keeps as Python pickles, "
                f"which could run any code; if the checkpoint is your own, set {UNSAFE_PICKLES}=1 in the environment",
            )
    return states, left_out


def load_models(models: Sequence[GPTModel], loaded: dict[str, Any], left_out: dict[str, dict[str, None]]) -> None:
    """Loads states of `model_states` into the chunks."""
    for name, model in zip(chunk_names(models), models, strict=True):
        # megatron-core reports what the checkpoint lacks; frozen weights are in none.
        model.load_state_dict(loaded[name] | left_out[name], strict=not has_adapters(models))


def load_weights_from(source: Path, models: Sequence[GPTModel], frozen: bool = False) -> None:
    """Loads the weights of a complete checkpoint, without its optimizer, into the chunks of a model.

    Args:
        frozen: see `model_states`.

    Raises:
        UserError: it belongs to another model.
    """
    stored_weights(source, models, frozen).fill_all()


def stored_weights(source: Path, models: Sequence[GPTModel], frozen: bool = False) -> StoredWeights:
    """The weights of a complete checkpoint, which are read one parameter at a time; see `model_states`."""
    states, _ = model_states(models, source, frozen)
    return StoredWeights(source, models, [states[name] for name in chunk_names(models)])


def reason_of(error: BaseException) -> str:
    """The type and last line of megatron-core's or torch's error about a checkpoint that does not fit."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def stored_dtype(source: Path) -> torch.dtype:
    """The dtype of the weights in a checkpoint, or of LoRA's adapters."""
    tensors = {
        key: value.properties.dtype
        for key, value in StoredIndex(source).metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    if (embedding := tensors.get("embedding.word_embeddings.weight")) is not None:
        return embedding
    return next(dtype for key, dtype in tensors.items() if is_adapter(key) and not key.startswith("optimizer."))


def save_megatron_folder(
    models: Sequence[GPTModel],
    sidecar_files: SidecarFiles,
    target: Path,
    weights: HfWeights | StoredWeights,
    beside: dict[str, Any] | None = None,
) -> None:
    """Writes a Megatron folder; collective. A model in ``target`` is replaced once all is written.

    Args:
        models: the chunks of a model without weights.
        sidecar_files: config and tokenizer files beside the weights.
        weights: of the model. On the CPU each parameter is filled when it is written and emptied afterwards, so that
            one at a time is in memory.
        beside: what the checkpoint holds beside tensors, see `trainers.state_of_trainers`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    aside = folder_aside(target)
    step = checkpoint_folder(aside, 0)

    def begin() -> None:
        restore(target)
        shutil.rmtree(aside, ignore_errors=True)
        step.mkdir(parents=True)

    problem, filling = first_error(run_on_rank0(begin)), None
    if problem is None:
        device = next(models[0].parameters()).device
        if device.type != "cpu":  # the writer copies all of them from the device first
            weights.fill_all()
        states, _ = model_states(models)
        if beside is not None:
            _add_empty_scales(models, states)
        apply_factories(states)
        owners = {}
        for parameter, parts in parts_of_parameters(models, [states[name] for name in chunk_names(models)]):
            for part in parts:
                owners[part.data.data_ptr()] = parameter
        filling = _Filling(weights, owners)
        write = ShardedWrite(states | (beside or {}), step, device)
        with reporting(f"writing {target}"):
            write.run(iter if device.type != "cpu" else filling)
            failed = write.finish()
        problem = first_error((str(filling.error) if filling.error else "") or failed)
    if problem is None:
        problem = first_error(run_on_rank0(lambda: _publish(aside, sidecar_files, target, beside)))
    if problem is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if filling is not None and filling.error is not None:
            raise filling.error
        raise UserError("write-failed", f"--save {target}: not written ({problem})")


class _Filling:
    """Fills each parameter before its first part is written, and empties it after its last.

    Args:
        owners: address of each part -> its parameter.

    Attributes:
        error: why a parameter could not be filled; megatron-core's writer would report it as a failed write.
    """

    def __init__(self, weights: HfWeights | StoredWeights, owners: Mapping[int, torch.nn.Parameter]) -> None:
        self._weights, self._owners, self.error = weights, owners, None

    def __call__(self, items: Sequence[WriteItem]) -> Iterator[WriteItem]:
        left = Counter(id(self._owners[tensor.data_ptr()]) for _, tensor in items)
        parts = Counter(map(id, self._owners.values()))
        if any(parts[owner] != count for owner, count in left.items()):
            raise ValueError("the parts of a parameter are written to several files")
        empty = set(left)
        for item, tensor in ProgressBar(items, desc="writing weights", unit="tensor", leave=False):
            parameter = self._owners[tensor.data_ptr()]
            if id(parameter) in empty:
                empty.remove(id(parameter))
                try:
                    self._weights.fill(parameter)
                except Exception as error:
                    self.error = error
                    raise
            yield item, tensor
            left[id(parameter)] -= 1
            if not left[id(parameter)]:
                parameter.untyped_storage().resize_(0)  # frees the memory of ``tensor`` too
                release_freed_memory()


def _add_empty_scales(models: Sequence[GPTModel], states: dict[str, Any]) -> None:
    """Adds the empty entries of Transformer Engine's layers, which megatron-core asks for by name when it loads them:
    those that it writes for its own matrices, and those of norms, which only Transformer Engine has."""
    for state, model in zip(states.values(), models, strict=True):
        norms = {key: part for key, part in state.items() if key.endswith("layernorm.weight")}
        state |= {
            key: part
            for key, part in model.sharded_state_dict(metadata=dict(METADATA)).items()
            if key.endswith(FP8_SCALES)
        }
        for key, part in norms.items():
            if part.key.endswith("layernorm.weight"):  # not fused with a matrix
                axes = slice(part.prepend_axis_num)
                place = (part.global_shape[axes], part.global_offset[axes]) if part.prepend_axis_num else ((1,), (0,))
                entry = ShardedObject(_of_module(part.key), None, *place, part.replica_id)
                state[_of_module(key)] = entry


def _of_module(weight: str) -> str:
    return weight.removesuffix(".weight") + FP8_SCALES


def _publish(aside: Path, sidecar_files: SidecarFiles, target: Path, beside: dict[str, Any] | None) -> None:
    folder = checkpoint_folder(aside, 0)
    if beside is not None:  # for readers before megatron-core 0.19, which has it among the tensors' files
        torch.save(beside, folder / COMMON_STATE_FNAME)
    write_manifest(folder, 0, {}, {}, describe_files(folder))
    sidecar_files.write(aside)
    write_latest(aside, 0)
    put_in_place(aside, target)
