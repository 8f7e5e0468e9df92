"""Which part of the model and of the data a process holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_solopo.config import Config, ParallelConfig
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


def check_layout(hf_config: PretrainedConfig, config: Config, padded_vocab_size: int, world: int) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
        UserError: naming the option and the model's number that it does not divide.
    """
    parallel = config.parallel
    data_parallel_size(parallel, world)
    counts = {
        "tensor_model_parallel_size": {
            "num_attention_heads": hf_config.num_attention_heads,
            "num_key_value_heads": hf_config.num_key_value_heads,
            "intermediate_size": hf_config.intermediate_size,
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
