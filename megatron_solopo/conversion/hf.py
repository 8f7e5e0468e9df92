"""Hugging Face folder <-> megatron-core model, by one table for each family (model/families)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.conversion.carried import carried_names
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.quantized import WeightReader
from megatron_solopo.conversion.stored import StoredWeights
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.moe import in_one_tensor
from megatron_solopo.model.families.operators import Entry, Operator, part_of
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import outer_model_type
from megatron_solopo.model.lora import is_adapter
from megatron_solopo.model.transformer_engine import portable_name
from megatron_solopo.parallel.topology import expert_count

EMBEDDING, TIED_COPY = "embedding.word_embeddings.weight", "output_layer.weight"
"""With tied embeddings the last of several pipeline stages holds a copy of the embedding; Megatron keeps it equal."""


type Entered = Iterator[tuple[Entry, tuple[str, ...], torch.nn.Parameter]]
"""Parameters of a chunk with their entries and names, as `named_entries` yields them."""


def named_entries(model: GPTModel, hf_config: PretrainedConfig, stacked: bool = False) -> Entered:
    """Yields (entry, its Hugging Face names, the parameter on this process) for every parameter of the model but those
    of LoRA's adapters.

    Args:
        stacked: the folder has the experts of each layer in one tensor, see `in_one_tensor`.

    Raises:
        UserError: a parameter has no entry, or an entry has no parameter.
    """
    parameters = {portable_name(name): value for name, value in model.named_parameters() if not is_adapter(name)}
    table = family_of(hf_config).table(hf_config, model.vocab_size)
    for entry in in_one_tensor(table) if stacked else table:
        if "{layer}" not in entry.megatron:
            # Only the first and the last pipeline stage hold parameters outside layers.
            if entry.megatron in parameters:
                yield entry, entry.hf, parameters.pop(entry.megatron)
            if entry.megatron == EMBEDDING and hf_config.tie_word_embeddings and TIED_COPY in parameters:
                yield entry, entry.hf, parameters.pop(TIED_COPY)
            continue
        for local, layer in enumerate(model.decoder.layers):
            number = layer.layer_number - 1  # mcore counts from 1, over all pipeline stages
            if entry.layers is not None and number not in entry.layers:
                continue
            # This process's experts, by their number in the model.
            for place, expert in enumerate(layer.mlp.local_expert_indices if entry.of_experts else (0,)):
                name = entry.megatron.format(layer=local, expert=place)
                if name not in parameters:
                    raise UserError(
                        "parameter-unmapped",
                        f"the model has no parameter {name!r}, which {hf_config.model_type}'s table names",
                    )
                names = tuple(hf.format(layer=number, expert=expert) for hf in entry.hf)
                yield entry, names, parameters.pop(name)
    if parameters:
        raise UserError(
            "parameter-unmapped", f"{hf_config.model_type}'s table has no entry for the parameter {min(parameters)!r}"
        )


def tensor_group(entry: Entry) -> dist.ProcessGroup:
    """Returns the processes over which a parameter is split."""
    if entry.of_experts:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _split_dimension(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def split_size(entry: Entry, parameter: torch.nn.Parameter) -> int:
    """Returns the number of processes over which a parameter is split."""
    return 1 if _split_dimension(parameter) is None else tensor_group(entry).size()


def local_part(entry: Entry, parameter: torch.nn.Parameter) -> tuple[int, int, int | None]:
    """Returns (index of this process's part, number of parts, the split dimension) of a parameter, for `Operator.fill`;
    (0, 1, None) if the parameter is not split."""
    dimension = _split_dimension(parameter)
    return (0, 1, None) if dimension is None else (tensor_group(entry).rank(), tensor_group(entry).size(), dimension)


def hf_shapes(chunks: Sequence[GPTModel], hf_config: PretrainedConfig, stacked: bool = False) -> dict[str, torch.Size]:
    """Hugging Face name -> shape of every tensor of the model; all tensors on rank 0.

    No tensor is read. Collective over the expert-parallel and pipeline groups.
    """
    shapes: dict[str, torch.Size] = {}
    for chunk in chunks:
        for entry, names, parameter in named_entries(chunk, hf_config, stacked):
            dimension = _split_dimension(parameter)
            parts = [torch.empty_like(parameter, device="meta")] * split_size(entry, parameter)
            joined = entry.operator.join(parts, dimension)
            shapes |= {name: part.shape for name, part in zip(names, entry.operator.to_hf(joined), strict=True)}
    for group in (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        gathered = [shapes] * group.size()
        if group.size() > 1:
            dist.all_gather_object(gathered, shapes, group=group)
        shapes = {name: shape for of_rank in gathered for name, shape in of_rank.items()}
    return shapes


@torch.no_grad()
def hf_tensors(
    chunks: Sequence[GPTModel],
    hf_config: PretrainedConfig,
    stored: StoredWeights | None = None,
    entries: Callable[[GPTModel, PretrainedConfig], Entered] = named_entries,
    replicas: Collection[int] = (0,),
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, unsplit tensor on the CPU), joined over tensor-parallel processes, without padding.

    Collective over the tensor-parallel, expert-parallel and pipeline groups. The first process of a replica yields the
    tensors of all stages, one at a time, a stage's model chunks one after the other; others yield a part or nothing.

    Args:
        stored: the checkpoint from which each parameter is mapped when it is needed, and released afterwards. Without
            it the model is already loaded, and keeps its weights.
        entries: yields the parameters of a chunk.
        replicas: the `data-parallel replicas <replica>` that need the tensors; rank 0 is in the first one.
    """
    sends = parallel_state.get_tensor_model_parallel_rank() == 0 and replica() in replicas
    of_stage = (named for chunk in chunks for named in _hf_tensors_of_chunk(entries(chunk, hf_config), stored))
    if parallel_state.is_pipeline_first_stage():
        yield from of_stage
        for stage in range(1, parallel_state.get_pipeline_model_parallel_world_size()) if sends else ():
            while (received := _receive_tensor(stage)) is not None:
                yield received
        return
    for name, tensor in of_stage:
        if sends and name not in _names_of_first_stage(hf_config):
            _send_tensor(name, tensor)
    if sends:
        _send_tensor(None, None)


def replica() -> int:
    """Returns the number of this process's copy of the model, of which context parallelism has several."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _names_of_first_stage(hf_config: PretrainedConfig) -> tuple[str, ...]:
    """Names that only the first stage writes: the last stage does not send its copy of a tied embedding."""
    return ("model.embed_tokens.weight",) if hf_config.tie_word_embeddings else ()


def _send_tensor(name: str | None, tensor: Tensor | None) -> None:
    """Sends a tensor to the first stage's process of this pipeline group; None ends the stage's tensors."""
    group = parallel_state.get_pipeline_model_parallel_group()
    target = parallel_state.get_pipeline_model_parallel_first_rank()
    dist.send_object_list([(name, None if tensor is None else (tensor.shape, tensor.dtype))], target, group=group)
    if tensor is not None:
        dist.send(tensor.to(_wire_device()), target, group=group)


def _receive_tensor(stage: int) -> tuple[str, Tensor] | None:
    group = parallel_state.get_pipeline_model_parallel_group()
    source = dist.get_global_rank(group, stage)
    header: list[tuple[str | None, Any]] = [(None, None)]
    dist.recv_object_list(header, source, group=group)
    name, what = header[0]
    if name is None:
        return None
    tensor = torch.empty(*what[:1], dtype=what[1], device=_wire_device())
    dist.recv(tensor, source, group=group)
    return name, tensor.cpu()


def _wire_device() -> torch.device:
    """Returns the device of sent tensors: NCCL sends only device memory."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _hf_tensors_of_chunk(entries: Entered, stored: StoredWeights | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a model chunk and of all its experts, joined over tensor-parallel processes; on the first
    process of each group alone."""
    for entry, names, parameter in entries:
        if stored is not None:
            stored.map(parameter)
        yield from _hf_tensors_of_parameter(entry, names, parameter, stored)
        if stored is not None:
            stored.release(parameter)


def _hf_tensors_of_parameter(
    entry: Entry, names: tuple[str, ...], parameter: torch.nn.Parameter, stored: StoredWeights | None
) -> Iterator[tuple[str, Tensor]]:
    group, dimension = tensor_group(entry), _split_dimension(parameter)
    joined: Tensor | None = parameter.detach()
    if dimension is not None and group.size() > 1:
        joined = _joined(entry.operator, parameter, group, dimension, stored)
    experts: Iterable[tuple[tuple[str, ...], Tensor]] = [] if joined is None else [(names, joined)]
    if entry.of_experts and joined is not None:
        # All processes reach their n-th expert at the same time.
        experts = _of_all_experts(names, joined, parallel_state.get_expert_model_parallel_group())
    for expert_names, weights in experts:
        for name, tensor in zip(expert_names, entry.operator.to_hf(weights), strict=True):
            yield name, tensor.detach().cpu().contiguous()  # an object of its own, see `save_folder`


def _joined(
    operator: Operator,
    parameter: torch.nn.Parameter,
    group: dist.ProcessGroup,
    dimension: int,
    stored: StoredWeights | None,
) -> Tensor | None:
    """Returns the unsplit parameter on the first process of a group, None on the others.

    The first process receives each shard where it belongs, so that it holds the parameter once.
    """
    if group.rank() > 0:
        for piece in operator.pieces(parameter.detach()):
            dist.send(piece.contiguous(), group=group, group_dst=0)
        return None
    full = operator.empty(parameter.detach(), group.size(), dimension)
    own = operator.slots(full, 0, group.size(), dimension)
    for slot, piece in zip(own, operator.pieces(parameter.detach()), strict=True):
        slot.copy_(piece)
    if stored is not None:
        stored.release(parameter)
    for rank in range(1, group.size()):
        for slot in operator.slots(full, rank, group.size(), dimension):
            received = slot if slot.is_contiguous() else torch.empty_like(slot, memory_format=torch.contiguous_format)
            dist.recv(received, group=group, group_src=rank)
            if received is not slot:
                slot.copy_(received)
    return full


def _of_all_experts(
    names: tuple[str, ...], weights: Tensor, group: dist.ProcessGroup
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yields (names, parameter) of the expert of each process of a group in turn; the first process alone."""
    if group.rank() > 0:
        dist.send_object_list([names], group=group, group_dst=0)
        dist.send(weights.contiguous(), group=group, group_dst=0)
        return
    yield names, weights
    for rank in range(1, group.size()):
        theirs: list[Any] = [None]
        dist.recv_object_list(theirs, group=group, group_src=rank)
        received = torch.empty_like(weights, memory_format=torch.contiguous_format)
        dist.recv(received, group=group, group_src=rank)
        yield theirs[0], received


def kept_dtypes(hf_config: PretrainedConfig) -> dict[str, torch.dtype]:
    """Hugging Face name -> dtype of the tensors that have their own."""
    table = family_of(hf_config).table(hf_config, hf_config.vocab_size)
    kept = [entry for entry in table if entry.dtype is not None]
    return {name: entry.dtype for entry in kept for name in all_names(entry, hf_config) if entry.dtype is not None}


def all_names(entry: Entry, hf_config: PretrainedConfig) -> set[str]:
    """Returns the names of an entry's tensors in the files, of all layers and experts."""
    experts = range(expert_count(hf_config) if entry.of_experts else 1)
    layers = range(hf_config.num_hidden_layers) if entry.layers is None else entry.layers
    names = {name.format(layer=layer, expert=expert) for name in entry.hf for layer in layers for expert in experts}
    return {part_of(name)[0] for name in names}


def beside_of(folder: str | Path, hf_config: PretrainedConfig) -> tuple[TensorReader, list[str]] | None:
    """Returns (a folder's weights, names of those that are carried through); None for a folder without weights, from
    which a run with --random-init may start, and for a Megatron folder, which is made of none with such tensors.

    Raises:
        UserError: the language model is part of another, whose weights are not there, or a file is damaged.
    """
    try:
        reader = WeightReader(folder)
    except UserError as error:
        if error.code != "weights-missing":
            raise
        if (whole := outer_model_type(hf_config)) is not None:
            raise UserError(
                "weights-missing",
                f"{folder}: holds no weights, of which an export carries those of {whole} beside its language model; "
                "copy or download them",
            ) from None
        return None
    return reader, carried_names(reader, hf_config)


def describe_carried(folder: str | Path, hf_config: PretrainedConfig) -> str | None:
    """Describes in words, for the log, which tensors of a folder are carried through; None if there are none."""
    names = beside[1] if (beside := beside_of(folder, hf_config)) is not None else ()
    if not names:
        return None
    return f"{len(names)} tensors of {folder} are not trained, such as {names[0]}; an export has them as they are"
