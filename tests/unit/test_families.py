"""What config.json may contain: every field is honoured, harmless or refused by name; real configs pass."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import EXPERTS, LATENT, QWEN3_MOE, RECURRENT, SHAPE, SHARED_EXPERT
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GptOssConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from megatron_solopo.config import Config, ModelConfig, ParallelConfig
from megatron_solopo.model.families.fields import HARMLESS, HARMLESS_ENDINGS, READ, attention_window, windowed_layers
from megatron_solopo.model.families.registry import FAMILIES, family_of
from megatron_solopo.model.rope import rope_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

KINDS: tuple[type[PretrainedConfig], ...] = (
    *(Gemma3TextConfig, Gemma4TextConfig, Gemma4UnifiedTextConfig, GlmConfig, Glm4Config, Glm4MoeConfig),
    *(GptOssConfig, LlamaConfig, MinistralConfig, Ministral3Config, MistralConfig),
    *(MixtralConfig, Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig, SmolLM3Config),
    *(Qwen3_5TextConfig, Qwen3_5MoeTextConfig, Qwen3NextConfig),
    *(DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig),
)
GEMMA4_KINDS = (Gemma4TextConfig, Gemma4UnifiedTextConfig)
LATENT_KINDS = (DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig)
RECURRENT_KINDS = (Qwen3_5TextConfig, Qwen3_5MoeTextConfig, Qwen3NextConfig)
EXPERT_FIELDS = EXPERTS | QWEN3_MOE


def small(kind: type[PretrainedConfig], **fields: Any) -> PretrainedConfig:
    experts = EXPERT_FIELDS if kind in (Qwen3MoeConfig, Glm4MoeConfig) else {}
    experts = EXPERTS if kind in (GptOssConfig, MixtralConfig) else experts
    if kind in RECURRENT_KINDS:
        experts = RECURRENT | ({} if kind is Qwen3_5TextConfig else SHARED_EXPERT)
    if kind in LATENT_KINDS:
        experts = LATENT | ({} if kind is DeepseekV2Config else {"n_group": 1, "topk_group": 1})
        experts |= {} if kind is Glm4MoeLiteConfig else {"first_k_dense_replace": 1}
    if kind is Gemma4TextConfig:
        experts = {"hidden_size_per_layer_input": 0}
    return kind(**(SHAPE | experts | {"pad_token_id": 0} | fields))


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
"""Fields of `REFUSED` that every family knows, in one value; Llama and SmolLM3 know mlp_bias too."""
SUPPORTED = {
    "partial_rotary_factor": (GlmConfig, Glm4Config, Glm4MoeConfig, Phi3Config, *RECURRENT_KINDS),
    "no_rope_layers": (SmolLM3Config,),
    "final_logit_softcapping": GEMMA4_KINDS,
}
"""Fields of `REFUSED` that some families have."""


def code_of(kind: type[PretrainedConfig], field: str) -> str:
    if field == "quantization_config":
        return "model-quantized"
    supported = field in UNSUPPORTED or (field == "mlp_bias" and kind in (LlamaConfig, SmolLM3Config, *LATENT_KINDS))
    return "model-field-unsupported" if supported else "model-field-unknown"


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(kind: type[PretrainedConfig], field: str) -> None:
    if kind in SUPPORTED.get(field, ()):
        return
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
        (MixtralConfig, "num_local_experts", 0, ["num_local_experts = 0 ", "at least 1"]),
        (Qwen3MoeConfig, "num_experts_per_tok", 0, ["num_experts_per_tok = 0 ", "at least 1"]),
        (MixtralConfig, "num_experts_per_tok", 5, ["num_experts_per_tok = 5 ", "4 experts"]),
        (Qwen3MoeConfig, "moe_intermediate_size", -1, ["moe_intermediate_size = -1 ", "at least 1"]),
        (LlamaConfig, "num_key_value_heads", 3, ["num_attention_heads = 4 ", "num_key_value_heads = 3"]),
        (LlamaConfig, "rope_parameters", {"rope_type": "default", "rope_theta": None}, ["rope_theta = None "]),
        (SmolLM3Config, "no_rope_layers", [1, 2], ["no_rope_layers = [1, 2] "]),
        (Gemma3TextConfig, "query_pre_attn_scalar", 0, ["query_pre_attn_scalar = 0 ", "above 0"]),
        (Gemma4TextConfig, "final_logit_softcapping", 0.0, ["final_logit_softcapping = 0.0 ", "above 0"]),
        (Gemma4TextConfig, "per_layer_config", {1: {"num_key_value_heads": 3}}, ["num_key_value_heads = 3"]),
        (Glm4MoeConfig, "num_local_experts", 0, ["n_routed_experts = 0 ", "at least 1"]),
        (Glm4MoeConfig, "n_group", 3, ["n_group = 3 ", "4 experts"]),
        (Glm4MoeConfig, "n_group", 4, ["n_group = 4 ", "at least 2"]),
        (Glm4MoeConfig, "topk_group", 2, ["topk_group = 2 of 1 groups"]),
        (Glm4MoeConfig, "first_k_dense_replace", 2, ["first_k_dense_replace = 2 ", "num_hidden_layers = 2"]),
        (Glm4MoeConfig, "n_shared_experts", 0, ["n_shared_experts = 0 ", "at least 1"]),
        (Glm4MoeConfig, "routed_scaling_factor", math.inf, ["routed_scaling_factor = inf ", "finite"]),
        (GlmConfig, "partial_rotary_factor", 0.29, ["partial_rotary_factor = 0.29 of head_dim 128", "even number"]),
        (Qwen3_5TextConfig, "linear_num_key_heads", 3, ["linear_num_value_heads = 4 ", "linear_num_key_heads = 3"]),
        (Qwen3NextConfig, "linear_conv_kernel_dim", 0, ["linear_conv_kernel_dim = 0 ", "at least 1"]),
        (DeepseekV3Config, "n_group", 3, ["n_group = 3 ", "4 experts"]),
        (DeepseekV3Config, "kv_lora_rank", 0, ["kv_lora_rank = 0 ", "at least 1"]),
        (DeepseekV2Config, "qk_rope_head_dim", 7, ["qk_rope_head_dim = 7 ", "even"]),
        (Glm4MoeLiteConfig, "mlp_layer_types", ["sparse", "dense"], ["mlp_layer_types = ['sparse', 'dense'] "]),
        (GlmConfig, "partial_rotary_factor", 2.0, ["partial_rotary_factor = 2.0 of head_dim 128", "at most all"]),
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

    rope = {} if kind in GEMMA4_KINDS else {"rope_theta": 500000}  # for which they have no such field
    document = small(kind).to_dict() | rope | IN_THE_WILD
    document.pop("rope_parameters")
    by_layer = kind in (*GEMMA4_KINDS, Gemma3TextConfig, GptOssConfig, MinistralConfig, Olmo3Config)
    if by_layer:  # which have no such field
        document.pop("use_sliding_window")
    if not rope:  # of which transformers would make rope_parameters
        document.pop("rope_scaling")
    (tmp_path / "config.json").write_text(json.dumps(document))
    hf_config = read_hf_config(tmp_path)
    assert family_of(hf_config).model_type == kind.model_type
    assert attention_window(hf_config) == (4096 if by_layer else None)
    assert rope_of(hf_config)["rope_theta"] == (1e6 if not rope or kind is Ministral3Config else 500000)
    check_length(hf_config, SHAPE["max_position_embeddings"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_transformers_is_classified(kind: type[PretrainedConfig]) -> None:
    """A new version's new field turns this red: read it, refuse it, or list it as harmless."""
    known = READ | HARMLESS | family_of(small(kind)).fields
    # Refused unless their value means "none of this".
    refused = {"attention_bias", "mlp_bias", "attention_dropout", "router_jitter_noise", "mlp_only_layers"}
    refused |= {"embd_pdrop", "resid_pdrop"}  # Phi3's
    refused |= {"attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"}  # Gemma3's
    if kind is Gemma4TextConfig:  # without enable_moe_block, which is refused too
        refused |= {"num_experts", "top_k_experts", "moe_intermediate_size"}
    of_base = {field.name for field in dataclasses.fields(PretrainedConfig)}
    declared = {field.name for field in dataclasses.fields(kind)} - of_base
    assert {name for name in declared if not name.endswith(HARMLESS_ENDINGS)} <= known | refused


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from megatron_solopo.model.hf_config import read_hf_config

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused("model-type-unsupported", "'gpt2'", ", ".join(sorted(FAMILIES))):
        family_of(read_hf_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama99"}))
    with refused("model-config-unreadable", "config.json", "llama99"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("hidden_size_per_layer_input", 256, "embeddings for each layer"),
        ("num_kv_shared_layers", 1, "another layer's keys"),
        ("enable_moe_block", True, "experts"),
        ("use_bidirectional_attention", "all", "only None is"),
        ("per_layer_config", {0: {"head_dim": 16}}, "between those with a window and others"),
        ("per_layer_config", {1: {"head_dim": 16, "skip": ["mlp"]}}, "skip)"),
    ],
)
def test_other_models_of_gemma_4_are_refused_by_name(field: str, value: Any, part: str) -> None:
    layers = [SLIDING, SLIDING, FULL]
    family_of(small(Gemma4TextConfig, num_hidden_layers=3, layer_types=layers, attention_k_eq_v=True))
    hf_config = small(Gemma4TextConfig, **{"num_hidden_layers": 3, "layer_types": layers, field: value})
    with refused("model-field-unsupported", f"config.json: {field} ", part):
        family_of(hf_config)


