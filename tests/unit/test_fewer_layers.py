"""Rehearsals of fewer layers add up to those of all: a sum over layers of any kinds, and which models have it."""

from __future__ import annotations

from typing import Any

import pytest
from test_rehearsal import options
from transformers import Glm4MoeConfig, GptOssConfig, PretrainedConfig, Qwen3_5MoeTextConfig, Qwen3MoeConfig

from megatron_solopo.config import Config
from megatron_solopo.model.families.fields import linear_layers, windowed_layers
from megatron_solopo.parallel.topology import layers_of_stage
from megatron_solopo.planning.counts import ALL_TO_ALL, EXPERT, Exchange, Tally, Traffic, Work
from megatron_solopo.planning.fewer_layers import with_fewer_layers
from megatron_solopo.planning.memory import WEIGHTS, WORKING, Moment
from megatron_solopo.planning.rehearse import Outcome

BLOCK = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers")
SHAPES = {
    "gpt-oss-120b": (GptOssConfig(), ()),
    "gpt-oss-120b, 11 layers recomputed": (GptOssConfig(), (*BLOCK, 11)),
    "glm-4.5-air": (Glm4MoeConfig(head_dim=128), ("--recompute-granularity", "full")),
    "glm-4.5-air, 30 layers recomputed": (Glm4MoeConfig(head_dim=128), (*BLOCK, 30)),
    "qwen3.5": (Qwen3_5MoeTextConfig(), ("--recompute-granularity", "full")),
    "qwen3.5, 22 layers recomputed": (Qwen3_5MoeTextConfig(), (*BLOCK, 22)),
    "qwen3 in two stages": (Qwen3MoeConfig(), ("--pipeline-model-parallel-size", 2)),
}


def outcome(config: Config, hf_config: PretrainedConfig) -> Outcome:
    """A first stage that holds and computes something for each of its layers, by its kind."""
    dense = getattr(hf_config, "first_k_dense_replace", 0)
    kinds = [*zip(windowed_layers(hf_config), linear_layers(hf_config), strict=True)]
    each = [
        1 + 10 * kinds[layer][0] + 100 * kinds[layer][1] + 1000 * (layer < dense)
        for [*layers] in layers_of_stage(0, hf_config.num_hidden_layers, config.parallel)
        for layer in layers
    ]
    model = config.model
    uniform = model.recompute_method == "uniform"
    recomputed = 0 if model.recompute_granularity is None else len(each) if uniform else model.recompute_num_layers
    kept, work = sum(each[recomputed:]), sum(each) + sum(each[:recomputed])

    def tally(number: float) -> Tally:
        return Tally({}, {Exchange(ALL_TO_ALL, EXPERT, (0, 1)): Traffic(number, 7 * number)})

    held = {WEIGHTS: 5000 + 3 * sum(each), WORKING: 70 + kept}
    return Outcome(
        0, held, {"backward": Moment(held, "backward", "here")}, 9, 1, Work(*map(tally, (sum(each), work, 5))), kept
    )


@pytest.mark.parametrize("name", SHAPES)
def test_sums_over_layers_are_those_of_the_model(name: str) -> None:
    hf_config, flags = SHAPES[name]
    config, layers = options(*flags), list[int]()

    def rehearse(config: Config, hf_config: PretrainedConfig) -> Outcome:
        layers.append(hf_config.num_hidden_layers)
        return outcome(config, hf_config)

    assert with_fewer_layers(config, hf_config, rehearse) == outcome(config, hf_config)
    assert len(layers) == (3 if "recomputed" in name else 2) and sum(layers) < hf_config.num_hidden_layers


@pytest.mark.parametrize(
    ("hf_config", "flags"),
    [
        (Qwen3MoeConfig(num_hidden_layers=3), ()),  # as many as are rehearsed otherwise
        (GptOssConfig(layer_types=["sliding_attention"] * 18 + ["full_attention"] * 18), ()),
        (Qwen3_5MoeTextConfig(), ("--pipeline-model-parallel-size", 4)),  # stages begin with other layers
        (Qwen3MoeConfig(), ("--recompute-granularity", "full", "--recompute-num-layers", 4)),
        (Qwen3MoeConfig(), ("--expert-model-parallel-size", 128)),
    ],
)
def test_other_models_are_rehearsed_whole(hf_config: PretrainedConfig, flags: tuple[Any, ...]) -> None:
    assert with_fewer_layers(options(*flags), hf_config, outcome) is None
