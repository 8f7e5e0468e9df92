"""Hugging Face folder <-> megatron-core model, through one table a family (model/families)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.conversion.safetensors_folder import TensorReader, dtype_name, write_folder
from megatron_solopo.errors import UserError
from megatron_solopo.model.families import family_of
from megatron_solopo.model.families.operators import Entry

NEVER_WEIGHTS = (".rotary_emb.inv_freq",)
"""Endings of tensors that old folders hold and that the config defines."""


def named_entries(
    model: GPTModel, hf_config: PretrainedConfig
) -> Iterator[tuple[Entry, tuple[str, ...], torch.nn.Parameter]]:
    """(entry, its Hugging Face names, the parameter on this process) for every parameter of the model.

    Raises:
        UserError: a parameter that no entry makes, or an entry without a parameter.
    """
    parameters = dict(model.named_parameters())
    for entry in family_of(hf_config).table(hf_config, model.vocab_size):
        if "{layer}" not in entry.megatron:
            if entry.megatron in parameters:
                yield entry, entry.hf, parameters.pop(entry.megatron)
            continue
        for local, layer in enumerate(model.decoder.layers):
            number = layer.layer_number - 1  # mcore counts from 1, over all pipeline stages
            name = entry.megatron.format(layer=local)
            if name not in parameters:
                raise UserError(f"the model has no parameter {name!r}, which {hf_config.model_type}'s table names")
            yield entry, tuple(hf.format(layer=number) for hf in entry.hf), parameters.pop(name)
    if parameters:
        raise UserError(f"{hf_config.model_type}'s table makes no parameter {sorted(parameters)[0]!r}")


def _cut_dimension(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


@torch.no_grad()
def load_weights(model: GPTModel, hf_config: PretrainedConfig, folder: str | Path) -> None:
    """Copies a folder's weights into the model, cut for this process, converted to the model's dtype.

    Raises:
        UserError: a tensor is missing, left over, or has the wrong shape.
    """
    reader = TensorReader(folder)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    expected = {
        name
        for entry in family_of(hf_config).table(hf_config, model.vocab_size)
        for name in _all_layers(entry, hf_config)
    }
    left_over = {name for name in reader.names() - expected if not name.endswith(NEVER_WEIGHTS)}
    if hf_config.tie_word_embeddings:
        left_over.discard("lm_head.weight")
    if left_over:
        raise UserError(
            f"{folder}: the tensor {sorted(left_over)[0]!r} is not part of {hf_config.model_type} ({len(left_over)} such); "
            "training would lose it"
        )
    for entry, names, parameter in named_entries(model, hf_config):
        whole = entry.operator.to_megatron([reader.get(name) for name in names])
        part = entry.operator.cut(whole, rank, size, _cut_dimension(parameter))
        if part.shape != parameter.shape:
            raise UserError(
                f"{folder}: {', '.join(names)} give shape {tuple(part.shape)}, config.json wants {tuple(parameter.shape)}"
            )
        parameter.copy_(part)


def _all_layers(entry: Entry, hf_config: PretrainedConfig) -> Iterator[str]:
    for name in entry.hf:
        if "{layer}" in name:
            yield from (name.format(layer=layer) for layer in range(hf_config.num_hidden_layers))
        else:
            yield name


@torch.no_grad()
def hf_tensors(model: GPTModel, hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor on the CPU), joined over tensor-parallel processes, padding removed.

    Collective over the tensor-parallel group.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    for entry, names, parameter in named_entries(model, hf_config):
        dimension = _cut_dimension(parameter)
        parts = [parameter.detach()]
        if size > 1 and dimension is not None:
            parts = [torch.empty_like(parameter) for _ in range(size)]
            dist.all_gather(
                parts, parameter.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group()
            )
        for name, tensor in zip(names, entry.operator.to_hf(entry.operator.join(parts, dimension)), strict=True):
            yield name, tensor.cpu().clone()


def save_folder(
    model: GPTModel, hf_config: PretrainedConfig, source: str | Path, target: str | Path, force: bool = False
) -> None:
    """Writes the model as a Hugging Face folder; config and tokenizer files come from ``source``.

    Collective; the first process writes.

    Raises:
        UserError: see `write_folder`.
    """
    tensors = hf_tensors(model, hf_config)
    if dist.get_rank() != 0:
        for _ in tensors:
            pass
        return
    document = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    document.pop("torch_dtype", None)
    document["dtype"] = dtype_name(next(model.parameters()).dtype)
    document.setdefault("architectures", [f"{hf_config.model_type.capitalize()}ForCausalLM"])
    write_folder(Path(target), Path(source), json.dumps(document, indent=2) + "\n", tensors, force=force)
