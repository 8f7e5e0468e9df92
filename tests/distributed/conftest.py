"""One launch with two processes and one with one, each doing everything the tests of this folder look at."""

from __future__ import annotations

import json

import oracle
import pytest
from launches import (
    OPTION_PLANS,
    PLANS,
    SIX_STEPS,
    Launch,
    World,
    common_runs,
    gradient_cases,
    launch,
    token_examples,
    training_run,
)
from methods import LONG, METHODS, SHORT, method_flags, method_roles
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE, WIDE, conversations, preference_groups, write_lines, write_model
from transformers import LlamaConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "llama", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    write_model(folder / "qwen2", Qwen2Config(**SHAPE, tie_word_embeddings=True), seed=2)
    write_model(folder / "wide", LlamaConfig(**WIDE, tie_word_embeddings=False), seed=4)
    write_model(folder / "wide-tied", Qwen2Config(**WIDE, tie_word_embeddings=True), seed=5)
    write_model(folder / "mixtral", MixtralConfig(**SHAPE, **EXPERTS), seed=4)
    write_model(folder / "qwen3_moe", Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE), seed=5)
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
    return World(folder)


@pytest.fixture(scope="session")
def reference(world: World) -> list[dict[str, float]]:
    """Each example's log-prob sums under another model: at the policy the alignment has its kink."""
    return oracle.reference_table(world.model("reference"), token_examples(SHORT + LONG))


@pytest.fixture(scope="session")
def two(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes."""
    out = tmp_path_factory.mktemp("two")
    valid = ["--valid-data", world.folder / "valid.jsonl"]
    return launch(
        2,
        out,
        gradient_cases(world, reference, out, PLANS + OPTION_PLANS),
        [
            *common_runs(world, out),
            training_run(world, out, "unbroken", *SIX_STEPS, *valid),
            training_run(world, out, "resumed", *SIX_STEPS, *valid, load=True, cut=(out / "unbroken", 4)),
            training_run(
                world, out, "same-contexts", "--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-3, data="same"
            ),
            training_run(
                world,
                out,
                "longpo",
                *method_flags(METHODS["longpo long token"]),
                "--reference-cache",
                out / "longpo-reference",
                *("--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-3, "--no-shuffle"),
            ),
            training_run(
                world,
                out,
                "bfloat16",
                "--bf16",
                "--objective",
                "sft",
                "--train-iters",
                20,
                "--global-batch-size",
                6,
                "--lr",
                1e-2,
                data="chats",
            ),
            training_run(
                world, out, "not-finite", "--train-iters", 3, "--lr", 1e30, "--clip-grad", 0, "--lr-warmup-fraction", 0
            ),
        ],
    )


@pytest.fixture(scope="session")
def one(world: World, reference: list, two: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process; it also goes on from a checkpoint of two."""
    out = tmp_path_factory.mktemp("one")
    valid = ["--valid-data", world.folder / "valid.jsonl"]
    return launch(
        1,
        out,
        gradient_cases(world, reference, out, PLANS),
        [
            *common_runs(world, out),
            training_run(world, out, "from-two", *SIX_STEPS, *valid, load=True, cut=(two.folder / "unbroken", 2)),
        ],
    )
