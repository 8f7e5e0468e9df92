"""Reference log-probs: computed once through the training path, kept on disk, the same for every epoch and restart.

A cache file has one number for each scored segment (segment_table.py) and is keyed by all that its numbers depend on:
weights, token ids (and with them data, tokenizer and template), what is scored, and precision. Anything else finds
another file, never a wrong one. What is read is checked against its own checksum and against a few examples computed
anew.

The first process reads the cache file and sends what it has to the others, whose disks need not have it.

Filling it is shared by all processes: each computes its share of the examples and keeps what it has in a partial file
of its own, on the disk that it sees, so that a killed run computes no example twice. Nobody waits in a collective until
everybody is done: a slow process delays the others and never times them out. Only where experts are spread must
processes compute in step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from megatron_solopo.atomic import new_file
from megatron_solopo.config import Config
from megatron_solopo.conversion.start import weights_fingerprint
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.losses.solopo import reference_scores
from megatron_solopo.parallel.platform import choose, first_of_node, wait_for_all
from megatron_solopo.progress import ProgressBar, reporting
from megatron_solopo.training.engine import Engine, data_parallel
from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
from megatron_solopo.training.step import make_packs, over_the_layout, own_segment_table

FORMAT = "3"
"""Raised when the meaning of a cache file changes."""

PARTIAL = ".partial.safetensors"
SECONDS_BETWEEN_SAVES = 30.0


def starting_weights(config: Config) -> str:
    """A text that changes with the weights the run starts from, which are the reference; reads all of them."""
    if config.model.random_init:
        drawn = "drawn by name" + (" on CUDA" if choose(config.parallel.device) == "cuda" else "")
        return f"{drawn}, seed {config.training.seed}, config {_config_digest(config)}"
    with reporting("reading the weights"):
        return weights_fingerprint(config.model.hf_path)


def _config_digest(config: Config) -> str:
    return hashlib.sha256((Path(config.model.hf_path) / "config.json").read_bytes()).hexdigest()


def cache_key(config: Config, dataset: TokenDataset, weights: str) -> str:
    """16 hex digits over everything the log-probs depend on; ``weights`` are `starting_weights`."""
    facts = {
        "format": FORMAT,
        "weights": weights,
        "config": _config_digest(config),
        "tokens": dataset.fingerprint,
        "scored": sorted(reference_scores(config.method)),
        "dtype": "bfloat16" if config.model.bf16 else "float32",
    }
    if config.model.rope_scaling is not None:
        facts["rope_scaling"] = config.model.rope_scaling
    if config.model.add_special_tokens is not None:
        facts["add_special_tokens"] = config.model.add_special_tokens
    if config.model.transformer_impl != "portable":
        model = config.model
        facts["kernels"] = [model.transformer_impl, model.fp8_format, model.fp8_format and model.fp8_recipe]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: Config) -> Path:
    """Where cache files lie: --reference-cache, or ``reference/`` beside the run folder."""
    return Path(config.method.reference_cache or Path(config.output.save).parent / "reference")


def reference_log_probs(
    engine: Engine,
    dataset: TokenDataset,
    config: Config,
    weights: str,
    say: Callable[[str], None] = lambda text: None,
    heard: Callable[[], bool] = lambda: False,
) -> ReferenceLogProbs | None:
    """The log-probs of a data set, from the cache or computed with the model as it is now.

    Must run before training changes the weights: until then `Engine.eval` communicates with nobody. Collective.

    Args:
        dataset: the examples with what `reference_scores` names.
        weights: see `starting_weights`.
        say: told in a line what is done.
        heard: whether any process should stop, asked between batches; see `StopRequests.heard`.

    Returns:
        None if stopped; what was computed is kept.

    Raises:
        UserError: the cache file does not hold what the model computes.
    """
    places, examples = SegmentPlaces.of_dataset(dataset), len(dataset.groups)
    path = cache_folder(config) / shared(lambda: f"{cache_key(config, dataset, weights)}.safetensors")
    complete = shared(lambda: _read(path, places))
    table, done = complete if complete is not None and complete[1].all() else _of_all_nodes(path, places)
    if not done.all():
        say(
            f"reference log-probs of {examples} examples"
            + (f", {int(done.sum())} of them computed before" if done.any() else "")
        )
        table = _fill(engine, dataset, config, places, path, table, done, heard)
        if table is None:
            return None
        if problem := shared(lambda: _write(path, table, torch.ones(examples, dtype=torch.bool))):
            say(f"warning: {problem}; the run goes on, the next one computes them again")
        elif first_of_node():
            for partial in _partial_files(path):
                partial.unlink(missing_ok=True)  # another run may fill the same file
    elif examples:
        _check(engine, dataset, config, places, path, table)
    wait_for_all("reference")
    return ReferenceLogProbs(places, table)


def shared(make: Callable[[], Any], name: str = "reference") -> Any:
    """What the first process makes (it alone reads files), on every process; the others wait without a time limit.
    Collective, where there are processes.

    Args:
        name: see `wait_for_all`.
    """
    if not dist.is_initialized():
        return make()
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except UserError as error:
            made = [error]
    wait_for_all(name)
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]


def _fill(
    engine: Engine,
    dataset: TokenDataset,
    config: Config,
    places: SegmentPlaces,
    path: Path,
    table: Tensor,
    done: Tensor,
    heard: Callable[[], bool],
) -> Tensor | None:
    """The whole table: what was done before, and this and the other processes' shares of the rest; None if stopped."""
    rank, _ = data_parallel()
    own_file = path.with_name(f"{path.stem}.{rank}{PARTIAL}")
    # The last stage has the numbers; of the processes that share its layers and sequences one writes.
    writes = parallel_state.is_pipeline_last_stage() and not (
        parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
    )
    todo = (~done).nonzero()[:, 0].tolist()
    own, own_done = torch.zeros_like(table), torch.zeros_like(done)
    saved = time.monotonic()
    engine.eval()
    batch = config.training.global_batch_size
    stopped = torch.zeros((), device=engine.platform.device)
    sharing = [parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()]
    if engine.models[0].config.num_moe_experts and parallel_state.get_expert_tensor_and_model_parallel_world_size() > 1:
        sharing = [None]  # tokens travel to the experts of other processes, whose examples are others
    known = len(done) - len(todo)
    with ProgressBar(desc="reference log-probs", total=len(done), initial=known, unit="example", leave=False) as bar:
        for first in range(0, len(todo), batch):
            # Processes that share a model compute together; the others are not waited for.
            stopped.fill_(heard())
            for group in sharing:
                dist.all_reduce(stopped, op=dist.ReduceOp.MAX, group=group)
            if stopped:
                break
            indices = todo[first : first + batch]
            packs = make_packs(engine, dataset, indices, config)
            at, sums = own_segment_table(engine, places, packs)
            own[at] = sums
            own_done[[index for pack in packs for index in pack.groups]] = True
            bar.update(len(indices))
            if writes and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                # Beside what was done before: another run may have had another number of processes.
                _write(own_file, table + own, done | own_done)
                saved = time.monotonic()
        wait_for_all("reference")
    dist.all_reduce(stopped, op=dist.ReduceOp.MAX)
    if stopped:
        if writes and own_done.any():
            _write(own_file, table + own, done | own_done)
        return None
    return table + over_the_layout(own.to(engine.platform.device)).cpu()


