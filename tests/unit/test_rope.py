"""RoPE scaling: every field of the config acts as in transformers; --rope-scaling writes the config that it names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import EXPERTS, SHAPE
from transformers import AutoConfig, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.rope import RotaryFrequencies, reach
from megatron_solopo.model.rope_scaling import extended, parse, write

LONG = SHAPE | dict(hidden_size=256, max_position_embeddings=8192)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SCALINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        (YARN, changed)
        for changed in (
            {},
            {"factor": 8.0},
            {"rope_theta": 500000.0},
            {"original_max_position_embeddings": 1024},
            {"attention_factor": 1.3},
            {"beta_fast": 8.0},
            {"beta_slow": 4.0},
            {"mscale": 0.7, "mscale_all_dim": 0.4},
            {"truncate": False},
        )
    ),
    *(
        (LLAMA3, changed)
        for changed in (
            {},
            {"factor": 32.0},
            {"rope_theta": 500000.0},
            {"low_freq_factor": 2.0},
            {"high_freq_factor": 8.0},
            {"original_max_position_embeddings": 1024},
        )
    ),
    *((LINEAR, changed) for changed in ({}, {"factor": 4.0}, {"rope_theta": 500000.0})),
    *(({"rope_type": "default", "rope_theta": 10000.0}, changed) for changed in ({}, {"rope_theta": 1e6})),
]
POSITIONS = torch.tensor([0, 1, 2, 100, 1023, 2047, 2048, 2049, 4000, 8191, 32000, 131071])


def ours(parameters: dict[str, Any], **fields: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hf_config = LlamaConfig(**(LONG | fields), rope_parameters=dict(parameters))
    family_of(hf_config)
    cos, sin = RotaryFrequencies(hf_config)(POSITIONS, torch.float32)
    return cos[:, 0], sin[:, 0]


@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize(("base", "changed"), SCALINGS)
def test_cos_and_sin_are_transformers(base: dict[str, Any], changed: dict[str, Any], head_dim: int) -> None:
    """By value, bit for bit, below and far beyond the original context; and every field does something."""
    theirs = LlamaRotaryEmbedding(LlamaConfig(**LONG, head_dim=head_dim, rope_parameters=base | changed))
    expected = theirs(torch.zeros(1), POSITIONS[None])
    tables = ours(base | changed, head_dim=head_dim)
    assert all(torch.equal(one, other[0]) for one, other in zip(tables, expected, strict=True))
    if changed:
        assert (tables[0] - ours(base, head_dim=head_dim)[0]).abs().max() > 1e-3


def test_yarn_of_a_config_without_head_dim() -> None:
    """transformers 5.17 uses Mixtral's head_dim of None as a number and fails."""
    hf_config = MixtralConfig(**LONG, **EXPERTS, rope_parameters=dict(YARN))
    assert hf_config.head_dim is None
    cos, _ = RotaryFrequencies(hf_config)(POSITIONS, torch.float32)
    assert torch.equal(cos[:, 0], ours(YARN, head_dim=64)[0])


