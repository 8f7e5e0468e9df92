"""Reference log-probs: computed once through the training path, kept on disk, the same for every epoch and restart.

A cache file is keyed by all that its numbers depend on: weights, token ids (and with them data, tokenizer and
template), roles and precision. Anything else finds another file, never a wrong one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_solopo.config import Config
from megatron_solopo.conversion.safetensors_folder import TensorReader, state_fingerprint
from megatron_solopo.data.tokens import TokenDataset
from megatron_solopo.losses.solopo import reference_roles
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.step import make_packs, segment_table

FORMAT = "1"
"""Raised when the meaning of a cache file changes."""


def cache_key(config: Config, dataset: TokenDataset) -> str:
    """16 hex digits over everything the log-probs depend on."""
    facts = {
        "format": FORMAT,
        "weights": f"random seed {config.training.seed}"
        if config.model.random_init
        else state_fingerprint(TensorReader(config.model.hf_path)),
        "config": hashlib.sha256((Path(config.model.hf_path) / "config.json").read_bytes()).hexdigest(),
        "tokens": dataset.fingerprint,
        "roles": reference_roles(config.method),
        "dtype": "bfloat16" if config.model.bf16 else "float32",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: Config) -> Path:
    """Where cache files lie: --reference-cache, or ``reference/`` beside the run folder."""
    return Path(config.method.reference_cache or Path(config.output.save).parent / "reference")


def reference_log_probs(
    engine: Engine, dataset: TokenDataset, config: Config, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """[examples, reference roles] float64 log-probs, from the cache or computed with the model as it is now.

    Must run before training changes the weights. The first process reads and writes; all get the table.

    Args:
        dataset: the examples with the roles of `reference_roles`.
        progress: called with (examples done, examples in all).
    """
    names = reference_roles(config.method)
    path: Path | None = None
    table = torch.zeros(len(dataset.groups), len(names), dtype=torch.float64, device=engine.platform.device)
    found = torch.zeros(1, device=engine.platform.device)
    if dist.get_rank() == 0:
        path = cache_folder(config) / f"{cache_key(config, dataset)}.safetensors"
        cached = _read(path, tuple(table.shape))
        if cached is not None:
            table.copy_(cached)
            found.fill_(1)
    dist.broadcast(found, src=0)
    if found.item():
        dist.broadcast(table, src=0)
        return table.cpu()
    engine.model.eval()
    batch = config.training.global_batch_size
    for first in range(0, len(dataset.groups), batch):
        indices = range(first, min(first + batch, len(dataset.groups)))
        packs = make_packs(
            dataset,
            indices,
            config.training,
            config.data.share_prompts,
            engine.hf_config.hidden_size,
            engine.platform.device,
        )
        table[first : first + batch] = segment_table(engine, dataset, names, indices, packs)
        if progress is not None:
            progress(indices[-1] + 1, len(dataset.groups))
    engine.model.train()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        save_file({"log_probs": table.cpu()}, aside, metadata={"roles": " ".join(names), "tokens": dataset.fingerprint})
        aside.replace(path)
    return table.cpu()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """A complete cache file's table, or None: a damaged file is computed again."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            table = file.get_tensor("log_probs")
    except (SafetensorError, OSError):
        return None
    return table if tuple(table.shape) == shape and bool(torch.isfinite(table).all()) else None