def test_a_known_architecture_is_refused_with_its_reason() -> None:
    with refused("model-type-unsupported", "'gemma2' is not supported, because ", "attn_logit_softcapping"):
        family_of(Gemma2Config())


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: list[tuple[PretrainedConfig, int | None, list[bool]]] = [
    (small(MistralConfig, sliding_window=64), 64, [True, True]),
    (small(MistralConfig, sliding_window=None), None, [False, False]),
    (small(MistralConfig, sliding_window=4096, use_sliding_window=False), None, [False, False]),
    (small(MixtralConfig, sliding_window=64), 64, [True, True]),
    (small(MixtralConfig), None, [False, False]),
    (small(Qwen2Config, sliding_window=64), None, [False, False]),
    (small(Qwen2Config, use_sliding_window=True, sliding_window=64, max_window_layers=1), 64, [False, True]),
    (small(Qwen2Config, use_sliding_window=True, sliding_window=64, max_window_layers=2), None, [False, False]),
    (small(Qwen3Config, use_sliding_window=True, sliding_window=64, max_window_layers=0), 64, [True, True]),
    (small(Qwen3MoeConfig, use_sliding_window=True, sliding_window=64), 64, [True, True]),
    (small(Qwen3MoeConfig, sliding_window=64), None, [False, False]),
    (small(MinistralConfig, sliding_window=64, layer_types=[SLIDING, FULL]), 64, [True, False]),
    (small(Gemma3TextConfig, sliding_window=64, sliding_window_pattern=2), 64, [True, False]),
    (small(Phi3Config, sliding_window=64), 64, [True, True]),
    (
        small(SmolLM3Config, use_sliding_window=True, sliding_window=64, no_rope_layers=[1, 0]),
        64,
        [False, True],
    ),
]


