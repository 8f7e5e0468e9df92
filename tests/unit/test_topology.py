"""Who holds what: the same as megatron-core's groups; layouts that a model cannot be cut into are refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from refusals import refused
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from megatron_solopo.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.parallel.topology import (
    Place,
    check_layout,
    expert_place,
    layers_of_stage,
    place_of,
    stage_sizes,
)


def layout(tensor: int, pipeline: int, context: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
    )


@pytest.mark.parametrize(
    ("tensor", "context", "pipeline", "world"),
    [(1, 1, 1, 3), (2, 1, 1, 4), (1, 1, 2, 4), (2, 1, 2, 8), (4, 1, 3, 24), (1, 2, 1, 4), (2, 2, 2, 16), (2, 4, 3, 24)],
)
def test_places_are_megatrons(tensor: int, context: int, pipeline: int, world: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    data = world // (tensor * context * pipeline)
    megatron = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    groups = {kind: megatron.get_ranks(kind) for kind in ("tp", "cp", "dp", "pp")}
    for rank in range(world):
        where = [next(g.index(rank) for g in groups[kind] if rank in g) for kind in groups]
        assert place_of(rank, layout(tensor, pipeline, context), world) == Place(*where)


@pytest.mark.parametrize(("tensor", "experts", "world"), [(1, 2, 4), (2, 2, 8), (1, 4, 8), (2, 1, 4)])
def test_expert_places_are_megatrons(tensor: int, experts: int, world: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    copies = world // (tensor * experts)
    groups = RankGenerator(tp=tensor, ep=experts, dp=copies, pp=1, cp=1, order="tp-cp-ep-dp-pp").get_ranks("ep")
    parallel = ParallelConfig(expert_model_parallel_size=experts, expert_tensor_parallel_size=tensor)
    for rank in range(world):
        assert expert_place(rank, parallel) == next(group.index(rank) for group in groups if rank in group)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world", "code", "named"),
    [
        (2, 2, 6, "layout-processes", ["size 2 x --pipeline-model-parallel-size 2 = 4 ", " 6 ", "start 4 or 8 (torch"]),
        (2, 2, 2, "layout-processes", ["= 4 processes", " 2 were", "start 4 (torchrun"]),
        (4, 1, 4, "layout-not-divisible", ["--tensor-model-parallel-size 4: ", "num_key_value_heads 2; ", "do: 2"]),
        (3, 1, 3, "layout-not-divisible", ["--tensor-model-parallel-size 3: ", "num_attention_heads 4; ", "do: 2"]),
        (1, 3, 3, "layout-stages", ["--pipeline-model-parallel-size 3: ", "num_hidden_layers 2"]),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(
    tensor: int, pipeline: int, world: int, code: str, named: list[str]
) -> None:
    with refused(code, *named):
        check_layout(LlamaConfig(**SHAPE), Config(parallel=layout(tensor, pipeline)), 128, world)


def cut(stages: int, first: int | None = None, last: int | None = None, chunks: int = 1) -> ParallelConfig:
    return dataclasses.replace(
        layout(1, stages),
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        num_virtual_stages_per_pipeline_rank=chunks,
    )


def test_stages_hold_the_layers_that_megatron_builds_there() -> None:
    """Splits of layers over stages: the same ones are possible, with the same layers."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_solopo.model.build import transformer_config

    shapes = [LlamaConfig(**SHAPE | {"num_hidden_layers": layers}) for layers in range(9)]
    possible, ends = 0, (None, 1, 2, 4)
    for layers, stages, chunks, first, last in itertools.product((4, 7, 8), (2, 3, 4), (1, 2), ends, ends):
        parallel = cut(stages, first, last, chunks)
        virtual = [None] if chunks == 1 else list(range(chunks))

        def megatrons(layers=layers, parallel=parallel, virtual=virtual) -> list[list[range]] | None:
            try:
                settings = transformer_config(shapes[layers], Config(parallel=parallel), torch.float32)
                return [
                    [
                        range(offset, offset + get_num_layers_to_build(settings, stage, rank))
                        for stage in virtual
                        for offset in [get_transformer_layer_offset(settings, stage, rank)]
                    ]
                    for rank in range(parallel.pipeline_model_parallel_size)
                ]
            except (ValueError, AssertionError):
                return None

        theirs = megatrons()
        if stage_sizes(layers, parallel) is None:
            # Megatron accepts a stage without layers; of two stages it gets the first one's layers only.
            if not (stages == 2 and first and last):
                assert theirs is None or not all(map(len, itertools.chain(*theirs))), (layers, parallel)
            continue
        possible += 1
        ours = [layers_of_stage(stage, layers, parallel) for stage in range(stages)]
        assert ours == theirs, (layers, parallel)
        assert sorted(itertools.chain(*itertools.chain(*ours))) == list(range(layers))
    assert possible > 40


