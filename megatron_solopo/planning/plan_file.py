"""The YAML file of a planned run, with a comment on each line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_solopo.atomic import write_text
from megatron_solopo.config import OWNER, SECTIONS, Config, names_of

PLANNED = (
    *("hf_path", "bf16", "train_data", "seq_length", "global_batch_size", "micro_batch_size", "train_epochs", "save"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "recompute_keep"),
    *("mlp_tiles", "activation_offload", "use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype"),
    "optimizer_cpu_offload",
    *("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size"),
    *("num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
)
"""Options that a plan sets; those at their defaults are left out unless they are in `ALWAYS`."""

ALWAYS = ("hf_path", "bf16", "train_data", "save", "seq_length", "global_batch_size", "micro_batch_size")


def write_plan(path: Path, config: Config, command: Sequence[str], facts: Sequence[str]) -> None:
    """Writes a file that ``solopo train --config`` reads.

    Args:
        command: of the plan, its words.
        facts: lines about the layout, in front as comments.
    """
    lines = [f"# {line}" for line in (f"Made by: {shlex.join(command)}", *facts)]
    for section in SECTIONS:
        entries = [_line(name, config) for name in names_of(section) if _is_written(name, config)]
        if entries:
            lines += ["", f"{section}:", *entries]
    write_text(path, "\n".join(lines) + "\n")


def _is_written(name: str, config: Config) -> bool:
    if name in config.explicit or name in ALWAYS:
        return config.value(name) is not None
    return name in PLANNED and config.value(name) != OWNER[name].spec.default


def _line(name: str, config: Config) -> str:
    spec = OWNER[name].spec
    value = yaml.safe_dump(config.value(name), default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"  {name}: {value}  # {spec.metadata['help'].split(';')[0]}"
