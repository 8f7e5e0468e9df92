"""Which part of the model and of the data a rank holds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from megatron_solopo.config import OWNER, Config, ParallelConfig, flag
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class Place:
    """A process's rank in each kind of parallelism."""

    tensor: int
    context: int
    data: int
    pipeline: int


def world_size() -> int:
    """Returns the number of processes of this run as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(parallel: ParallelConfig, world: int) -> int:
    """Returns the number of model replicas.

    Raises:
        UserError: the number of processes is no multiple of those of a replica.
    """
    sizes = {
        name: getattr(parallel, name)
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    }
    replica = math.prod(sizes.values())
    if world % replica:
        options = " x ".join(f"{flag(name)} {size}" for name, size in sizes.items() if size > 1)
        raise UserError(
            "layout-processes",
            f"{options} = {replica} processes for a model replica, and {world} were started; start "
            f"{_nearest_multiples(world, replica)} (torchrun's --nproc_per_node and --nnodes)",
        )
    return world // replica


def _nearest_multiples(number: int, of: int) -> str:
    """Returns "4 or 8" around 6; only the larger one where the smaller is 0."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def place_of(rank: int, parallel: ParallelConfig, world: int) -> Place:
    """Returns a rank's place in Megatron's order: tensor parallelism innermost, then context, data, pipeline."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    data = data_parallel_size(parallel, world)
    rest, tensor_rank = divmod(rank, tensor)
    rest, context_rank = divmod(rest, context)
    pipeline_rank, data_rank = divmod(rest, data)
    return Place(tensor_rank, context_rank, data_rank, pipeline_rank)


def _nearest_divisors(size: int, *numbers: int) -> str:
    """Returns the common divisors of ``numbers`` around ``size``: "2 or 4"."""
    common = math.gcd(*numbers)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    below, above = [d for d in divisors if d < size][-1:], [d for d in divisors if d > size][:1]
    return " or ".join(map(str, below + above))


def stage_sizes(num_layers: int, parallel: ParallelConfig) -> list[int] | None:
    """Returns the layers of each pipeline stage, or None where the layers cannot be distributed so."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    options = {0: parallel.decoder_first_pipeline_num_layers, stages - 1: parallel.decoder_last_pipeline_num_layers}
    fixed = {stage: layers for stage, layers in options.items() if layers is not None}
    if stages == 1:
        return None if fixed or chunks > 1 else [num_layers]
    left, others = num_layers - sum(fixed.values()), stages - len(fixed)
    if left < others or (left % others if others else left):
        return None
    sizes = [fixed[stage] if stage in fixed else left // others for stage in range(stages)]
    return None if any(size % chunks for size in sizes) else sizes


def layers_of_stage(stage: int, num_layers: int, parallel: ParallelConfig) -> list[range]:
    """Returns the layers of each model chunk of a stage, counted from 0: all stages' first chunks come first."""
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    stages = stage_sizes(num_layers, parallel)
    assert stages is not None  # `check_layout` refuses others
    sizes = [size // chunks for size in stages]
    starts = [chunk * sum(sizes) + sum(sizes[:stage]) for chunk in range(chunks)]
    return [range(start, start + sizes[stage]) for start in starts]


def _check_stages(num_layers: int, parallel: ParallelConfig) -> None:
    """Refuses stages that the layers cannot be distributed over.

    Raises:
        UserError: names the first option whose change alone corrects the layout, and its nearest valid value.
    """
    if stage_sizes(num_layers, parallel) is not None:
        return

    def nearest(name: str, base: ParallelConfig) -> int | None:
        """Returns the nearest value of an option with which ``base`` is valid."""
        valid = [size for size in range(1, num_layers + 1) if stage_sizes(num_layers, replace(base, **{name: size}))]
        return min(valid, key=lambda size: abs(size - (getattr(parallel, name) or 0)), default=None)

    stages, chunks = "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"
    even = dict(decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None)
    options = [name for name in even if getattr(parallel, name) is not None]
    if getattr(parallel, chunks) > 1:
        options.append(chunks)
    if not options:
        raise UserError(
            "layout-stages",
            f"{flag(stages)} {getattr(parallel, stages)}: does not divide the model's num_hidden_layers {num_layers}; "
            f"the nearest valid size is {nearest(stages, parallel)} (or set the layers of the first or last stage: "
            f"{', '.join(map(flag, even))})",
        )
    words = ", ".join(f"{flag(name)} {getattr(parallel, name)}" for name in (stages, *options))
    for name in (*options, stages):
        size = nearest(name, parallel)
        if size is not None:
            raise UserError(
                "layout-stages",
                f"{flag(name)} {getattr(parallel, name)}: the model's num_hidden_layers {num_layers} cannot be "
                f"distributed so ({words}); the nearest valid size is {size}",
            )
    size = nearest(stages, replace(parallel, **even, **{chunks: 1}))
    raise UserError(
        "layout-stages",
        f"{flag(stages)} {getattr(parallel, stages)}: the model's num_hidden_layers {num_layers} cannot be "
        f"distributed so ({words}); the nearest valid size is {size}, without {' and '.join(map(flag, options))}",
    )


def expert_place(rank: int, parallel: ParallelConfig) -> int:
    """Returns which part of the experts a rank holds: expert-tensor-parallel ranks are adjacent, then these."""
    tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    return rank // tensor % parallel.expert_model_parallel_size


EXPERT_COUNTS = ("num_local_experts", "num_experts")
"""Names that transformers has for families' fields of the number of experts."""


def expert_count(hf_config: PretrainedConfig) -> int:
    """Returns the number of experts of a layer, 0 without."""
    return next((count for name in EXPERT_COUNTS if (count := getattr(hf_config, name, None))), 0)


def first_dense_layers(hf_config: PretrainedConfig) -> int:
    """Returns the number of first layers without experts in a model with some."""
    kinds = getattr(hf_config, "mlp_layer_types", None)
    return getattr(hf_config, "first_k_dense_replace", 0) if kinds is None else kinds.count("dense")


def check_layout(hf_config: PretrainedConfig, config: Config, padded_vocab_size: int, world: int) -> None:
    """Refuses a layout that this model cannot be sharded by.

    Raises:
        UserError: names the option and the model's number that does not fit.
    """
    parallel = config.parallel
    data_parallel_size(parallel, world)
    _check_stages(hf_config.num_hidden_layers, parallel)
    experts = expert_count(hf_config)
    has_mlp = not experts or first_dense_layers(hf_config)
    shared = getattr(hf_config, "shared_expert_intermediate_size", 0)
    if count := getattr(hf_config, "n_shared_experts", None):
        shared = count * hf_config.moe_intermediate_size
    layers = hf_config.per_layer_config if getattr(hf_config, "is_heterogeneous", False) else [hf_config]
    matrices = {
        "model's num_attention_heads": hf_config.num_attention_heads,
        "model's num_key_value_heads": math.gcd(*(layer.num_key_value_heads for layer in layers)),
        **({"model's intermediate_size": hf_config.intermediate_size} if has_mlp else {}),
        **({"shared experts' intermediate size": shared} if shared else {}),
        "padded vocabulary (--make-vocab-size-divisible-by)": padded_vocab_size,
    }
    _check_divides("tensor_model_parallel_size", parallel.tensor_model_parallel_size, matrices)
    if keys := getattr(hf_config, "linear_num_key_heads", None):
        tensor = parallel.tensor_model_parallel_size
        _check_divides("tensor_model_parallel_size", tensor, {"model's linear_num_key_heads": keys})
        heads = {"model's linear_num_key_heads on a tensor-parallel rank": keys // tensor}
        _check_divides("context_parallel_size", parallel.context_parallel_size, heads)
    if experts:
        _check_experts(hf_config, config, world, experts)
    else:
        _check_dense(hf_config, config)


OF_EXPERTS = (
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_token_dispatcher_type",
    "moe_permute_fusion",
    "moe_aux_loss_coeff",
)
"""Options that a model without experts does not read."""


def _check_dense(hf_config: PretrainedConfig, config: Config) -> None:
    for name in OF_EXPERTS:
        value, default = config.value(name), OWNER[name][1].default
        if value != default:
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise UserError("model-without-experts", f"{shown}: {hf_config.model_type} has no experts; leave it out")


def _check_experts(hf_config: PretrainedConfig, config: Config, world: int, experts: int) -> None:
    """Each stage's ranks have a second layout for experts: replicas x expert parallel x expert tensor parallel."""
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "option-conflict",
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}: a model with experts also needs "
            "--sequence-parallel (otherwise each rank would route every token)",
        )
    stage = world // parallel.pipeline_model_parallel_size
    width = getattr(hf_config, "moe_intermediate_size", None) or hf_config.intermediate_size
    tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    note = "" if parallel.expert_tensor_parallel_size else " (that of --tensor-model-parallel-size)"
    processes = "processes of a pipeline stage"
    _check_divides("expert_tensor_parallel_size", tensor, {"expert's intermediate size": width, processes: stage}, note)
    numbers = {"number of experts": experts, f"{processes} / expert tensor parallel": stage // tensor}
    _check_divides("expert_model_parallel_size", parallel.expert_model_parallel_size, numbers)
    _check_dispatcher(parallel, tensor * parallel.expert_model_parallel_size)


def _check_dispatcher(parallel: ParallelConfig, exchanging: int) -> None:
    """Refuses a dispatcher of tokens that a layout does not support.

    Args:
        exchanging: ranks that share the experts of a layer, which exchange tokens.
    """
    kind = f"--moe-token-dispatcher-type {parallel.moe_token_dispatcher_type}"
    if parallel.moe_token_dispatcher_type == "flex" and exchanging == 1:
        raise UserError(
            "option-unused",
            f"{kind} needs --expert-model-parallel-size or --expert-tensor-parallel-size above 1: a process with all "
            "experts exchanges no tokens; use alltoall",
        )
    if parallel.moe_token_dispatcher_type != "allgather":
        return
    if parallel.pipeline_model_parallel_size > 1:
        raise UserError(
            "option-conflict",
            f"{kind} with --pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}: packs differ in "
            "length, which megatron-core's stages support with alltoall and flex alone; use alltoall",
        )
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if sharing % exchanging:
        raise UserError(
            "option-conflict",
            f"{kind}: it gathers as many tokens from each of the {exchanging} processes that share experts, and packs "
            f"differ in length between data-parallel processes ({sharing} share a pack: tensor x context parallel "
            "size); use alltoall",
        )


def _check_divides(option: str, size: int, numbers: dict[str, int], note: str = "") -> None:
    for name, number in numbers.items():
        if number % size:
            raise UserError(
                "layout-not-divisible",
                f"{flag(option)} {size}{note}: does not divide the {name} {number}; nearest that do: "
                + _nearest_divisors(size, *numbers.values()),
            )
