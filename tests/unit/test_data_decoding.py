"""Decoding against transformers without a cache, and draws against the softmax."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from sampling_models import END, FAMILIES, SIZES, WORDS, tiny_model
from transformers import BloomConfig, LlamaConfig, PreTrainedModel

from megatron_solopo.data.sampling.decoding import decode, decode_by_generate, shares_prompts
from megatron_solopo.data.sampling.sampler import choose, uniforms


def oracle_choice(logits: torch.Tensor, uniform: float, temperature: float, top_p: float) -> int:
    """One token by hand in float64: walk the tokens until their probabilities exceed the uniform number."""
    scores = logits.double().numpy() / temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable") if top_p < 1 else np.arange(len(probabilities))
    kept, mass = [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    walked = 0.0
    for token in kept:
        walked += probabilities[token] / mass
        if walked > uniform:
            return int(token)
    return int(kept[-1])


def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    numbers: torch.Tensor,
    *,
    rows: int = 64,
    decoder: Any = decode,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stops: tuple[int, ...] = (END, 20),
) -> list[list[list[int]]]:
    draw = functools.partial(choose, temperature=temperature, top_p=top_p)
    jobs = zip(prompts, numbers, strict=True)
    return [samples for _, samples in sorted(decoder(model, jobs, rows=rows, draw=draw, stops=set(stops)))]


PROMPTS = [[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [10], [11, 12, 13]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8)])
def test_every_token_is_drawn_from_the_model_without_a_cache(family: str, temperature: float, top_p: float) -> None:
    """Fewer rows than samples, so that samples of unequal length share them, also beyond a sliding window; each token
    is checked on a full forward pass of that sequence alone."""
    model = tiny_model(family)
    assert shares_prompts(model)
    numbers = torch.stack([uniforms(3, f"q{index}", 7, 12) for index in range(3)])
    sampled = sample(model, PROMPTS, numbers, rows=5, temperature=temperature, top_p=top_p)
    ended = 0
    for question, (prompt, responses) in enumerate(zip(PROMPTS, sampled, strict=True)):
        assert len(responses) == 7
        for number, response in enumerate(responses):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0]
            for step, token in enumerate(response):
                uniform = float(numbers[question, number, step])
                assert token == oracle_choice(logits[len(prompt) + step - 1], uniform, temperature, top_p)
            stops = [step for step, token in enumerate(response) if token in (END, 20)]
            assert stops in ([], [len(response) - 1])
            assert stops or len(response) == 12
            ended += bool(stops)
    assert ended, "no sample met a stop token, so the case is not covered"


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_zero_is_transformers_greedy(family: str) -> None:
    """With more tokens than a sample's first buffer of keys has room for."""
    model = tiny_model(family)
    sampled = sample(model, PROMPTS, torch.rand(3, 2, 70, dtype=torch.float64), rows=4, temperature=0, stops=(END,))
    for prompt, responses in zip(PROMPTS, sampled, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, do_sample=False, max_new_tokens=70, repetition_penalty=1.0)
        assert responses == [expected[0, len(prompt) :].tolist()] * 2


def test_a_response_depends_only_on_its_random_numbers() -> None:
    """Not on the rows, not on its company, not on which of its prompt's samples are there already."""
    model = tiny_model()
    numbers = torch.stack([uniforms(3, f"q{index}", 9, 40) for index in range(3)])
    together = sample(model, PROMPTS, numbers)
    for rows in (1, 2, 7, 20):
        assert sample(model, PROMPTS, numbers, rows=rows) == together
    assert sample(model, PROMPTS[1:2], numbers[1:2, 4:]) == [together[1][4:]]
    assert uniforms(3, "q0", 4, 40).equal(numbers[0, :4])