@pytest.mark.parametrize(
    ("layers", "parallel", "named"),
    [
        (7, cut(4), ["--pipeline-model-parallel-size 4: ", "num_hidden_layers 7; ", "size is 1 (or"]),
        (4, cut(2, first=4), ["--decoder-first-pipeline-num-layers 4: ", "num_hidden_layers 4 ", "size is 3"]),
        (4, cut(2, last=9), ["--decoder-last-pipeline-num-layers 9: ", "num_hidden_layers 4 ", "size is 3"]),
        (8, cut(3, first=3, last=3), None),
        (8, cut(4, first=3, last=4), ["--decoder-first-pipeline-num-layers 3: ", "size is 2"]),
        (8, cut(2, chunks=3), ["--num-virtual-stages-per-pipeline-rank 3: ", "size is 2"]),
        (8, cut(2, first=3, chunks=2), ["--decoder-first-pipeline-num-layers 3: ", "size is 2"]),
        (8, cut(3, chunks=2), ["--pipeline-model-parallel-size 3: ", "size is 2"]),
        (2, cut(4, chunks=2), ["--pipeline-model-parallel-size 4: ", "size is 2, without --num-virtual-stages-per-"]),
    ],
)
def test_stages_that_the_layers_do_not_fill_are_one_line(
    layers: int, parallel: ParallelConfig, named: list[str] | None
) -> None:
    def check(parallel: ParallelConfig) -> None:
        shape = LlamaConfig(**SHAPE | {"num_hidden_layers": layers})
        check_layout(shape, Config(parallel=parallel), 128, parallel.pipeline_model_parallel_size)

    if named is None:
        check(parallel)
        return
    with refused("layout-stages", *named):
        check(parallel)


SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("parallel", "world", "named"),
    [
        ({"expert_model_parallel_size": 3}, 3, ["--expert-model-parallel-size 3: ", "experts 4; ", "do: 1"]),
        ({"expert_model_parallel_size": 8}, 8, ["--expert-model-parallel-size 8: ", "experts 4; ", "do: 4"]),
        ({"expert_model_parallel_size": 4}, 2, ["--expert-model-parallel-size 4: ", "pipeline stage", " 2; ", "do: 2"]),
        ({"expert_tensor_parallel_size": 5}, 5, ["--expert-tensor-parallel-size 5: ", "size 24; ", "do: 1"]),
        ({"expert_tensor_parallel_size": 4}, 2, ["--expert-tensor-parallel-size 4: ", "pipeline stage 2; ", "do: 2"]),
        (SEQUENCE | {"expert_model_parallel_size": 2}, 2, ["--expert-model-parallel-size 2: ", " 1; ", "do: 1"]),
    ],
)
def test_experts_that_cannot_be_spread_so_are_one_line(parallel: dict, world: int, named: list[str]) -> None:
    hf_config = Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE)
    with refused("layout-not-divisible", *named):
        check_layout(hf_config, Config(parallel=ParallelConfig(**parallel)), 128, world)