@pytest.mark.parametrize(("hf_config", "window", "layers"), WINDOWS)
def test_which_layers_have_a_window(hf_config: PretrainedConfig, window: int | None, layers: list[bool]) -> None:
    from megatron_solopo.model.hf_config import check_length

    family_of(hf_config)
    assert attention_window(hf_config) == window and windowed_layers(hf_config) == layers
    check_length(hf_config, 256)  # it bounds no length


ON_CUDA: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (dict(), dict(), ["needs --bf16"]),
    (dict(bf16=True, attention_backend="fused"), dict(), ["--attention-backend fused ", "flash or auto"]),
    (
        dict(bf16=True, transformer_impl="transformer_engine"),
        dict(context_parallel_size=2, cp_comm_type="p2p"),
        ["--cp-comm-type p2p ", "use all_gather"],
    ),
]


@pytest.mark.parametrize(("model", "parallel", "named"), ON_CUDA)
def test_a_window_that_no_kernel_of_cuda_computes_is_refused(
    model: dict[str, Any], parallel: dict[str, Any], named: list[str]
) -> None:
    from megatron_solopo.model.hf_config import check_attention_on_cuda

    config = Config(model=ModelConfig(**model), parallel=ParallelConfig(**parallel))
    config.data.seq_length = 64
    hf_config = small(MistralConfig, sliding_window=64)
    check_attention_on_cuda(hf_config, config)  # it hides nothing
    config.data.seq_length = 65
    with refused("attention-unsupported", "sliding_window 64 (config.json): ", *named):
        check_attention_on_cuda(hf_config, config)


