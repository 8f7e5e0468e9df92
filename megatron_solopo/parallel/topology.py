"""Which part of the model and of the data a process holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_solopo.config import OWNER, Config, ParallelConfig, flag
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class Place:
    """A process's place in each kind of parallelism, counted from 0."""

    tensor: int
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
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world % copy:
        raise UserError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} = {copy} processes a copy of the model, and {world} were "
            f"started; start a multiple of {copy} (torchrun's --nproc_per_node and --nnodes)"
        )
    return world // copy


def place_of(rank: int, parallel: ParallelConfig, world: int) -> Place:
    """Megatron's order: tensor-parallel processes are neighbours, then data-parallel ones, then pipeline stages."""
    tensor, data = parallel.tensor_model_parallel_size, data_parallel_size(parallel, world)
    return Place(rank % tensor, rank // tensor % data, rank // (tensor * data))


def expert_place(rank: int, parallel: ParallelConfig) -> int:
    """Which part of the experts a process holds: expert-tensor-parallel processes are neighbours, then these."""
    tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    return rank // tensor % parallel.expert_model_parallel_size


def check_layout(hf_config: PretrainedConfig, config: Config, padded_vocab_size: int, world: int) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
        UserError: naming the option and the model's number that it does not divide.
    """
    parallel = config.parallel
    data_parallel_size(parallel, world)
    experts = getattr(hf_config, "num_experts", None)
    counts = {
        "tensor_model_parallel_size": {
            "num_attention_heads": hf_config.num_attention_heads,
            "num_key_value_heads": hf_config.num_key_value_heads,
            **({} if experts else {"intermediate_size": hf_config.intermediate_size}),
            "padded vocabulary (--make-vocab-size-divisible-by)": padded_vocab_size,
        },
        "pipeline_model_parallel_size": {"num_hidden_layers": hf_config.num_hidden_layers},
    }
    for option, numbers in counts.items():
        size = getattr(parallel, option)
        for name, number in numbers.items():
            if number % size:
                raise UserError(
                    f"--{option.replace('_', '-')} {size}: does not divide the model's {name} {number}; "
                    "choose a number that does"
                )
    if config.model.random_init and parallel.pipeline_model_parallel_size > 1:
        raise UserError(
            "--random-init with --pipeline-model-parallel-size above 1: random weights would depend on the number of "
            "stages; start from a folder with weights"
        )
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
    if config.model.random_init and parallel.expert_model_parallel_size > 1:
        raise UserError(
            "--random-init with --expert-model-parallel-size above 1: every process would draw the same experts; "
            "start from a folder with weights"
        )


def _check_divides(option: str, size: int, numbers: dict[str, int], note: str = "") -> None:
    valid = [n for n in range(1, max(numbers.values()) + 1) if all(number % n == 0 for number in numbers.values())]
    for name, number in numbers.items():
        if number % size != 0:
            nearest = min(valid, key=lambda n: abs(n - size))
            raise UserError(
                f"{flag(option)} {size}{note}: does not divide the {name}, {number}; the nearest that fits is {nearest}"
            )
