"""Weights of a model in megatron-core's distributed format: any layout writes them, any other reads them.

A run's checkpoints hold them beside the optimizer. A Megatron folder (`save_megatron_folder`) holds only them, as
iteration 0, with the config and tokenizer files of the Hugging Face folder it was made from, and stands wherever a
Hugging Face folder does.
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
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_solopo.atomic import folder_aside
from megatron_solopo.conversion.companions import Companions
from megatron_solopo.conversion.hf_weights import HfWeights
from megatron_solopo.conversion.manifest import checkpoint_folder, write_latest, write_manifest
from megatron_solopo.conversion.places import put_in_place, restore
from megatron_solopo.conversion.sharded_write import ShardedWrite, WriteItem
from megatron_solopo.conversion.stored import StoredWeights, parts_of_parameters
from megatron_solopo.errors import UserError
from megatron_solopo.model.transformer_engine import UNSAFE_PICKLES
from megatron_solopo.parallel.platform import first_error, run_on_rank0
from megatron_solopo.progress import ProgressBar, reporting

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The optimizer's state by parameter, so that another layout can read it."""

FP8_SCALES = "._extra_state"
"""In the keys of what Transformer Engine's layers know of earlier batches. Only delayed scaling knows anything; other
layers, and megatron-core's own, have empty entries, which would only tie a checkpoint to the implementation."""


def chunk_names(models: Sequence[GPTModel]) -> list[str]:
    """Megatron's keys of the model chunks. The files know a tensor by its place in the whole model."""
    return ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]


def model_states(
    models: Sequence[GPTModel], source: Path | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, None]]]:
    """What a checkpoint holds of the chunks of a model, and the entries of `FP8_SCALES` left out, both by chunk.

    Args:
        source: the checkpoint that it is to be loaded from, or None when saving.

    Raises:
        UserError: the checkpoint holds scales that only an environment variable allows to load.
    """
    states = {
        name: model.sharded_state_dict(metadata=dict(METADATA))
        for name, model in zip(chunk_names(models), models, strict=True)
    }
    keep = models[0].config.fp8 is not None and models[0].config.fp8_recipe == "delayed"
    stored = load_sharded_metadata(str(source)).keys() if keep and source is not None else None
    left_out: dict[str, dict[str, None]] = {}
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
    """Puts loaded states of `model_states` into the chunks."""
    for name, model in zip(chunk_names(models), models, strict=True):
        model.load_state_dict(loaded[name] | left_out[name])


def load_weights_from(source: Path, models: Sequence[GPTModel]) -> None:
    """The weights of a complete checkpoint, without its optimizer, into the chunks of a model.

    Raises:
        UserError: it belongs to another model.
    """
    stored_weights(source, models).fill_all()


def stored_weights(source: Path, models: Sequence[GPTModel]) -> StoredWeights:
    """The same, to be read a parameter at a time."""
    states, _ = model_states(models, source)
    return StoredWeights(source, models, [states[name] for name in chunk_names(models)])


def reason_of(error: BaseException) -> str:
    """The last line of what megatron-core and torch say of a checkpoint that does not fit."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def stored_dtype(source: Path) -> torch.dtype:
    """Of the weights in a checkpoint."""
    return dist_checkpointing.load_tensors_metadata(str(source))["embedding.word_embeddings.weight"].dtype


def save_megatron_folder(models: Sequence[GPTModel], companions: Companions, target: Path, weights: HfWeights) -> None:
    """Writes a Megatron folder; collective. A model in ``target`` is replaced once all is written.

    Args:
        models: the chunks of a model without weights.
        companions: config and tokenizer files that go beside the weights.
        weights: of the model. On the CPU a parameter is filled when it is written, and empty afterwards, so that one at
            a time is in memory.

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
        if device.type != "cpu":  # the writer takes all of them from there first
            weights.fill_all()
        states, _ = model_states(models)
        apply_factories(states)
        owners = {}
        for parameter, parts in parts_of_parameters(models, [states[name] for name in chunk_names(models)]):
            for part in parts:
                part.data = in_a_storage_of_its_own(part.data)
                owners[part.data.data_ptr()] = parameter
        filling = _Filling(weights, owners)
        write = ShardedWrite(states, step, device)
        with reporting(f"writing {target}"):
            write.run(iter if device.type != "cpu" else filling)
            failed = write.finish()
        problem = first_error((str(filling.error) if filling.error else "") or failed)
    if problem is None:
        problem = first_error(run_on_rank0(lambda: _publish(aside, companions, target)))
    if problem is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if filling is not None and filling.error is not None:
            raise filling.error
        raise UserError("write-failed", f"--save {target}: not written ({problem})")


def in_a_storage_of_its_own(part: torch.Tensor) -> torch.Tensor:
    """The same memory on the CPU, not as a part of a larger tensor, which megatron-core's writer would copy."""
    part = part.detach()
    if part.device.type != "cpu" or not part.is_contiguous() or part.dim() == 0:
        return part
    begin = part.storage_offset() * part.itemsize
    own = part.untyped_storage()[begin : begin + part.numel() * part.itemsize]
    return torch.empty(0, dtype=part.dtype).set_(own, 0, part.shape, part.stride())


class _Filling:
    """Fills each parameter before its first part is written, and empties it behind its last.

    Args:
        owners: the parameter whose memory begins or goes on at an address, for the address of every part.

    Attributes:
        error: why a parameter could not be filled, which megatron-core's writer would tell as its own failure.
    """

    def __init__(self, weights: HfWeights, owners: Mapping[int, torch.nn.Parameter]) -> None:
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
                parameter.untyped_storage().resize_(0)  # the memory of ``tensor`` too, which nobody reads again


def _publish(aside: Path, companions: Companions, target: Path) -> None:
    write_manifest(checkpoint_folder(aside, 0), 0, {}, {})
    companions.write(aside)
    write_latest(aside, 0)
    put_in_place(aside, target)