@pytest.mark.parametrize(
    ("parameters", "code", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope-type-unsupported", ["rope_type 'dynamic' ", "length"]),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
            "rope-type-unsupported",
            ["rope_type 'longrope' ", "length"],
        ),
        ({"rope_type": "ntk", "factor": 2.0}, "rope-type-unsupported", ["rope_type 'ntk' ", "default, linear, llama"]),
        (YARN | {"partial_rotary_factor": 0.5}, "model-field-unknown", ["partial_rotary_factor = 0.5"]),
        ({"rope_type": "default", "rotary_base": 1e4}, "model-field-unknown", ["rotary_base = "]),
        (LINEAR | {"beta_fast": 16}, "model-field-unknown", ["beta_fast = 16 ", "'linear'"]),
        (LLAMA3 | {"attention_factor": 1.1}, "model-field-unknown", ["attention_factor = 1.1 ", "'llama3'"]),
        (LINEAR | {"factor": 0.5}, "model-field-value", ["factor = 0.5 ", "'linear'", "at least 1"]),
        (LINEAR | {"factor": math.nan}, "model-field-value", ["factor = nan ", "above 0"]),
        (LINEAR | {"factor": math.inf}, "model-field-value", ["factor = inf ", "above 0"]),
        (LINEAR | {"factor": True}, "model-field-value", ["factor = True ", "above 0"]),
        (LINEAR | {"rope_theta": math.nan}, "model-field-value", ["rope_theta = nan ", "above 0"]),
        (YARN | {"rope_theta": math.inf}, "model-field-value", ["rope_theta = inf ", "above 0"]),
        (YARN | {"attention_factor": math.nan}, "model-field-value", ["attention_factor = nan ", "above 0"]),
        (YARN | {"beta_fast": -1}, "model-field-value", ["beta_fast = -1 ", "above 0"]),
        (YARN | {"mscale": math.nan}, "model-field-value", ["mscale = nan ", "at least 0"]),
        (LLAMA3 | {"low_freq_factor": 0}, "model-field-value", ["low_freq_factor = 0 ", "above 0"]),
        (LLAMA3 | {"low_freq_factor": 8.0}, "model-field-value", ["low_freq_factor = 8.0 ", "high_freq_factor = "]),
        (
            LLAMA3 | {"original_max_position_embeddings": math.nan},
            "model-field-value",
            ["original_max_position_embeddings = nan "],
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(parameters: dict[str, Any], code: str, named: list[str]) -> None:
    with refused(code, "config.json: ", *named):
        family_of(LlamaConfig(**LONG, rope_parameters={"rope_theta": 10000.0} | parameters))


def test_notes_of_published_configs_pass() -> None:
    family_of(LlamaConfig(**LONG, rope_parameters=YARN | {"finetuned": True, "partial_rotary_factor": 1.0}))
    family_of(LlamaConfig(**LONG, rope_parameters=LINEAR | {"original_max_position_embeddings": 4096}))


def test_a_published_yarn_config_reaches_as_far_as_it_was_extended() -> None:
    from megatron_solopo.config import DataConfig
    from megatron_solopo.model.hf_config import check_length, check_lengths

    hf_config = LlamaConfig(**(LONG | {"max_position_embeddings": 2048}), rope_parameters=dict(YARN))
    assert reach(2048, hf_config.rope_parameters) == 8192
    check_length(hf_config, 8192)
    with refused("seq-length-beyond-positions", "--seq-length 8193 ", "max_position_embeddings 8192 "):
        check_length(hf_config, 8193)
    check_lengths(hf_config, DataConfig(seq_length=100, stretch_positions=8192))
    with refused("seq-length-beyond-positions", "--stretch-positions 8193 ", "max_position_embeddings 8192 "):
        check_lengths(hf_config, DataConfig(seq_length=100, stretch_positions=8193))


@pytest.mark.parametrize("text", ["yarn:4:32768", "linear:2.5:4096"])
def test_one_text_for_one_scaling(text: str) -> None:
    assert str(parse(text)) == text == str(parse(text.replace(":4:", ":4.0:").replace("2.5", "2.50")))


def test_qwens_recipe_for_128k() -> None:
    """What Qwen2.5's page adds to config.json by hand, and Qwen3's 32,768 of 40,960 positions."""
    for kind, positions in ((Qwen2Config, 32768), (Qwen3Config, 40960)):
        hf_config = kind(**(LONG | {"max_position_embeddings": positions}), rope_parameters={"rope_theta": 1e6})
        longer = extended(hf_config, "yarn:4:32768")
        assert longer.max_position_embeddings == 131072 and hf_config.max_position_embeddings == positions
        by_hand = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
        assert longer.rope_parameters == by_hand and hf_config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("parameters", "text", "code", "named"),
    [
        (YARN, "yarn:4:8192", "rope-scaling-already-set", ["rope_type 'yarn'"]),
        ({"rope_theta": 1e4}, "yarn:4:4096", "rope-scaling-positions", ["4096, ", "embeddings 8192; use 8192"]),
        ({"rope_theta": 1e4}, "linear:2:16384", "rope-scaling-positions", ["16384, ", "use 8192"]),
    ],
)
def test_a_scaling_that_does_not_fit_the_folder_is_one_line(
    parameters: dict[str, Any], text: str, code: str, named: list[str]
) -> None:
    with refused(code, f"--rope-scaling {text}: ", *named):
        extended(LlamaConfig(**LONG, rope_parameters=dict(parameters)), text)


def test_an_extension_that_shortens_is_refused() -> None:
    hf_config = Qwen3Config(**(LONG | {"max_position_embeddings": 40960}), rope_parameters={"rope_theta": 1e6})
    with refused("rope-scaling-positions", "40960 tokens", "max_position_embeddings 40960 ", "FACTOR"):
        extended(hf_config, "yarn:1.25:32768")
    with refused("rope-scaling-positions", "ORIGINAL is 20000", "32768 or 40960"):
        extended(hf_config, "yarn:4:20000")


@pytest.mark.parametrize("text", ["yarn:4:8192", "linear:2:8192"])
@pytest.mark.parametrize("older", [True, False])
def test_the_written_config_reads_as_the_trained_one(text: str, older: bool, tmp_path: Path) -> None:
    """By transformers 5, from the fields it saves and from the older ones alone, which is all that version 4 reads."""
    hf_config = LlamaConfig(**LONG, rope_parameters={"rope_theta": 77000.0})
    document = hf_config.to_dict()
    if older:
        document["rope_theta"] = document.pop("rope_parameters")["rope_theta"]
    longer = extended(hf_config, text)
    write(document, longer)
    assert "rope_theta" not in document["rope_scaling"] and document["rope_theta"] == 77000.0
    for left_out in ((), ("rope_parameters",), ("rope_scaling", "rope_theta")):
        kept = {name: value for name, value in document.items() if name not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        read = AutoConfig.from_pretrained(tmp_path)
        assert read.rope_parameters == longer.rope_parameters, left_out
        assert read.max_position_embeddings == longer.max_position_embeddings == parse(text).positions