@pytest.mark.parametrize("kind", [Glm4Config, Gemma3TextConfig, Gemma4TextConfig, Olmo2Config])
def test_norms_behind_the_parts_are_portable_and_untiled(kind: type[PretrainedConfig]) -> None:
    from megatron_solopo.model.tiles import check_tiles
    from megatron_solopo.model.transformer_engine import check_widths

    with refused("model-portable-only", "--transformer-impl transformer_engine: ", kind.model_type, "use portable"):
        check_widths(small(kind), Config(model=ModelConfig(transformer_impl="transformer_engine")))
    with refused("option-conflict", "--mlp-tiles: ", kind.model_type):
        check_tiles(small(kind), Config(model=ModelConfig(mlp_tiles="2")))


def test_biases_of_experts_are_portable_and_not_cut() -> None:
    from megatron_solopo.model.hf_config import check_biased_experts
    from megatron_solopo.model.transformer_engine import check_widths

    hf_config = small(GptOssConfig)
    with refused("model-portable-only", "--transformer-impl transformer_engine: ", "gpt_oss", "use portable"):
        check_widths(hf_config, Config(model=ModelConfig(transformer_impl="transformer_engine")))
    for parallel in (
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(expert_tensor_parallel_size=2),
    ):
        with refused("layout-biased-experts", "--expert-tensor-parallel-size 2: ", "gpt_oss"):
            check_biased_experts(hf_config, Config(parallel=parallel))
        check_biased_experts(small(MixtralConfig), Config(parallel=parallel))
    two = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1)
    check_biased_experts(hf_config, Config(parallel=two))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (DeepseekV2Config, {"topk_method": "noaux_tc"}),
        (DeepseekV2Config, {"norm_topk_prob": True}),
        (DeepseekV2Config, {"scoring_func": "sigmoid"}),
        (DeepseekV3Config, {"topk_method": "greedy"}),
        (DeepseekV3Config, {"moe_layer_freq": 2}),
        (DeepseekV3Config, {"rope_interleave": False}),
        (DeepseekV3Config, {"num_key_value_heads": 2}),
        (DeepseekV3Config, {"head_dim": 24}),
        (Glm4MoeLiteConfig, {"attention_bias": True}),
        (Glm4MoeLiteConfig, {"first_k_dense_replace": 0}),
    ],
)
def test_latent_attention_and_its_routers_have_one_form_each(
    kind: type[PretrainedConfig], fields: dict[str, Any]
) -> None:
    (name,) = fields
    with refused("model-field-unsupported", f"config.json: {name} = "):
        family_of(small(kind, **fields))


