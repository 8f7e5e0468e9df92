"""Which part of the model and of the data a process holds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from megatron_solopo.config import OWNER, Config, ParallelConfig, flag
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class Place:
    """A process's place in each kind of parallelism, counted from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


def world_size() -> int:
    """Processes of this run, as torchrun tells; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(parallel: ParallelConfig, world: int) -> int:
    """Copies of the model.

    Raises:
        UserError: the processes do not divide into whole copies.
    """
    sizes = {
        name: getattr(parallel, name)
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    }
    copy = math.prod(sizes.values())
    if world % copy:
        cuts = " x ".join(f"{flag(name)} {size}" for name, size in sizes.items() if size > 1)
        raise UserError(
            f"{cuts} = {copy} processes a copy of the model, and {world} were started; start "
            f"{_nearest_multiples(world, copy)} (torchrun's --nproc_per_node and --nnodes)"
        )
    return world // copy


def _nearest_multiples(number: int, of: int) -> str:
    """ "4 or 8" around 6; only the larger one where the smaller is none."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def place_of(rank: int, parallel: ParallelConfig, world: int) -> Place:
    """Megatron's order: tensor-parallel processes are neighbours, then context, data, and last pipeline stages."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    data = data_parallel_size(parallel, world)
    rest, own_tensor = divmod(rank, tensor)
    rest, own_context = divmod(rest, context)
    own_pipeline, own_data = divmod(rest, data)
    return Place(own_tensor, own_context, own_data, own_pipeline)


def _nearest_divisors(size: int, *numbers: int) -> str:
    """The common divisors of ``numbers`` around ``size``: "2 or 4"."""
    common = math.gcd(*numbers)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    below, above = [d for d in divisors if d < size][-1:], [d for d in divisors if d > size][:1]
    return " or ".join(map(str, below + above))


def stage_sizes(num_layers: int, parallel: ParallelConfig) -> list[int] | None:
    """Layers of each pipeline stage; None where they cannot be spread so."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    asked = {0: parallel.decoder_first_pipeline_num_layers, stages - 1: parallel.decoder_last_pipeline_num_layers}
    given = {stage: layers for stage, layers in asked.items() if layers is not None}
    if stages == 1:
        return None if given or chunks > 1 else [num_layers]
    left, others = num_layers - sum(given.values()), stages - len(given)
    if left < others or (left % others if others else left):
        return None
    sizes = [given[stage] if stage in given else left // others for stage in range(stages)]
    return None if any(size % chunks for size in sizes) else sizes


def layers_of_stage(stage: int, num_layers: int, parallel: ParallelConfig) -> list[range]:
    """Layers, counted from 0, of each model chunk of a stage: every stage holds one chunk before any holds the next."""
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    stages = stage_sizes(num_layers, parallel)
    assert stages is not None  # `check_layout` refuses others
    sizes = [size // chunks for size in stages]
    starts = [chunk * sum(sizes) + sum(sizes[:stage]) for chunk in range(chunks)]
    return [range(start, start + sizes[stage]) for start in starts]


def _check_stages(num_layers: int, parallel: ParallelConfig) -> None:
    """Refuses stages that the layers cannot be spread over.

    Raises:
        UserError: naming the first option that a change of its own puts right, and its nearest valid value.
    """
    if stage_sizes(num_layers, parallel) is not None:
        return

    def nearest(name: str, base: ParallelConfig) -> int | None:
        """The value of an option with which ``base`` is valid."""
        valid = [size for size in range(1, num_layers + 1) if stage_sizes(num_layers, replace(base, **{name: size}))]
        return min(valid, key=lambda size: abs(size - (getattr(parallel, name) or 0)), default=None)

    stages, chunks = "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"
    even = dict(decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None)
    options = [name for name in even if getattr(parallel, name) is not None]
    if getattr(parallel, chunks) > 1:
        options.append(chunks)
    if not options:
        raise UserError(
            f"{flag(stages)} {getattr(parallel, stages)}: does not divide the model's num_hidden_layers {num_layers}; "
            f"the nearest valid size is {nearest(stages, parallel)} (or give the first or last stage a number of its "
            f"own: {', '.join(map(flag, even))})"
        )
    words = ", ".join(f"{flag(name)} {getattr(parallel, name)}" for name in (stages, *options))
    for name in (*options, stages):
        size = nearest(name, parallel)
        if size is not None:
            raise UserError(
                f"{flag(name)} {getattr(parallel, name)}: the model's num_hidden_layers {num_layers} cannot be spread "
                f"so ({words}); the nearest valid size is {size}"
            )
    size = nearest(stages, replace(parallel, **even, **{chunks: 1}))
    raise UserError(
        f"{flag(stages)} {getattr(parallel, stages)}: the model's num_hidden_layers {num_layers} cannot be spread so "
        f"({words}); the nearest valid size is {size}, without {' and '.join(map(flag, options))}"
    )


def expert_place(rank: int, parallel: ParallelConfig) -> int:
    """Which part of the experts a process holds: expert-tensor-parallel processes are neighbours, then these."""
    tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    return rank // tensor % parallel.expert_model_parallel_size


def check_layout(hf_config: PretrainedConfig, config: Config, padded_vocab_size: int, world: int) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
        UserError: naming the option and the model's number that does not fit.
    """
    parallel = config.parallel
    data_parallel_size(parallel, world)
    _check_stages(hf_config.num_hidden_layers, parallel)
    experts = getattr(hf_config, "num_experts", None)
    matrices = {
        "model's num_attention_heads": hf_config.num_attention_heads,
        "model's num_key_value_heads": hf_config.num_key_value_heads,
        **({} if experts else {"model's intermediate_size": hf_config.intermediate_size}),
        "padded vocabulary (--make-vocab-size-divisible-by)": padded_vocab_size,
    }
    _check_divides("tensor_model_parallel_size", parallel.tensor_model_parallel_size, matrices)
    if experts:
        _check_experts(hf_config, config, world)
    else:
        _check_dense(hf_config, config)


def _check_dense(hf_config: PretrainedConfig, config: Config) -> None:
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size", "moe_aux_loss_coeff"):
        section = config.training if name == "moe_aux_loss_coeff" else config.parallel
        value, default = getattr(section, name), OWNER[name][1].default
        if value != default:
            raise UserError(f"{flag(name)} {value}: {hf_config.model_type} has no experts; leave it out")


def _check_experts(hf_config: PretrainedConfig, config: Config, world: int) -> None:
    """Each stage's processes are laid out twice: for experts as copies x expert parallel x expert tensor parallel."""
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}: a model with experts needs "
            "--sequence-parallel beside it (else each process would route every token again)"
        )
    stage = world // parallel.pipeline_model_parallel_size
    width = getattr(hf_config, "moe_intermediate_size", None) or hf_config.intermediate_size
    tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    note = "" if parallel.expert_tensor_parallel_size else " (that of --tensor-model-parallel-size)"
    processes = "processes of a pipeline stage"
    _check_divides("expert_tensor_parallel_size", tensor, {"expert's intermediate size": width, processes: stage}, note)
    spread = {"number of experts": hf_config.num_experts, f"{processes} / expert tensor parallel": stage // tensor}
    _check_divides("expert_model_parallel_size", parallel.expert_model_parallel_size, spread)


def _check_divides(option: str, size: int, numbers: dict[str, int], note: str = "") -> None:
    for name, number in numbers.items():
        if number % size:
            raise UserError(
                f"{flag(option)} {size}{note}: does not divide the {name} {number}; nearest that do: "
                + _nearest_divisors(size, *numbers.values())
            )
