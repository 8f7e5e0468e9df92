"""What the log says at the start of a run: its size, parts and kernels, and warnings about its data and options."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.conversion.hf import describe_carried
from megatron_solopo.data.tokenized.batches import above_the_token_limit
from megatron_solopo.lora_options import adapts_experts
from megatron_solopo.model import transformer_engine
from megatron_solopo.model.attention import describe_kernels
from megatron_solopo.model.experts import ALIGNED, describe_experts
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.monitoring import length_bias, no_transfer
from megatron_solopo.training.parameters import describe_parameters
from megatron_solopo.training.preflight import Preflight


def start_lines(plan: Preflight, config: Config, engine: Engine, hosts: str) -> Iterator[str]:
    """Yields the lines; on ranks other than 0, whose log is not written, those that cost nothing.

    Args:
        hosts: the machines of the run with their ranks.
    """
    schedule, data = plan.inputs.schedule, plan.inputs.data
    train, rest = data.train, schedule.total % schedule.global_batch_size
    yield (
        f"{len(train.groups)} examples, {schedule.steps} steps of {schedule.global_batch_size}"
        + (f", last step {rest}" if rest else "")
        + "; values of a step are means over its examples"
    )
    if dist.get_world_size() > 1:
        yield f"{dist.get_world_size()} processes: {hosts}"
    if dist.get_rank() == 0:
        hf_config, model = plan.inputs.hf_config, config.model
        yield describe_parameters(hf_config, model)
        if carried := describe_carried(model.hf_path, hf_config):
            yield carried
    if plan.budget:
        yield plan.budget
    if engine.platform.name == "cuda":
        settings, device = engine.models[0].config, engine.platform.device
        yield describe_kernels(settings, device)
        yield f"log-probs: {engine.head.chunk_size:,} response tokens at a time"
        if settings.num_moe_experts and settings.transformer_impl != transformer_engine.NAME:
            rank = config.model.lora_rank if adapts_experts(config.model) else None
            yield describe_experts(settings, device, rank or ALIGNED)
    if train.stretch is not None:
        yield f"positions: {train.stretch}"
    for split, dataset in (("train", train), ("valid", data.valid)):
        if dataset is None:
            continue
        for line in dataset.report.lines(config.data.seq_length):
            yield f"{split}: {line}"
        if above := above_the_token_limit(dataset.groups, config, engine.platform.name):
            yield f"warning: {split}: {above}"
    if bias := length_bias(train.chosen_rejected_lengths()):
        yield f"warning: {bias}"
    first = config.output.profile_step_start
    if config.output.profile and plan.resumed > first:
        yield f"note: --profile: step {first + 1} is done already, so no step of this run is profiled"
    if note := no_transfer(config.method):
        yield f"note: {note}"