DEEPSEEK_V3 = dict(ep_size=1, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc", seq_aux=True)
DEEPSEEK_V3 |= dict(aux_loss_alpha=0.001, num_nextn_predict_layers=1)


def test_layers_of_multi_token_prediction_follow_the_models_own() -> None:
    """Of a config.json with DeepSeek-V3's fields."""
    hf_config = small(DeepseekV3Config, **DEEPSEEK_V3)
    assert family_of(hf_config).carried(hf_config) == ("model.layers.2.",)


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_latent_attention_is_portable_and_has_no_adapters(kind: type[PretrainedConfig]) -> None:
    from megatron_solopo.conversion.adapters import check_adapters
    from megatron_solopo.model.transformer_engine import check_widths

    with refused("model-portable-only", f"{kind.model_type} have latent attention", "use portable"):
        check_widths(small(kind), Config(model=ModelConfig(transformer_impl="transformer_engine")))
    with refused("adapter-unsupported", "--lora-rank: ", kind.model_type, "latents"):
        check_adapters(ModelConfig(lora_rank=4), small(kind))


@pytest.mark.parametrize("field", [{"swiglu_limit": 10.0}, {"experts_per_token": 3}, {"attention_bias": False}])
def test_fields_that_transformers_does_not_read_have_one_value(field: dict[str, Any]) -> None:
    (name,) = field
    with refused("model-field-unsupported", f"config.json: {name} = "):
        family_of(small(GptOssConfig, **field))
    family_of(small(GptOssConfig, swiglu_limit=7.0, experts_per_token=2, initial_context_length=4096))


def test_adapters_of_shared_experts_are_refused() -> None:
    from megatron_solopo.conversion.adapters import check_adapters

    with refused("adapter-unsupported", "--lora-modules: ", "shared experts", "name q_proj,k_proj,v_proj,o_proj"):
        check_adapters(ModelConfig(lora_rank=4, lora_modules="q_proj,up_proj"), small(Glm4MoeConfig))
    check_adapters(ModelConfig(lora_rank=4), small(Glm4MoeConfig))


def test_shared_experts_are_portable() -> None:
    from megatron_solopo.model.transformer_engine import check_widths

    with refused("model-portable-only", "--transformer-impl transformer_engine: ", "glm4_moe have shared experts"):
        check_widths(small(Glm4MoeConfig), Config(model=ModelConfig(transformer_impl="transformer_engine")))


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_recurrent_layers_are_portable(kind: type[PretrainedConfig]) -> None:
    from megatron_solopo.model.transformer_engine import check_widths

    with refused("model-portable-only", "--transformer-impl transformer_engine: ", kind.model_type, "use portable"):
        check_widths(small(kind), Config(model=ModelConfig(transformer_impl="transformer_engine")))


@pytest.mark.parametrize(
    ("parallel", "option"),
    [
        (ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True), "--tensor-model-parallel-size 4: "),
        (ParallelConfig(context_parallel_size=4), "--context-parallel-size 4: "),
        (ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2), "--context-parallel-size 2: "),
    ],
)
def test_key_heads_that_ranks_cannot_share_are_refused(parallel: ParallelConfig, option: str) -> None:
    from megatron_solopo.parallel.topology import check_layout

    hf_config = small(Qwen3_5TextConfig, num_attention_heads=8, num_key_value_heads=4)
    with refused("layout-not-divisible", option, "linear_num_key_heads"):
        check_layout(hf_config, Config(parallel=parallel), 64, 4)


def test_rope_by_layer_is_not_extended_by_an_option() -> None:
    from megatron_solopo.model.rope_scaling import extended

    with refused("rope-scaling-by-layer", "--rope-scaling yarn:4:256: ", "full_attention"):
        extended(small(Gemma3TextConfig), "yarn:4:256")


@pytest.mark.parametrize("kinds", [["chunked_attention", "full_attention"], ["sliding_attention", "full_attention"]])
def test_layers_of_another_attention_are_refused(kinds: list[str]) -> None:
    with refused("model-field-unsupported", f"config.json: layer_types has '{kinds[0]}'"):
        family_of(small(Qwen2Config, layer_types=kinds))


