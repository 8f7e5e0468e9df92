"""`solopo convert-checkpoint hf-to-megatron --dry-run`: what a conversion and the way back read, write and hold, by
config.json alone.

The parameters of a process are those of its rehearsed model; what is held of them follows from conversion/hf.py and
conversion/megatron_folder.py, where one parameter at a time is in memory.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_solopo.config import MAX_SHARD_SIZE, Config
from megatron_solopo.conversion.hf_weights import stored_shapes
from megatron_solopo.conversion.sidecar_files import dtype_name
from megatron_solopo.model.families.operators import Operator, Rename, StackGateUp, Transpose
from megatron_solopo.planning import fake
from megatron_solopo.training.preflight import check_cut

IMPORTS = 0.46
"""GiB of anonymous memory of a process that converts a model of no size (x86-64, 2026-11-30)."""


@dataclass(frozen=True)
class Held:
    """What a process has of the model, in bytes.

    Attributes:
        all: its parameters.
        to_megatron: (bytes, name) of the most that it holds at once on the way to Megatron.
        to_hf: the same on the way back, on a process that writes, which joins the shards of a parameter.
    """

    all: int
    to_megatron: tuple[int, str]
    to_hf: tuple[int, str]


def describe(target: Path, config: Config, hf_config: PretrainedConfig, dtype_option: str | None) -> str:
    """Returns the plan of a conversion, in lines.

    Args:
        dtype_option: --dtype; None: that of config.json.

    Raises:
        UserError: the model cannot be cut so.
    """
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    of_stage = math.lcm(tensor, parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or tensor))
    check_cut(hf_config, config, stages * of_stage)
    dtype = getattr(torch, dtype_option) if dtype_option else hf_config.dtype or torch.float32
    held = [_held(config, hf_config, dtype, stage * of_stage, stages * of_stage) for stage in sorted({0, stages - 1})]
    shapes = stored_shapes(hf_config)
    if hf_config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    folder = next(folder for folder in (target, *target.resolve().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    (most, name), (back, name_back) = max(each.to_megatron for each in held), max(each.to_hf for each in held)
    lines = (
        f"{config.model.hf_path}: {len(shapes):,} tensors, {_gb(size)} in {dtype_name(dtype)}, by config.json; no "
        "weights were read",
        f"hf-to-megatron reads and writes {_gb(size)}; {_gb(free)} are free at {folder}",
        f"  {stages * of_stage} processes of up to {_gb(max(each.all for each in held))}, each with one parameter at a "
        f"time in memory: at most {_gb(most)} ({name})",
        f"megatron-to-hf reads and writes the same, in files of {MAX_SHARD_SIZE}",
        f"  process 0 writes, and joins the parts of a parameter: at most {_gb(back)} ({name_back})",
        "  without layout options, which it does not need, each process writes some of the files, in as much memory",
        f"beside that a process takes about {IMPORTS} GiB for its imports; pages of mapped files are the file cache's",
    )
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _held(config: Config, hf_config: PretrainedConfig, dtype: torch.dtype, rank: int, world: int) -> Held:
    with fake.rehearsal("cpu", rank, world) as rehearsal:
        # behind the start of the platform, as in training/run.py
        from megatron_solopo.conversion.hf import named_entries, split_size
        from megatron_solopo.training import engine as engines

        engines.initialize_parallel(config)
        with rehearsal.mode:
            models = engines.build_chunks(hf_config, config, dtype)
        own, joined = [], []
        for model in models:
            for entry, _, parameter in named_entries(model, hf_config):
                size = parameter.numel() * parameter.itemsize
                full = size * split_size(entry, parameter)
                own.append((size, entry.megatron))
                joined.append((full * (1 if _yields_views(entry.operator) else 2), entry.megatron))
        return Held(sum(size for size, _ in own), max(own), max(joined))


def _yields_views(operator: Operator) -> bool:
    """Whether the tensors of a parameter are written from where it is."""
    return isinstance(operator, Rename | StackGateUp) and not isinstance(operator, Transpose)
