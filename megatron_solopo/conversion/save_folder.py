"""A model written as a Hugging Face folder, by one process or by several that share out the weight files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.config import MAX_SHARD_SIZE
from megatron_solopo.conversion.carried import carried_tensors
from megatron_solopo.conversion.hf import Entered, beside_of, hf_shapes, hf_tensors, kept_dtypes, named_entries, replica
from megatron_solopo.conversion.hf_folder import FolderWriter, has_stacked_experts, write_weights
from megatron_solopo.conversion.shards import Shards
from megatron_solopo.conversion.sidecar_files import SidecarFiles, config_json
from megatron_solopo.conversion.stored import StoredWeights
from megatron_solopo.parallel.platform import from_all_ranks
from megatron_solopo.progress import ProgressBar


def save_folder(
    chunks: Sequence[GPTModel],
    hf_config: PretrainedConfig,
    source: str | Path,
    target: str | Path,
    force: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: str | None = None,
    added_tokens: str | None = None,
    end_of_turn: int | None = None,
    chat_template_date: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    stored: StoredWeights | None = None,
    change: Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]] | None = None,
    made_of: str | None = None,
) -> None:
    """Writes the model as a Hugging Face folder, with the config and tokenizer files of ``source``, adapted to the
    training options, and its tensors beside the trained model as they are (`carried`).

    Collective. Rank 0 writes; with ``made_of``, the first process of every replica of the model that sees the folder
    writes some of the weight files, if the replicas have the same experts.

    Args:
        chunks: this process's parts of the model.
        chat_template, chat_template_kwargs, added_tokens, end_of_turn, chat_template_date: see `SidecarFiles`.
        dtype: of the files; default the model's.
        stored: see `hf_tensors`.
        change: applied to the tensors on rank 0; without ``made_of``.
        made_of: see `Shards`. What only makes tensors of files that are kept is not read.

    Raises:
        UserError: on rank 0, see `FolderWriter`; the others return.
    """
    # Adapters are added by the names of single experts. Rank 0 alone need have the source.
    decided = [dist.get_rank() == 0 and change is None and has_stacked_experts(source)]
    dist.broadcast_object_list(decided)
    (stacked,) = decided
    shapes = hf_shapes(chunks, hf_config, stacked)
    dtypes = kept_dtypes(hf_config)
    dtype = dtype or next(chunks[0].parameters()).dtype
    writer, carried = None, iter(())
    plan: list[tuple[Shards, dict[str, str], set[str]] | None] = [None]
    try:
        if dist.get_rank() == 0:
            document = config_json(source, hf_config, dtype)
            sidecar_files = SidecarFiles(
                Path(source),
                document,
                chat_template,
                chat_template_kwargs,
                added_tokens,
                end_of_turn,
                chat_template_date,
            )
            of_files, stored_names, beside_names = shapes, {name: name for name in shapes}, set[str]()
            if (beside := beside_of(source, hf_config)) is not None:
                reader, names = beside
                forms = {name: reader.form_of(name) for name in names}
                carried, beside_names = carried_tensors(reader, names), set(forms)
                stored_names = {name: reader.stored(name) for name in shapes}
                of_files = {stored_names[name]: shape for name, shape in shapes.items()}
                of_files |= {name: shape for name, (shape, _) in forms.items()}
                dtypes = {reader.stored(name): kept for name, kept in dtypes.items()}
                dtypes |= {name: of_source for name, (_, of_source) in forms.items()}
            writer = FolderWriter(Path(target), sidecar_files, of_files, dtype, max_shard_size, force, dtypes, made_of)
            plan = [(writer.shards, stored_names, beside_names)]
    finally:
        dist.broadcast_object_list(plan)  # None: rank 0 cannot write
    if plan[0] is None:
        return
    shards, stored_names, beside_names = plan[0]
    first = parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    replicas = _writing_replicas(shards, first)
    if _have_all_experts():  # else the others send theirs
        shards.take(replicas.index(replica()) if replica() in replicas else None, len(replicas), beside_names)
    kept = {name for name in shapes if stored_names.get(name) in shards.kept}
    entries = partial(_entries_to_write, stacked=stacked, kept=kept)
    tensors = hf_tensors(chunks, hf_config, stored, entries, replicas)
    if writer is not None and shards.kept_files:
        print(f"{target}: {shards.kept_files} of {shards.files} files were complete before, and are kept")
    problem = None
    if first and replica() in replicas:
        if change is not None:
            tensors = change(tensors)
        tensors = chain(_one_at_a_time((stored_names[name], tensor) for name, tensor in tensors), carried)
        total = len(shards.shapes) - len(shards.kept)
        progress = ProgressBar(tensors, desc=f"writing {target}", total=total, unit="tensor", leave=False)
        problem = write_weights(Path(target), shards, progress)
    else:
        for _ in tensors:
            pass
    problems = from_all_ranks(problem)
    if writer is not None:
        of_ranks = ((rank, host, error) for rank, (host, error) in enumerate(problems) if error is not None)
        rank, host, problem = next(of_ranks, (0, "", None))
        writer.publish(problem.at(f"rank {rank} on {host}") if problem and rank else problem)


def _one_at_a_time(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors and empties each when the next one is asked for: callers still hold it while that is made."""
    for name, tensor in tensors:
        yield name, tensor
        tensor.data = tensor.data.new_empty(0)


def _writing_replicas(shards: Shards, first: bool) -> list[int]:
    """Returns the replicas of the model that write files: all whose first process sees the unfinished folder, or that
    of rank 0 alone. Collective.

    Args:
        first: whether this process is the first one of its replica.
    """
    seen = from_all_ranks(replica() if first and shards.is_here() else 0)
    return sorted({number for _, number in seen}) if _have_all_experts() else [0]


def _have_all_experts() -> bool:
    """Whether each replica of the other parameters has all experts, and they are not divided among several."""
    return parallel_state.get_expert_data_parallel_world_size() == parallel_state.get_data_parallel_world_size(
        with_context_parallel=True
    )


def _entries_to_write(model: GPTModel, hf_config: PretrainedConfig, stacked: bool, kept: Collection[str]) -> Entered:
    """`named_entries` without those of which all tensors are in files that are kept. Experts of several processes,
    which send theirs at the same time, are all there."""
    alone = parallel_state.get_expert_model_parallel_world_size() == 1
    for entry, names, parameter in named_entries(model, hf_config, stacked):
        if (entry.of_experts and not alone) or not all(name in kept for name in names):
            yield entry, names, parameter