DEEPSEEK_V2_LITE: dict[str, Any] = dict(hidden_size=2048, intermediate_size=10944, num_hidden_layers=27)
DEEPSEEK_V2_LITE |= dict(num_attention_heads=16, q_lora_rank=None, moe_intermediate_size=1408, num_experts_per_tok=6)
DEEPSEEK_V2_LITE |= dict(first_k_dense_replace=1)

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
    from megatron_solopo.model.hf_config import read_hf_config

    text = (solopo_data / "model_configs" / f"{name}.config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    check_parameters(read_hf_config(tmp_path), PARAMETERS[name])


@pytest.mark.parametrize(
    ("kind", "billions"),
    [
        *[(SmolLM3Config, 3.075), (Phi3Config, 3.821), (Glm4Config, 9.4), (Gemma3TextConfig, None)],
        *[(partial(Gemma4TextConfig, hidden_size_per_layer_input=0, attention_k_eq_v=True), None)],
        *[(Olmo3Config, None), (partial(GptOssConfig, num_hidden_layers=24, num_local_experts=32), 20.915)],
        *[(Qwen3_5TextConfig, None), (Qwen3_5MoeTextConfig, None), (Qwen3NextConfig, None)],
        (partial(DeepseekV2Config, **DEEPSEEK_V2_LITE), 15.706),
        *[
            (partial(DeepseekV3Config, num_hidden_layers=4), None),
            (partial(Glm4MoeLiteConfig, num_hidden_layers=2), None),
        ],
    ],
)
def test_shapes_of_transformers_defaults(
    engine: Any, kind: Callable[[], PretrainedConfig], billions: float | None
) -> None:
    """Those of SmolLM3-3B, Phi-3-mini, GLM-4-9B-0414, gpt-oss-20b and DeepSeek-V2-Lite, whose figures are published;
    DeepSeek-V3 and GLM-4.7-Flash with few layers."""
    check_parameters(kind(), billions)


def test_the_shape_of_glm_4_5_air(engine: Any) -> None:
    """Of the published 106 B, without the layer of multi-token prediction."""
    check_parameters(Glm4MoeConfig(head_dim=128, attention_bias=True), 106.852)


def check_parameters(hf_config: PretrainedConfig, billions: float | None) -> None:
    """Ours and transformers' model, on the meta device: every shape, no memory."""
    from megatron_solopo.conversion.hf import named_entries
    from megatron_solopo.model.build import build_model
    from megatron_solopo.training.parameters import parameter_count

    with torch.device("meta"):
        model = build_model(hf_config, Config(), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices = 1 if hf_config.tie_word_embeddings else 2
    count -= matrices * (model.vocab_size - hf_config.vocab_size) * hf_config.hidden_size
    assert count == parameter_count(hf_config)["total"]
    assert billions is None or round(count / 1e9, 3) == billions
    assert sum(1 for _ in named_entries(model, hf_config)) == len(list(model.parameters()))


def test_the_page_of_families_has_a_row_for_each() -> None:
    """Its figures are measured by `make families-page`; rows, configurations and lines of the files are current."""
    from families_page import PAGE, source_of
    from test_model_parity import CONFIGS

    rows = {
        cells[1]: cells
        for cells in ([cell.strip() for cell in line.split("|")] for line in PAGE.read_text().splitlines())
        if len(cells) > 9
    }
    rows = {name: cells for name, cells in rows.items() if name in FAMILIES}
    assert rows.keys() == FAMILIES.keys()
    for name, cells in rows.items():
        assert int(cells[2]) == sum(config.model_type == name for config in CONFIGS.values())
        source = source_of(name)
        assert cells[9] == f"`{source.name}` {len(source.read_text().splitlines())}"
        assert cells[7] == "bit-equal" and all(
            float(cell) <= bound for cell, bound in zip(cells[3:7], (1e-5, 1e-10, 1e-10, 1e-10), strict=True)
        )