def _check(
    engine: Engine, dataset: TokenDataset, config: Config, places: SegmentPlaces, path: Path, table: Tensor
) -> None:
    """Computes a few examples anew: a cache that another model or code wrote must not become a wrong loss."""
    _, size = data_parallel()
    indices = list(range(min(size, len(dataset.groups))))
    engine.eval()
    at, sums = own_segment_table(engine, places, make_packs(engine, dataset, indices, config))
    found = torch.zeros_like(table)
    found[at] = sums
    wait_for_all("reference")
    found = over_the_layout(found.to(engine.platform.device)).cpu()
    # Rounding of another layout or number of processes; bfloat16 keeps 8 bits of each of a response's log-probs.
    tolerance = 0.05 if config.model.bf16 else 1e-3
    off = (found - table).abs() - tolerance * (1 + table.abs())
    off = off[: int(places.counts[: len(indices)].sum())]  # the first examples' places come first
    if bool((off > 0).any()):
        place = int(off.argmax())
        example, name = places.segment_at(place)
        raise UserError(
            f"{path}: holds {table[place]:.4f} for {name} of example {dataset.groups[example].id!r}, "
            f"the model computes {found[place]:.4f}; delete the file, and it is computed again"
        )


def _of_all_nodes(path: Path, places: SegmentPlaces) -> tuple[Tensor, Tensor]:
    """(table, which examples are done) of the partial files of every machine, each in the folder that it sees;
    collective."""
    table, done = torch.zeros(places.size, dtype=torch.float64), torch.zeros(len(places.counts), dtype=torch.bool)
    partial_files = _partial_files(path) if first_of_node() else []
    own = [part for part in (_read(partial, places) for partial in partial_files) if part is not None]
    everyone: list[Any] = [None] * dist.get_world_size()
    wait_for_all("reference")
    dist.all_gather_object(everyone, own)
    for part in itertools.chain.from_iterable(everyone):
        known = places.of_examples(part[1])
        table[known], done[part[1]] = part[0][known], True
    return table, done


def _partial_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*{PARTIAL}"))


def _write(path: Path, table: Tensor, done: Tensor) -> str | None:
    """Writes a file in one piece or leaves the old one; returns what went wrong."""
    tensors = {"log_probs": table.contiguous(), "done": done.contiguous()}
    try:
        with new_file(path, "wb", shared=True) as file:  # several runs share a cache
            # Not `save_file`: its files have mode 0600 whatever the umask, and a colleague's run could not read them.
            file.write(serialize(tensors, metadata={"sha256": _checksum(tensors)}))
    except OSError as error:
        return f"{path} cannot be written ({system_reason(error)})"
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("log_probs", "done"))).hexdigest()


def _read(path: Path, places: SegmentPlaces) -> tuple[Tensor, Tensor] | None:
    """A file's table and which of its examples are done, or None: a damaged file is computed again."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("log_probs", "done")}
            whole = (file.metadata() or {}).get("sha256") == _checksum(tensors)
    except (SafetensorError, OSError):
        return None
    table, done = tensors["log_probs"], tensors["done"]
    return (table, done) if whole and table.shape == (places.size,) and done.shape == places.counts.shape[:1] else None