GATHER = {"moe_token_dispatcher_type": "allgather"}


@pytest.mark.parametrize(
    ("parallel", "world", "named"),
    [
        ({}, 4, None),
        (SEQUENCE, 4, None),
        (SEQUENCE | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, 4, None),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, 4, None),
        ({"expert_model_parallel_size": 2}, 4, ["each of the 2 processes", "(1 share", "use alltoall"]),
        (SEQUENCE | {"expert_model_parallel_size": 2}, 4, ["each of the 4 processes", "(2 share", "use alltoall"]),
        ({"pipeline_model_parallel_size": 2}, 2, ["--pipeline-model-parallel-size 2", "use alltoall"]),
    ],
)
def test_tokens_are_gathered_where_processes_share_their_packs(
    parallel: dict, world: int, named: list[str] | None
) -> None:
    hf_config = Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE)
    config = Config(parallel=ParallelConfig(**GATHER | parallel))
    if named is None:
        check_layout(hf_config, config, 128, world)
        return
    with refused("option-conflict", "--moe-token-dispatcher-type allgather", *named):
        check_layout(hf_config, config, 128, world)


def test_deepep_without_processes_to_exchange_with_is_one_line() -> None:
    hf_config = Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE)
    flex = {"moe_token_dispatcher_type": "flex"}
    with refused(
        "option-unused", "--moe-token-dispatcher-type flex needs ", "--expert-model-parallel-size", "alltoall"
    ):
        check_layout(hf_config, Config(parallel=ParallelConfig(**flex)), 128, 2)
    check_layout(hf_config, Config(parallel=ParallelConfig(**flex, expert_model_parallel_size=2)), 128, 2)


def test_tensor_parallelism_of_experts_needs_sequence_parallelism() -> None:
    hf_config = Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE)
    with refused("option-conflict", "--tensor-model-parallel-size 2: ", "--sequence-parallel"):
        check_layout(hf_config, Config(parallel=ParallelConfig(tensor_model_parallel_size=2)), 128, 2)


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        ({"expert_model_parallel_size": 4}, 4),
        ({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
        ({"expert_tensor_parallel_size": 3}, 3),
        (SEQUENCE | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, 2),
    ],
)
def test_experts_that_can_be_spread_pass(parallel: dict, world: int) -> None:
    hf_config = Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE)
    check_layout(hf_config, Config(parallel=ParallelConfig(**parallel)), 128, world)


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (Config(parallel=ParallelConfig(expert_model_parallel_size=2)), "--expert-model-parallel-size 2"),
        (Config(parallel=ParallelConfig(expert_tensor_parallel_size=2)), "--expert-tensor-parallel-size 2"),
        (Config(training=TrainingConfig(moe_aux_loss_coeff=0.1)), "--moe-aux-loss-coeff 0.1"),
        (Config(parallel=ParallelConfig(**GATHER)), "--moe-token-dispatcher-type allgather"),
        (Config(model=ModelConfig(moe_permute_fusion=True)), "--moe-permute-fusion"),
    ],
)
def test_a_model_without_experts_refuses_their_options(config: Config, flag: str) -> None:
    with refused("model-without-experts", f"{flag}: ", "llama"):
        check_layout(LlamaConfig(**SHAPE), config, 128, 2)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (MixtralConfig, "router_jitter_noise", 0.1),
        (MixtralConfig, "hidden_act", "gelu"),
        (MixtralConfig, "num_experts_per_tok", 1),
        (Qwen3MoeConfig, "decoder_sparse_step", 2),
        (Qwen3MoeConfig, "mlp_only_layers", [0]),
        (Qwen3MoeConfig, "attention_bias", True),
    ],
)
def test_what_a_family_with_experts_does_not_cover_is_refused(kind: type, field: str, value: object) -> None:
    with refused("model-field-unsupported", f"config.json: {field} = "):
        family_of(kind(**(SHAPE | EXPERTS | {field: value})))
