"""Generation in batches against transformers one by one, with tiny random models."""

import json
import random

import pytest
import torch
from answering import one_by_one, random_prompts, write_model
from refusals import refused
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, MistralForCausalLM

from megatron_solopo.data.hf_model import check_reach, load_model, reach
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.evaluation.generation import batches_by_length, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_batches_equal_one_by_one_generation(folder):
    prompts = random_prompts(20)
    expected, lengths = one_by_one(folder, prompts, 12)
    assert min(lengths) < 12 == max(lengths)  # there are finished and cut responses
    model, tokenizer = load_model(folder, "cpu", "auto"), AutoTokenizer.from_pretrained(folder)
    for batch_tokens in (150, 100_000):
        responses = generate(model, tokenizer, prompts, 12, batch_tokens)
        assert [response.text for response in responses] == expected


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_a_response_is_finished_where_it_ended_itself(folder, batch_tokens):
    """The end-of-turn token counts as a new token: with one token less the same response is cut."""
    prompts = random_prompts(20)
    _, lengths = one_by_one(folder, prompts, 12)
    model, tokenizer = load_model(folder, "cpu", "auto"), AutoTokenizer.from_pretrained(folder)
    shortest = min(length for length in lengths if length > 1)
    for limit in (shortest, shortest - 1, 11):
        responses = generate(model, tokenizer, prompts, limit, batch_tokens)
        assert [response.finished for response in responses] == [length <= limit for length in lengths]


@pytest.mark.parametrize("family", ["llama", "sliding window"])
def test_the_log_prob_of_a_gold_answer_is_that_of_one_pass(folder, tmp_path, family):
    """In float64, one by one; a batch has golds of several lengths, and windows shorter than a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if family == "sliding window":
        config = MistralConfig(**{**LlamaConfig.from_pretrained(folder).to_dict(), "sliding_window": 6})
        folder = tmp_path / "windows"
        MistralForCausalLM(config).save_pretrained(folder)
    prompts = random_prompts(12)
    golds = [[7 + number % 5, *range(9, 9 + number % 4)] for number in range(12)]
    model, double = load_model(folder, "cpu", "auto"), load_model(folder, "cpu", "float32").double()
    expected = []
    for prompt, gold in zip(prompts, golds, strict=True):
        log_probs = double(torch.tensor([[*prompt, *gold]])).logits[0].log_softmax(-1)
        expected.append(log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(gold)[:, None]).mean().item())
    plain = generate(model, tokenizer, prompts, 12)
    for batch_tokens in (150, 100_000):
        responses = generate(model, tokenizer, prompts, 12, batch_tokens, golds=golds)
        assert [response.text for response in responses] == [response.text for response in plain]
        assert [response.gold_log_prob for response in responses] == pytest.approx(expected, abs=2e-5)


def test_settings_stored_with_the_checkpoint_do_not_change_the_measurement(folder, tmp_path):
    stored = write_model(
        tmp_path / "stored",
        stored={
            "repetition_penalty": 5.0,
            "do_sample": True,
            "temperature": 2.0,
            "top_k": 3,
            "eos_token_id": 4,
            "pad_token_id": 0,
        },
    )
    prompts = random_prompts(10)
    expected, _ = one_by_one(folder, prompts, 8)
    responses = generate(load_model(stored, "cpu", "auto"), AutoTokenizer.from_pretrained(stored), prompts, 8)
    assert [response.text for response in responses] == expected


def test_stop_tokens_of_the_generation_config_count_too(folder, tmp_path):
    prompts = random_prompts(20)
    free, _ = one_by_one(folder, prompts, 8)
    word = next(text.split()[1] for text in free if len(text.split()) > 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(word)
    stored = write_model(tmp_path / "stops", stored={"eos_token_id": [4, stop], "pad_token_id": 0})
    responses = generate(load_model(stored, "cpu", "auto"), tokenizer, prompts, 8)
    assert [response.text for response in responses] == [
        " ".join(text.split()[: text.split().index(word)]) if word in text.split() else text for text in free
    ]
    assert any(word in text.split() for text in free)


def test_batches_hold_every_prompt_once_within_the_budget():
    rng = random.Random(2)
    lengths = [rng.randint(1, 300) for _ in range(500)] + [5000]
    batches = batches_by_length(lengths, 16, 2000)
    assert sorted(index for batch in batches for index in batch) == list(range(501))
    assert batches[0] == [500]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) * (max(lengths[index] for index in batch) + 16) <= 2000
    # A batch is only closed when its successor's first prompt does not fit.
    assert all((len(a) + 1) * (lengths[a[0]] + 16) > 2000 for a in batches[:-1])


def test_reach_counts_yarn(tmp_path):
    for scaling, expected in (
        (None, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}, 64),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "rope_scaling": scaling}))
        assert reach(tmp_path) == expected
    check_reach(tmp_path, 56, 8, "--document")
    with refused("prompt-beyond-positions", "--document: ", "57 tokens", "max_position_embeddings 64"):
        check_reach(tmp_path, 57, 8, "--document")


def test_a_padding_token_that_the_model_does_not_know_changes_nothing(folder):
    """As [PAD] behind Llama 2's 32,000 rows."""
    model, tokenizer = load_model(str(folder), "cpu", "float32"), load_tokenizer(folder)
    prompts = random_prompts(6)
    expected = generate(model, tokenizer, prompts, 8, 10_000)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert generate(model, tokenizer, prompts, 8, 10_000) == expected


def test_a_tokenizer_of_another_model_is_refused(folder):
    with refused("token-beyond-vocabulary", "token id 55 ", "55 embeddings", "tiny"):
        generate(load_model(folder, "cpu", "auto"), AutoTokenizer.from_pretrained(folder), [[5, 55]], 2)
