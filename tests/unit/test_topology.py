"""Who holds what: the same as megatron-core's own groups; layouts that a model cannot be cut into are refused."""

from __future__ import annotations

import pytest
from tiny_models import SHAPE
from transformers import LlamaConfig

from megatron_solopo.config import Config, ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.topology import Place, check_layout, place_of


def layout(tensor: int, pipeline: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 3), (2, 1, 4), (1, 2, 4), (2, 2, 8), (4, 3, 24)])
def test_places_are_megatrons(tensor: int, pipeline: int, world: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    data = world // (tensor * pipeline)
    megatron = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    groups = {kind: megatron.get_ranks(kind) for kind in ("tp", "dp", "pp")}
    for rank in range(world):
        where = {kind: next(g.index(rank) for g in groups[kind] if rank in g) for kind in groups}
        assert place_of(rank, layout(tensor, pipeline), world) == Place(where["tp"], where["dp"], where["pp"])


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world", "message"),
    [
        (2, 2, 6, r"--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 = 4 processes .* 6 were started"),
        (4, 1, 4, r"--tensor-model-parallel-size 4: does not divide the model's num_key_value_heads 2"),
        (3, 1, 3, r"--tensor-model-parallel-size 3: does not divide the model's num_attention_heads 4"),
        (1, 3, 3, r"--pipeline-model-parallel-size 3: does not divide the model's num_hidden_layers 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(tensor: int, pipeline: int, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_layout(LlamaConfig(**SHAPE), Config(parallel=layout(tensor, pipeline)), 128, world)
    assert "\n" not in str(caught.value)


def test_random_weights_need_one_stage() -> None:
    with pytest.raises(UserError, match="--random-init with --pipeline-model-parallel-size"):
        check_layout(LlamaConfig(**SHAPE), Config(model=ModelConfig(random_init=True), parallel=layout(1, 2)), 128, 2)
