"""Reference log-probs, computed once through the training path and cached on disk for all epochs and restarts.

A cache file has one number for each scored segment (segment_table.py). Its name is a key of everything that the
numbers depend on: weights, token ids (and so data, tokenizer and template), the scored segments, stretched positions,
and precision. A run with other inputs uses another file. A file is checked against its checksum and against a few
recomputed examples.

Rank 0 reads the cache file and sends its table to the others, whose disks need not have it.

All ranks fill it: each computes its share of the examples and saves them in a separate partial file, on the disk that
it sees, so that a killed run computes no example twice. Ranks wait for each other without a time limit, not in a
collective: a slow rank delays the others and does not time them out. Only with expert parallelism must ranks compute in
step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from megatron_solopo.atomic import new_file
from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.conversion.start import weights_fingerprint
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.losses.solopo import needs_reference, reference_scores, tail_weight
from megatron_solopo.parallel.platform import first_of_node, resolve, wait_for_all
from megatron_solopo.parallel.topology import stage_sizes
from megatron_solopo.progress import ProgressBar, reporting
from megatron_solopo.training.engine import Engine, data_parallel
from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
from megatron_solopo.training.step import local_segment_sums, reduce_to_all_ranks
from megatron_solopo.training.step_work import make_packs

FORMAT = "3"
"""Version of the cache files."""

PARTIAL = ".partial.safetensors"
SECONDS_BETWEEN_SAVES = 30.0

LARGEST_FACTOR = 8
"""Most times the size of a training pack that `pack_factor` returns."""


def starting_weights(config: Config) -> str:
    """Returns a text that identifies the weights that the run starts from, the reference; reads all of them."""
    if config.model.random_init:
        drawn = "drawn by name" + (" on CUDA" if resolve(config.parallel.device) == "cuda" else "")
        return f"{drawn}, seed {config.training.seed}, config {_config_digest(config)}"
    with reporting("reading the weights"):
        return weights_fingerprint(config.model.hf_path)


def _config_digest(config: Config) -> str:
    return hashlib.sha256((Path(config.model.hf_path) / "config.json").read_bytes()).hexdigest()


def cache_key(config: Config, dataset: TokenDataset, weights: str) -> str:
    """Returns 16 hex digits over everything that the log-probs depend on; ``weights`` are `starting_weights`."""
    facts = {
        "format": FORMAT,
        "weights": weights,
        "config": _config_digest(config),
        "tokens": dataset.fingerprint,
        "scored": sorted(reference_scores(config.method)),
        "dtype": "bfloat16" if config.model.bf16 else "float32",
    }
    if dataset.stretch is not None:
        facts["stretch"] = dataclasses.asdict(dataset.stretch)
    if tail_weight(config.method) != 1:
        facts["tail_weight"] = tail_weight(config.method)
    if config.model.rope_scaling is not None:
        facts["rope_scaling"] = config.model.rope_scaling
    if config.model.add_special_tokens is not None:
        facts["add_special_tokens"] = config.model.add_special_tokens
    if config.model.transformer_impl != "portable":
        model = config.model
        facts["kernels"] = [model.transformer_impl, model.fp8_format, model.fp8_format and model.fp8_recipe]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def has_cache(method: MethodConfig) -> bool:
    """Whether a run keeps reference log-probs on disk."""
    return needs_reference(method) and method.reference == "cached"


def cache_folder(config: Config) -> Path:
    """Returns the folder of cache files: --reference-cache, or ``reference/`` beside the run folder."""
    return Path(config.method.reference_cache or Path(config.output.save).parent / "reference")


def reference_log_probs(
    engine: Engine,
    dataset: TokenDataset,
    config: Config,
    weights: str,
    message: Callable[[str], None] = lambda text: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> ReferenceLogProbs | None:
    """Returns the log-probs of a data set, from the cache or computed with the current model; where the run has no
    cache, they are computed and not saved.

    Must be called before training changes the weights: until then `Engine.eval` does not communicate. Collective.

    Args:
        dataset: the examples with the responses of `reference_scores`.
        weights: see `starting_weights`.
        message: prints a line of progress.
        stop_requested: whether any rank should stop; called between batches, see `StopRequests.requested`.

    Returns:
        None if stopped; the log-probs computed so far are saved in the cache.

    Raises:
        UserError: the cache file differs from what the model computes.
    """
    places, examples = SegmentPlaces.of_dataset(dataset), len(dataset.groups)
    if not has_cache(config.method):
        message(f"reference log-probs of {examples} examples")
        nothing = torch.zeros(places.size, dtype=torch.float64), torch.zeros(examples, dtype=torch.bool)
        table = _fill(engine, dataset, config, places, None, *nothing, stop_requested)
        return table if table is None else ReferenceLogProbs(places, table)
    path = cache_folder(config) / shared(lambda: f"{cache_key(config, dataset, weights)}.safetensors")
    complete = shared(lambda: _read(path, places))
    table, done = complete if complete is not None and complete[1].all() else _of_all_nodes(path, places)
    if not done.all():
        message(
            f"reference log-probs of {examples} examples"
            + (f", {int(done.sum())} of them computed before" if done.any() else "")
        )
        table = _fill(engine, dataset, config, places, path, table, done, stop_requested)
        if table is None:
            return None
        if problem := shared(lambda: _write(path, table, torch.ones(examples, dtype=torch.bool))):
            message(f"warning: {problem}; the run continues, the next one computes them again")
        elif first_of_node():
            for partial in _partial_files(path):
                partial.unlink(missing_ok=True)  # another run may fill the same file
    elif examples:
        _check(engine, dataset, config, places, path, table)
    wait_for_all("reference")
    return ReferenceLogProbs(places, table)


def shared[T](make: Callable[[], T], name: str = "reference") -> T:
    """Returns on every rank what ``make`` returns on rank 0, the only rank that calls it; the others wait without a
    time limit. Collective, where there are processes.

    Args:
        name: see `wait_for_all`.
    """
    if not dist.is_initialized():
        return make()
    results: list[T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            results = [make()]
        except UserError as error:
            results = [error]
    wait_for_all(name)
    dist.broadcast_object_list(results, src=0)
    result = results[0]
    if isinstance(result, UserError):
        raise result
    return cast(T, result)


def pack_factor(config: Config, num_layers: int, device: str) -> int:
    """Returns how many times as large as in training the packs are that the reference scores.

    Where a training pack fits into memory, so do these. Without gradients a pass holds what one layer computes, one
    layer after another. Training holds that and its gradients where layers are recomputed (2 times as much), else what
    every layer of a stage computes and the gradients of one (1 + layers); and it holds the optimizer's state, which
    does not exist yet. On the CPU packs are those of training (larger ones were not measured there). All ranks get the
    same number, in every start of a run.

    Args:
        num_layers: of the complete model.
        device: ``cuda`` or ``cpu``.
    """
    if device != "cuda":
        return 1
    if config.model.recompute_granularity is not None:
        return 2
    stages = stage_sizes(num_layers, config.parallel)
    assert stages is not None  # `check_layout` refuses others
    return min(1 + min(stages), LARGEST_FACTOR)


def _with_larger_packs(config: Config, factor: int) -> Config:
    training = config.training
    most = training.max_tokens_per_rank
    larger = dataclasses.replace(
        training,
        micro_batch_size=training.micro_batch_size * factor,
        max_tokens_per_rank=most and most * factor,
    )
    return dataclasses.replace(config, training=larger)


def _fill(
    engine: Engine,
    dataset: TokenDataset,
    config: Config,
    places: SegmentPlaces,
    path: Path | None,
    table: Tensor,
    done: Tensor,
    stop_requested: Callable[[], bool],
) -> Tensor | None:
    """Computes the rest of the table with the other ranks; returns the complete table, or None if stopped.

    Args:
        path: the cache file, beside which each rank saves what it computed; None for no cache.
    """
    rank, ranks = data_parallel()
    partial_file = path and path.with_name(f"{path.stem}.{rank}{PARTIAL}")
    # The last stage has the numbers; of the ranks that share its layers and sequences one writes.
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank():
        partial_file = None
    elif not parallel_state.is_pipeline_last_stage():
        partial_file = None
    todo = (~done).nonzero()[:, 0].tolist()
    new, newly_done = torch.zeros_like(table), torch.zeros_like(done)
    saved = time.monotonic()
    engine.eval()
    factor = pack_factor(config, engine.hf_config.num_hidden_layers, engine.platform.name)
    larger = _with_larger_packs(config, factor)
    batch = config.training.global_batch_size
    if factor > 1:  # enough examples for a pack of every rank
        batch = max(batch, ranks * larger.training.micro_batch_size)
    stopped = torch.zeros((), device=engine.platform.device)
    sharing = [parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()]
    if engine.models[0].config.num_moe_experts and parallel_state.get_expert_tensor_and_model_parallel_world_size() > 1:
        sharing = [None]  # tokens are sent to the experts of other ranks, which have other examples
    before = len(done) - len(todo)
    with ProgressBar(desc="reference log-probs", total=len(done), initial=before, unit="example", leave=False) as bar:
        for first in range(0, len(todo), batch):
            # Ranks that share a model replica compute together and do not wait for the others.
            stopped.fill_(stop_requested())
            for group in sharing:
                dist.all_reduce(stopped, op=dist.ReduceOp.MAX, group=group)
            if stopped:
                break
            indices = todo[first : first + batch]
            packs = make_packs(engine, dataset, indices, larger)
            at, sums = local_segment_sums(engine, places, packs)
            new[at] = sums
            newly_done[[index for pack in packs for index in pack.groups]] = True
            bar.update(len(indices))
            if partial_file and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                # With what was done before: an earlier run may have had another number of ranks.
                _write(partial_file, table + new, done | newly_done)
                saved = time.monotonic()
        wait_for_all("reference")
    dist.all_reduce(stopped, op=dist.ReduceOp.MAX)
    if stopped:
        if partial_file and newly_done.any():
            _write(partial_file, table + new, done | newly_done)
        return None
    return table + reduce_to_all_ranks(new.to(engine.platform.device)).cpu()


def _check(
    engine: Engine, dataset: TokenDataset, config: Config, places: SegmentPlaces, path: Path, table: Tensor
) -> None:
    """Recomputes a few examples: a cache that another model or version wrote must not cause a wrong loss.

    Raises:
        UserError: the cache file differs from what the model computes.
    """
    _, size = data_parallel()
    indices = list(range(min(size, len(dataset.groups))))
    engine.eval()
    at, sums = local_segment_sums(engine, places, make_packs(engine, dataset, indices, config))
    computed = torch.zeros_like(table)
    computed[at] = sums
    wait_for_all("reference")
    computed = reduce_to_all_ranks(computed.to(engine.platform.device)).cpu()
    # For the rounding of another layout or number of ranks; bfloat16 keeps 8 bits of each of a response's log-probs.
    tolerance = 0.05 if config.model.bf16 else 1e-3
    off = (computed - table).abs() - tolerance * (1 + table.abs())
    off = off[: int(places.counts[: len(indices)].sum())]  # the first examples' places come first
    if bool((off > 0).any()):
        place = int(off.argmax())
        example, name = places.segment_at(place)
        raise UserError(
            "reference-cache-mismatch",
            f"{path}: holds {table[place]:.4f} for {name} of example {dataset.groups[example].id!r}, "
            f"the model computes {computed[place]:.4f}; delete the file, and it is computed again",
        )


def _of_all_nodes(path: Path, places: SegmentPlaces) -> tuple[Tensor, Tensor]:
    """Returns (table, which examples are done) of the partial files of every machine, each in the folder that it sees;
    collective."""
    table, done = torch.zeros(places.size, dtype=torch.float64), torch.zeros(len(places.counts), dtype=torch.bool)
    partial_files = _partial_files(path) if first_of_node() else []
    parts = [part for part in (_read(partial, places) for partial in partial_files) if part is not None]
    all_parts: list[list[tuple[Tensor, Tensor]] | None] = [None] * dist.get_world_size()
    wait_for_all("reference")
    dist.all_gather_object(all_parts, parts)
    for sums, examples in itertools.chain.from_iterable(parts or [] for parts in all_parts):
        rows = places.of_examples(examples)
        table[rows], done[examples] = sums[rows], True
    return table, done


def _partial_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*{PARTIAL}"))


def _write(path: Path, table: Tensor, done: Tensor) -> str | None:
    """Replaces a file atomically; returns an error message where that fails, else None."""
    tensors = {"log_probs": table.contiguous(), "done": done.contiguous()}
    try:
        with new_file(path, "wb", shared=True) as file:  # several runs share a cache
            # Not `save_file`: its files have mode 0600 for any umask, so other users' runs could not read them.
            file.write(serialize(tensors, metadata={"sha256": _checksum(tensors)}))
    except OSError as error:
        return f"{path} cannot be written ({system_reason(error)})"
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("log_probs", "done"))).hexdigest()


def _read(path: Path, places: SegmentPlaces) -> tuple[Tensor, Tensor] | None:
    """Returns a file's table and which of its examples are done, or None where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("log_probs", "done")}
            intact = (file.metadata() or {}).get("sha256") == _checksum(tensors)
    except (SafetensorError, OSError):
        return None
    table, done = tensors["log_probs"], tensors["done"]
    fits = table.shape == (places.size,) and done.shape == places.counts.shape[:1]
    return (table, done) if intact and fits else None
