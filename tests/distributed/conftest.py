"""Models, data and the oracle's results that all launches of this folder use."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest
from launches import BATCHES, World, token_examples
from methods import LONG, METHODS, SHORT, method_roles
from tiny_models import (
    EXPERTS,
    LATENT,
    QWEN3_MOE,
    RECURRENT,
    SHAPE,
    WIDE,
    conversations,
    in_paragraphs,
    preference_groups,
    write_lines,
    write_model,
)
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "llama", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    write_model(folder / "qwen2", Qwen2Config(**SHAPE, tie_word_embeddings=True), seed=2)
    write_model(folder / "wide", LlamaConfig(**WIDE, tie_word_embeddings=False), seed=4)
    write_model(folder / "wide-tied", Qwen2Config(**WIDE, tie_word_embeddings=True), seed=5)
    write_model(folder / "wide-qwen3", Qwen3Config(**WIDE, head_dim=16, tie_word_embeddings=False), seed=6)
    mistral = MistralConfig(**WIDE, head_dim=12, sliding_window=None, tie_word_embeddings=False)
    write_model(folder / "wide-mistral", mistral, seed=7)
    write_model(folder / "mixtral", MixtralConfig(**SHAPE, **EXPERTS), seed=4)
    write_model(folder / "qwen3_moe", Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE), seed=5)
    glm4_moe = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, n_group=2)
    glm4_moe |= dict(attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5, pad_token_id=None)
    write_model(folder / "glm4_moe", Glm4MoeConfig(**SHAPE, **glm4_moe), seed=12)
    windows = dict(use_sliding_window=True, sliding_window=9)
    write_model(folder / "windows_moe", Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE, **windows), seed=13)
    by_layer = dict(sliding_window=9, layer_types=["sliding_attention", "full_attention"])
    gemma3 = Gemma3TextConfig(**SHAPE, **by_layer, head_dim=16, query_pre_attn_scalar=20, pad_token_id=None)
    write_model(folder / "gemma3", gemma3, seed=8)
    gemma4 = dict(hidden_size_per_layer_input=0, attention_k_eq_v=True, final_logit_softcapping=1.5)
    gemma4 |= dict(head_dim=16, global_head_dim=24, pad_token_id=None)
    write_model(folder / "gemma4", Gemma4TextConfig(**SHAPE, **by_layer, **gemma4), seed=20)
    write_model(folder / "glm4", Glm4Config(**SHAPE, head_dim=16, pad_token_id=None), seed=9)
    write_model(folder / "phi3", Phi3Config(**SHAPE, sliding_window=7, pad_token_id=None), seed=10)
    olmo3 = Olmo3Config(**SHAPE, **by_layer, pad_token_id=None)
    write_model(folder / "olmo3", olmo3, seed=11)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    smollm3 = SmolLM3Config(**SHAPE, no_rope_layers=[1, 0], pad_token_id=None)
    write_model(folder / "smollm3", smollm3, seed=16)
    scaled = yarn | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
    scaled["original_max_position_embeddings"] = 16  # queries grow within these prompts
    ministral3 = Ministral3Config(**SHAPE, rope_parameters=scaled, head_dim=16, pad_token_id=None)
    write_model(folder / "ministral3", ministral3, seed=17)
    rope = dict(rope_parameters=yarn | {"truncate": False})
    gpt_oss = GptOssConfig(**SHAPE, **EXPERTS, **by_layer, **rope, head_dim=16, pad_token_id=None)
    write_model(folder / "gpt_oss", gpt_oss, seed=12)
    write_model(folder / "qwen3_5", Qwen3_5TextConfig(**SHAPE, **RECURRENT), seed=13)
    shared = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    write_model(folder / "qwen3_next", Qwen3NextConfig(**SHAPE, **RECURRENT, **shared), seed=14)
    write_model(folder / "qwen3_5_moe", Qwen3_5MoeTextConfig(**SHAPE, **RECURRENT, **shared), seed=18)
    latent = SHAPE | LATENT | dict(n_group=2, topk_group=1, first_k_dense_replace=1)
    rope = dict(rope_parameters=yarn | {"mscale": 0.7, "mscale_all_dim": 0.8})
    write_model(folder / "deepseek_v3", DeepseekV3Config(**latent, **rope), seed=15)
    lite = latent | dict(q_lora_rank=None, topk_method="group_limited_greedy")
    write_model(folder / "deepseek_v2", DeepseekV2Config(**lite, **rope), seed=19)
    write_model(folder / "reference", LlamaConfig(**SHAPE, tie_word_embeddings=False), seed=3)
    deep = SHAPE | {"num_hidden_layers": 4}
    write_model(folder / "llama-4", LlamaConfig(**deep, tie_word_embeddings=False), seed=4)
    write_model(folder / "qwen2-4", Qwen2Config(**deep, tie_word_embeddings=True), seed=5)
    write_model(folder / "tied-4", LlamaConfig(**deep, tie_word_embeddings=True), seed=6)
    for roles in {method_roles(method) for method in METHODS.values()}:
        World(folder).examples(roles).write_text(json.dumps(token_examples(roles)))
    write_lines(folder / "groups.jsonl", preference_groups(11))
    write_lines(folder / "valid.jsonl", preference_groups(5, seed=9))
    write_lines(folder / "same.jsonl", preference_groups(8, long_is_short=True))
    write_lines(folder / "chats.jsonl", conversations(11))
    write_lines(folder / "paragraphs.jsonl", in_paragraphs(preference_groups(11)))
    return World(folder)


@pytest.fixture(scope="session")
def reference(world: World) -> list[dict[str, float]]:
    """Each example's log-prob sums under another model: at the policy the alignment has its kink."""
    return oracle.reference_table(world.model("reference"), token_examples(SHORT + LONG))


@pytest.fixture(scope="session")
def expected(world: World, reference: list) -> Any:
    """(model, method, batch) -> the oracle's losses and gradient."""
    examples = {kind: token_examples(roles) for kind, roles in (("sft", ("response",)), ("preference", SHORT + LONG))}
    scores: dict[tuple[str, str], list[oracle.Scores]] = {}

    def of(model: str, method: str, batch: str) -> Any:
        kind = METHODS[method]["objective"]
        if (model, kind) not in scores:
            scores[model, kind] = oracle.scores(world.model(model), examples[kind])
        chosen = [scores[model, kind][i] for i in BATCHES[batch]]
        return oracle.batch(chosen, [reference[i] for i in BATCHES[batch]], METHODS[method])

    return of
