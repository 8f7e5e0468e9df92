"""What config.json may contain: every field is honoured, harmless or refused by name; real configs pass."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE
from transformers import (
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo.model.families.fields import HARMLESS, HARMLESS_ENDINGS, READ, attention_window
from megatron_solopo.model.families.registry import family_of

KINDS: tuple[type[PretrainedConfig], ...] = (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
EXPERT_FIELDS = EXPERTS | QWEN3_MOE


def small(kind: type[PretrainedConfig], **fields: Any) -> PretrainedConfig:
    experts = EXPERT_FIELDS if kind is Qwen3MoeConfig else EXPERTS if kind is MixtralConfig else {}
    return kind(**(SHAPE | experts | fields))


REFUSED = {
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "no_rope_layers": [1, 1, 1, 0],
    "qk_norm": True,
    "mup_scale": 0.5,
    "logit_scale": 0.25,
    "embedding_multiplier": 12.0,
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "per_layer_config": {0: {"intermediate_size": 24}},
    "quantization_config": {"quant_method": "fp8"},
    "partial_rotary_factor": 0.5,
    "mlp_bias": True,
}
UNSUPPORTED = {"hidden_act", "attention_dropout", "per_layer_config"}
"""Fields of `REFUSED` that every family knows, in one value; Llama knows mlp_bias too."""


def code_of(kind: type[PretrainedConfig], field: str) -> str:
    if field == "quantization_config":
        return "model-quantized"
    supported = field in UNSUPPORTED or (field == "mlp_bias" and kind is LlamaConfig)
    return "model-field-unsupported" if supported else "model-field-unknown"


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(kind: type[PretrainedConfig], field: str) -> None:
    with refused(code_of(kind, field), f"config.json: {field} "):
        family_of(small(kind, **{field: REFUSED[field]}))


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig])
def test_biases_that_the_family_has_no_place_for_are_refused(kind: type[PretrainedConfig]) -> None:
    supported = kind in (LlamaConfig, Qwen3Config, Qwen3MoeConfig)
    code = "model-field-unsupported" if supported else "model-field-unknown"
    with refused(code, "config.json: attention_bias = True"):
        family_of(small(kind, attention_bias=True))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize("field", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_nothing_is_built_of_is_refused_by_name(
    kind: type[PretrainedConfig], field: str, value: int
) -> None:
    hf_config = small(kind)
    setattr(hf_config, field, value)
    with refused("model-field-value", f"config.json: {field} = {value} ", "at least 1"):
        family_of(hf_config)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-6, 0, True, "1e-6"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epsilon_that_is_no_number_above_0_is_refused_by_name(kind: type[PretrainedConfig], value: Any) -> None:
    hf_config = small(kind)
    hf_config.__dict__["rms_norm_eps"] = value  # as json.load reads it; versions of transformers refuse other types
    with refused("model-field-value", f"config.json: rms_norm_eps = {value!r} ", "above 0"):
        family_of(hf_config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initializer_range", math.nan),
        ("initializer_range", -0.02),
        ("num_hidden_layers", True),
        ("sliding_window", math.nan),
        ("sliding_window", 0),
        ("sliding_window", -1),
    ],
)
def test_other_numbers_that_mean_nothing_are_refused_by_name(field: str, value: Any) -> None:
    hf_config = small(MistralConfig)
    hf_config.__dict__[field] = value
    with refused("model-field-value", f"config.json: {field} = {value} "):
        family_of(hf_config)


@pytest.mark.parametrize(
    ("kind", "field", "value", "named"),
    [
        (MixtralConfig, "num_local_experts", 0, ["num_experts = 0 ", "at least 1"]),
        (Qwen3MoeConfig, "num_experts_per_tok", 0, ["num_experts_per_tok = 0 ", "at least 1"]),
        (MixtralConfig, "num_experts_per_tok", 5, ["num_experts_per_tok = 5 ", "4 experts"]),
        (Qwen3MoeConfig, "moe_intermediate_size", -1, ["moe_intermediate_size = -1 ", "at least 1"]),
        (LlamaConfig, "num_key_value_heads", 3, ["num_attention_heads = 4 ", "num_key_value_heads = 3"]),
        (LlamaConfig, "rope_parameters", {"rope_type": "default", "rope_theta": None}, ["rope_theta = None "]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(
    kind: type[PretrainedConfig], field: str, value: Any, named: list[str]
) -> None:
    with refused("model-field-value", "config.json: ", *named):
        family_of(small(kind, **{field: value}))


IN_THE_WILD: dict[str, Any] = {
    "_name_or_path": "/home/me/model",
    "_attn_implementation_autoset": True,
    "architectures": ["SomeForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling.Some"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "unsloth_version": "2024.9",
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "mask_token_id": 4,
    "pretraining_tp": 2,
    "temperature": 0.6,
    "max_length": 4096,
    "do_sample": True,
    "tokenizer_class": "LlamaTokenizer",
    "rope_scaling": None,
    "use_mrope": False,
    "embd_pdrop": 0.0,
    "mlp_bias": False,
    "final_logit_softcapping": None,
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4"},
    "num_labels": 2,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_published_configs_pass(kind: type[PretrainedConfig], tmp_path: Path) -> None:
    from megatron_solopo.model.hf_config import check_length, read_hf_config

    document = small(kind).to_dict() | {"rope_theta": 500000} | IN_THE_WILD
    document.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(document))
    hf_config = read_hf_config(tmp_path)
    assert family_of(hf_config).model_type == kind.model_type
    assert attention_window(hf_config) is None and hf_config.rope_parameters["rope_theta"] == 500000
    check_length(hf_config, SHAPE["max_position_embeddings"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_transformers_is_classified(kind: type[PretrainedConfig]) -> None:
    """A new version's new field turns this red: read it, refuse it, or list it as harmless."""
    known = READ | HARMLESS | family_of(small(kind)).fields
    # Refused unless their value means "none of this".
    refused = {"attention_bias", "mlp_bias", "attention_dropout", "router_jitter_noise", "mlp_only_layers"}
    of_base = {field.name for field in dataclasses.fields(PretrainedConfig)}
    declared = {field.name for field in dataclasses.fields(kind)} - of_base
    assert {name for name in declared if not name.endswith(HARMLESS_ENDINGS)} <= known | refused


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from megatron_solopo.model.hf_config import read_hf_config

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused("model-type-unsupported", "'gpt2'", "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"):
        family_of(read_hf_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama99"}))
    with refused("model-config-unreadable", "config.json", "llama99"):
        read_hf_config(tmp_path)


WINDOWS: list[tuple[PretrainedConfig, int | None]] = [
    (small(MistralConfig, sliding_window=64), 64),
    (small(MistralConfig, sliding_window=None), None),
    (small(MistralConfig, sliding_window=4096, use_sliding_window=False), None),
    (small(MixtralConfig, sliding_window=64), 64),
    (small(MixtralConfig), None),
    (small(Qwen2Config, sliding_window=64), None),
    (small(Qwen2Config, use_sliding_window=True, sliding_window=64, max_window_layers=1), 64),
    (small(Qwen2Config, use_sliding_window=True, sliding_window=64, max_window_layers=2), None),
    (small(Qwen3Config, use_sliding_window=True, sliding_window=64, max_window_layers=0), 64),
    (small(Qwen3MoeConfig, use_sliding_window=True, sliding_window=64), 64),
    (small(Qwen3MoeConfig, sliding_window=64), None),
]


@pytest.mark.parametrize(("hf_config", "window"), WINDOWS)
def test_a_window_bounds_the_length_of_sequences(hf_config: PretrainedConfig, window: int | None) -> None:
    from megatron_solopo.model.hf_config import check_length

    family_of(hf_config)
    assert attention_window(hf_config) == window
    check_length(hf_config, window or 256)
    if window is not None:
        with refused("seq-length-beyond-window", "--seq-length 65 ", "sliding_window 64 ", "to 64,"):
            check_length(hf_config, window + 1)


def test_a_window_as_long_as_the_sequence_hides_nothing_and_one_shorter_does() -> None:
    """The bound is exact: what `check_length` accepts is full attention in transformers, what it refuses is not."""
    ids, outputs = torch.arange(40)[None], []
    for window in (None, 40, 39):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(MistralForCausalLM(small(MistralConfig, sliding_window=window)).eval()(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4


@pytest.mark.parametrize("kinds", [["chunked_attention", "full_attention"], ["sliding_attention", "full_attention"]])
def test_layers_of_another_attention_are_refused(kinds: list[str]) -> None:
    with refused("model-field-unsupported", f"config.json: layer_types has '{kinds[0]}'"):
        family_of(small(Qwen2Config, layer_types=kinds))


# Published figures; Mistral v0.3's is v0.1's 7.242 B with 768 more rows in two matrices.
PARAMETERS = {
    "Qwen2.5-7B-Instruct": 7.616,
    "Llama-3.1-8B-Instruct": 8.030,
    "Qwen3-8B": 8.191,
    "Qwen3-30B-A3B": 30.532,
    "Mistral-7B-v0.1": 7.242,
    "Mistral-7B-v0.3": 7.248,
    "Mixtral-8x7B-v0.1": 46.703,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_real_shapes_have_their_parameters(engine: Any, solopo_data: Path, name: str, tmp_path: Path) -> None:
    """Ours and transformers' model, on the meta device: every shape, no memory."""
    from megatron_solopo.config import Config
    from megatron_solopo.conversion.hf import named_entries
    from megatron_solopo.model.build import build_model
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.parameters import parameter_count

    text = (solopo_data / "model_configs" / f"{name}.config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    hf_config = read_hf_config(tmp_path)
    with torch.device("meta"):
        model = build_model(hf_config, Config(), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    matrices = 1 if hf_config.tie_word_embeddings else 2
    count -= matrices * (model.vocab_size - hf_config.vocab_size) * hf_config.hidden_size
    assert count == parameter_count(hf_config)["total"]
    assert round(count / 1e9, 3) == PARAMETERS[name]
    assert sum(1 for _ in named_entries(model, hf_config)) == len(list(model.parameters()))
