"""Responses that a chat template writes otherwise, or not at all, are kept, and sampling continues."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.sampling.prompts import Prompt
from megatron_solopo.data.sampling.sampled import Statistics, from_ids, from_texts
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids
from megatron_solopo.data.text.tokenizer import encode

# As DeepSeek-R1's: an answer loses its thought.
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if m.role == 'assistant' else "
    "m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT, ANSWER = "<think>\nIt is Paris.\n</think>", "\nAnswer: Paris"


@pytest.fixture(scope="module")
def tokenizer(solopo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    template = tmp_path_factory.mktemp("template") / "r1.jinja"
    template.write_text(R1)
    return load_tokenizer(solopo_data / "tokenizers" / "qwen2", template)


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    messages = [{"role": "user", "content": "Capital?"}]
    return Prompt("q1", messages, prompt_ids(tokenizer, messages))


def test_a_response_of_a_thought_alone_is_kept(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    texts = [THOUGHT, THOUGHT + ANSWER, "Answer: Rome"]
    bodies = [encode(tokenizer, text) for text in texts]
    counts = Statistics()
    sampled = [[*body, tokenizer.eos_token_id] for body in bodies]
    responses = from_ids(tokenizer, prompt, sampled, [True] * 3, [tokenizer.eos_token_id], counts)
    assert responses.responses == texts and responses.token_ids is None
    assert (counts.responses, counts.mismatches, counts.tokens) == (3, 0, sum(map(len, sampled)))
    counts = Statistics()
    assert from_texts(tokenizer, prompt, texts, [True] * 3, sum(map(len, sampled)), counts).responses == texts
    assert (counts.responses, counts.mismatches, counts.empty) == (3, 0, 0)


def test_a_response_that_spells_the_end_of_turn_is_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    """So its ids need not be kept; those of other pieces are."""
    bodies = [encode(tokenizer, "<|im_end|> is a token"), encode(tokenizer, "<|i") + encode(tokenizer, "m_end|>")]
    counts = Statistics()
    sampled = [[*body, tokenizer.eos_token_id] for body in bodies]
    responses = from_ids(tokenizer, prompt, sampled, [True] * 2, [tokenizer.eos_token_id], counts)
    assert responses.responses == ["<|im_end|> is a token", "<|im_end|>"]
    assert responses.token_ids == [None, bodies[1]] and counts.mismatches == 1
