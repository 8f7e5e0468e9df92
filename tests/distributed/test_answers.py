"""--eval-generate: the model in training answers as transformers' greedy decoding of its exported folder, on every
layout."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from launches import Launch, World, launch, training_run
from methods import METHODS, method_flags
from tiny_models import preference_groups, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYOUTS: dict[str, tuple[Any, ...]] = {
    "data": (),
    "overlap": ("--overlap-grad-reduce", "--overlap-param-gather"),
    "separate prompts": ("--no-share-prompts", "--max-tokens-per-rank", 160, "--seq-length", 160),
    "tensor": ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--hf-path", "wide"),
    "context": ("--context-parallel-size", 2),
    "pipeline": ("--pipeline-model-parallel-size", 2, "--hf-path", "tied-4"),
    "virtual": (
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2, "--hf-path", "llama-4"),
    ),
    "expert": ("--expert-model-parallel-size", 2, "--hf-path", "qwen3_moe"),
    "lora": ("--lora-rank", 4),
}
"""Of two processes."""

NEW_TOKENS = 6


def held_out(count: int = 5) -> list[dict[str, Any]]:
    """Contexts of questions; their prompts have very different lengths."""
    records = []
    for number, group in enumerate(preference_groups(count, seed=21)):
        asked = {"id": f"q{number}", "question": f"w{number}", "answers": [f"w{number + 1}", "w0"]}
        records.append(asked | {name: group[name] for name in ("short_messages", "long_messages")})
    return [record | {"short_tokens": 1, "long_tokens": 2} for record in records]


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    out = tmp_path_factory.mktemp("two")
    questions = write_lines(out / "held-out.jsonl", held_out())
    steps = ("--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-2, "--eval-interval", 1)
    runs = []
    for name, layout in LAYOUTS.items():
        flags = [world.model(layout[i]) if layout[i - 1] == "--hf-path" else layout[i] for i in range(len(layout))]
        options = (*method_flags(METHODS["orpo"]), *steps, "--eval-generate", questions)
        more = ("--eval-max-new-tokens", NEW_TOKENS, "--save-hf-interval", 1)
        runs.append(training_run(world, out, name, *options, *more, *flags))
    return launch(2, out, [], runs)


def greedy(folder: Any, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """The answer of transformers alone, and whether it ended."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.convert_tokens_to_ids("<end>"), *(configured if isinstance(configured, list) else [configured])}
    ids: list[int] = []
    with torch.no_grad():
        while len(ids) < NEW_TOKENS and not ends & {*ids}:
            ids.append(int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
    finished = bool(ends & {*ids})
    return tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True), finished


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_greedy_decoding_of_the_exported_model(two: Launch, world: World, layout: str) -> None:
    """Before the first step without drafts, after each step with the earlier answers as drafts."""
    assert two.results[layout] == "done"
    flags = LAYOUTS[layout]
    start = world.model(flags[flags.index("--hf-path") + 1] if "--hf-path" in flags else "llama")
    hf = two.folder / f"{layout}-hf"
    answered = []
    for step, folder in enumerate((start, hf / "iter_0000001", hf)):
        path = two.folder / layout / "answers" / f"step_{step:07d}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(record["id"], record["length"]) for record in records] == [
            (f"q{number}", length) for number in range(5) for length in ("short", "long")
        ]
        chats = [question[f"{length}_messages"] for question in held_out() for length in ("short", "long")]
        expected = [greedy(folder, chat) for chat in chats]
        assert [(record["prediction"], record["finished"]) for record in records] == expected
        answered.append(expected)
    assert answered[0] != answered[2]  # training changed some answers, so drafts were wrong there
    lines = two.metrics(layout, "generate")
    assert [line["step"] for line in lines] == [0, 1, 2] and {line["answers"] for line in lines} == {10}
    assert lines[2]["answers_cut"] == sum(not finished for _, finished in answered[2])