def test_models_whose_attention_is_not_known_are_sampled_through_generate() -> None:
    """Attention with a bias by distance: the same draws, one by one."""
    model = tiny_model(config=BloomConfig(vocab_size=len(WORDS), hidden_size=32, n_layer=2, n_head=4, eos_token_id=END))
    assert not shares_prompts(model)
    settings = model.generation_config
    numbers = torch.stack([uniforms(3, f"q{index}", 5, 9) for index in range(3)])
    sampled = sample(model, PROMPTS, numbers, decoder=decode_by_generate, rows=2)
    for question, (prompt, responses) in enumerate(zip(PROMPTS, sampled, strict=True)):
        for number, response in enumerate(responses):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0]
            chosen = [
                oracle_choice(logits[len(prompt) + step - 1], float(numbers[question, number, step]), 1.0, 1.0)
                for step in range(len(response))
            ]
            assert response == chosen and (response[-1] in (END, 20) or len(response) == 9)
    assert model.generation_config is settings
    llama = tiny_model()
    assert sample(llama, PROMPTS, numbers, decoder=decode_by_generate) == sample(llama, PROMPTS, numbers)


def test_the_first_two_tokens_follow_the_softmax() -> None:
    """20,000 samples against the joint probabilities: chi-squared, p = 0.001 by its normal approximation."""
    model = tiny_model(config=LlamaConfig(**(SIZES | {"vocab_size": 8, "hidden_size": 16, "pad_token_id": None})))
    prompt, count, temperature = [4, 5, 6], 20_000, 2.0
    numbers = uniforms(7, "q", count, 2)
    [sampled] = sample(model, [prompt], numbers[None], rows=5000, temperature=temperature, stops=(-1,))
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)
        after = model(torch.tensor([[*prompt, token] for token in range(8)])).logits[:, -1].double()
        joint = (first[:, None] * torch.softmax(after / temperature, -1)).flatten()
    pairs = torch.tensor(sampled)
    draws = (pairs[:, 0] * 8 + pairs[:, 1]).bincount(minlength=64).double()
    expected = joint * count
    assert expected.min() > 5, "too few draws of a pair for the test"
    assert ((draws - expected) ** 2 / expected).sum() < 63 + 3.1 * (2 * 63) ** 0.5


def test_the_prompts_keys_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of samples, what is kept for each is as long as its tokens."""
    from megatron_solopo.data.sampling import decoding

    prompts: list[Any] = []
    tables: list[Any] = []

    class WatchedPrompt(decoding._Prompt):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            prompts.append(self)

    class WatchedRows(decoding._Rows):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            tables.append(self)

    monkeypatch.setattr(decoding, "_Prompt", WatchedPrompt)
    monkeypatch.setattr(decoding, "_Rows", WatchedRows)
    list(decode(tiny_model(), [(list(range(4, 36)) * 3, uniforms(0, "q", 30, 3))], rows=30, draw=draw_end, stops={-1}))
    [prompt], [rows] = prompts, tables
    assert [tuple(part.shape) for parts in prompt.states for part in parts] == [(1, 2, 96, 8)] * 4
    assert [tuple(part.shape) for parts in rows.states.values() for part in parts] == [(30, 2, 32, 8)] * 4


def draw_end(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def test_frequencies_follow_the_softmax() -> None:
    """200,000 draws over 5 tokens, one impossible: chi-squared with 3 degrees of freedom, p = 0.001."""
    logits = torch.tensor([0.5, -1.0, 2.0, float("-inf"), 0.0])
    draws = (
        choose(logits.expand(200_000, -1), uniforms(0, "q", 200_000, 1)[:, 0], 0.85, 1.0).bincount(minlength=5).double()
    )
    expected = torch.softmax(logits.double() / 0.85, 0) * 200_000
    assert draws[3] == 0
    possible = expected > 0
    assert ((draws - expected)[possible] ** 2 / expected[possible]).sum() < 16.3


def test_extreme_uniforms_never_choose_the_impossible() -> None:
    logits = torch.full((2, 6), float("-inf"))
    logits[:, 2:4] = torch.tensor([0.0, -3.0])
    assert choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0).tolist() == [2, 3]
    assert choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 0.9).tolist() == [2, 2]
