"""Sampling against transformers without a cache, and a run killed with SIGKILL against one that was not."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from option_lines import last_wins
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo.data.sampling.decoding import decode, decode_by_generate, shares_prompts
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import PartialFile, Responses, read_responses
from megatron_solopo.data.sampling.sample_responses import main
from megatron_solopo.data.sampling.sampled import Statistics, from_ids
from megatron_solopo.data.sampling.sampler import choose, uniforms
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.errors import UserError

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *(f"w{index}" for index in range(36))]
END = 1
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": 0,
}


EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True),
}


def tiny_model(family: str = "llama", config: PretrainedConfig | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config or FAMILIES[family]
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    # Hidden defaults of a real model's generation_config must not reach the samples.
    model.generation_config.repetition_penalty = 1.7
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny model, and a contexts file of 40 questions beside it."""
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", extra_special_tokens=["<user>", "<assistant>"]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(path)
    tiny_model().save_pretrained(path)
    with (path / "contexts.jsonl").open("w", encoding="utf-8") as out:
        for index in range(40):
            chat = [{"role": "user", "content": " ".join(f"w{(index * 7 + k) % 36}" for k in range(3 + index % 5))}]
            out.write(
                json.dumps(
                    {
                        "id": f"q{index}",
                        "question": "?",
                        "answers": ["w1"],
                        "short_messages": chat,
                        "long_messages": chat * 2,
                        "short_tokens": 5,
                        "long_tokens": 9,
                        "source": "test",
                    }
                )
                + "\n"
            )
    return path


def command(folder: Path, output: Path, *more: str) -> list[str]:
    given = [
        "--model",
        str(folder),
        "--contexts",
        str(folder / "contexts.jsonl"),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--samples",
        "6",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "12",
        *more,
    ]
    return last_wins(given)


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
    is checked on a full forward pass of its own sequence."""
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


def test_a_response_depends_on_its_own_numbers_only() -> None:
    """Not on the rows, not on its company, not on which of its prompt's samples are there already."""
    model = tiny_model()
    numbers = torch.stack([uniforms(3, f"q{index}", 9, 40) for index in range(3)])
    whole = sample(model, PROMPTS, numbers)
    for rows in (1, 2, 7, 20):
        assert sample(model, PROMPTS, numbers, rows=rows) == whole
    assert sample(model, PROMPTS[1:2], numbers[1:2, 4:]) == [whole[1][4:]]
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
    """However many samples: what is kept for each is as long as its own tokens."""
    from megatron_solopo.data.sampling import decoding

    made: list[Any] = []

    class Watched(decoding._Group):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(decoding, "_Group", Watched)
    list(decode(tiny_model(), [(list(range(4, 36)) * 3, uniforms(0, "q", 30, 3))], rows=30, draw=draw_end, stops={-1}))
    [group] = made
    keys = [part for parts in group.prompt for part in parts]
    assert [tuple(part.shape) for part in keys] == [(2, 96, 8)] * 4
    assert all(part.shape[2] <= 32 for parts in group.own for part in parts)


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


def test_responses_do_not_depend_on_batch_size_or_limit(folder: Path, tmp_path: Path) -> None:
    assert main(command(folder, tmp_path / "a.jsonl")) == 0
    assert main(command(folder, tmp_path / "b.jsonl", "--batch-size", "4")) == 0  # fewer rows than samples
    assert main(command(folder, tmp_path / "c.jsonl", "--batch-size", "500", "--limit", "9")) == 0
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{index}" for index in range(40)]
    assert (tmp_path / "b.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines[:9]
    assert not list(tmp_path.glob("*.partial"))


def test_texts_and_marks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(folder, tmp_path / "a.jsonl", "--seed", "5"))
    records = list(read_responses(tmp_path / "a.jsonl"))
    assert all(len(record.responses) == len(record.finished) == 6 for record in records)
    assert not any("<end>" in text for record in records for text in record.responses)
    unfinished = sum(not end for record in records for end in record.finished)
    assert 0 < unfinished < 240
    assert all(
        len(text.split()) < 8
        for record in records
        for text, end in zip(record.responses, record.finished, strict=True)
        if end
    )
    assert f"unfinished after 8 tokens: {unfinished};" in capsys.readouterr().out
    main(command(folder, tmp_path / "b.jsonl", "--seed", "6"))
    assert (tmp_path / "a.jsonl").read_text() != (tmp_path / "b.jsonl").read_text()


def test_the_token_that_ended_a_response_is_not_in_its_text(folder: Path) -> None:
    """Also when it is a plain word that generation_config names, and only the last one."""
    counts = Statistics()
    tokenizer = load_tokenizer(folder)
    prompt = Prompt("q", [{"role": "user", "content": "w9"}], [2, 13, END, 3])
    sampled = [[4, 5, 20], [4, END], [20], [4, 5, 6]]
    responses = from_ids(tokenizer, prompt, sampled, [True, True, True, False], {END, 20}, counts)
    assert responses.responses == ["w0 w1", "w0", "", "w0 w1 w2"]
    assert responses.finished == [True, True, True, False]
    assert counts == Statistics(responses=4, tokens=9, unfinished=1, empty=1, mismatches=0)
    assert responses.token_ids is None
    responses = from_ids(tokenizer, prompt, [[4, END], [4, 2, 5, END]], [True, True], {END}, counts)
    assert responses.responses == ["w0", "w0 w1"]
    assert responses.token_ids == [None, [4, 2, 5]] and counts.mismatches == 1  # <user> is not in the text


def test_a_killed_run_resumes_without_loss_or_repetition(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(folder, tmp_path / "whole.jsonl", "--samples", "12"))
    output = tmp_path / "killed.jsonl"
    arguments = command(folder, output, "--samples", "12")
    partial = Path(f"{output}.partial")
    code = (
        "import sys, time\n"
        "from megatron_solopo.data.sampling import sample_responses as command, sampler as s\n"
        "fast = s.decode\n"
        "def slow(*a, **k):\n    for one in fast(*a, **k):\n        time.sleep(0.1)\n        yield one\n"
        "s.decode = slow\n"  # so that the kill falls in the middle
        "command.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = partial.read_bytes()
    assert 5 <= written.count(b"\n") < 41 and not output.exists()
    partial.write_bytes(written + written.splitlines()[2][:30])  # a line that the kill cut
    capsys.readouterr()
    main(arguments)
    done = written.count(b"\n") - 1  # the first line holds the settings
    printed = capsys.readouterr().out
    assert (
        f"resuming: {done * 12} of 480 responses" in printed and f"sampled now: {(40 - done) * 12} responses" in printed
    )
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_a_full_disk_is_one_line_and_keeps_what_is_whole(tmp_path: Path) -> None:
    """The limit falls into a line, which goes at once; one that a kill cut goes at the next start."""
    output = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PartialFile(output, {"seed": 1}) as partial:
        partial.add(Responses("q0", ["w1"] * 5, [True] * 5))
        size = partial.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(UserError, match=r"partial: the disk is full; make room and repeat the command"):
                partial.add(Responses("q1", ["w1"], [True]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "q1" not in partial
        partial.add(Responses("q2", ["w2"], [True]))  # the answer to another request, which finds room
        more = partial.path.stat().st_size
        with partial.path.open("ab") as file:
            file.write(b'{"first": 0, "id": "q3", "resp')
    assert more > size
    with PartialFile(output, {"seed": 1}) as partial:
        assert partial.path.stat().st_size == more
        assert [name for name in ("q0", "q1", "q2", "q3") if name in partial] == ["q0", "q2"]


def test_responses_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    output, text = tmp_path / "a.jsonl", "w" * 50_000
    tracemalloc.start()
    try:
        with PartialFile(output, {}) as partial:
            for number in range(200):
                partial.add(Responses(f"q{number}", [text], [True]))
        with PartialFile(output, {}) as partial:
            partial.finish([f"q{number}" for number in range(200)], 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output.stat().st_size > 200 * len(text) > 10 * peak


def test_prompts_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    def prompt(number: int) -> Prompt:
        return Prompt(f"q{number}", [{"role": "user", "content": "w" * 20_000}], np.arange(number, 4000).tolist())

    tracemalloc.start()
    try:
        prompts = Prompts(tmp_path / "new", map(prompt, range(200)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200 * 1000 and not list((tmp_path / "new").iterdir())
    assert len(prompts) == 200 and list(prompts.lengths) == list(range(4000, 3800, -1))
    found = prompts[7]
    assert (found.id, found.messages, list(found.ids)) == (prompt(7).id, prompt(7).messages, prompt(7).ids)
    assert [one.id for one in prompts] == prompts.names == [f"q{number}" for number in range(200)]


def test_parts_of_a_question_are_joined_in_order(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with PartialFile(output, {}) as partial:
        partial.add(Responses("q", ["c"], [False]), 2)
        partial.add(Responses("q", ["a", "b"], [True, True], [None, [7]]), 0)
        assert partial.missing("q", 5) == [3, 4] and partial.missing("other", 2) == [0, 1]
    with PartialFile(output, {}) as partial:
        assert partial.missing("q", 5) == [3, 4]
        partial.finish(["q"], 3)
    [record] = read_responses(output)
    assert record == Responses("q", ["a", "b", "c"], [True, True, False], [None, [7], None])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_ids", [[1]], "the field 'token_ids' must be a list as long as 'responses' (2)"),
        ("token_ids", [[1], []], "the field 'token_ids[1]' must be a non-empty list of token ids"),
        ("token_ids", [[1], [-1]], "the field 'token_ids[1]' must be a non-empty list of token ids"),
        ("finished", [True, "false"], "the field 'finished' must be a list of true and false"),
        ("finished", [True], "the field 'finished' must be a list as long as 'responses' (2)"),
        ("responses", ["a", 1], "the field 'responses' must be a list of texts"),
    ],
)
def test_malformed_responses_are_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "q", "responses": ["a", "b"], field: value}) + "\n")
    with pytest.raises(UserError) as error:
        list(read_responses(path))
    assert str(error.value) == f"{path}:1: {message}"


def test_a_partial_file_of_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    main(command(folder, output))
    partial = Path(f"{output}.partial")
    header, sampled = {"settings": {"temperature": 0.3}}, {"first": 0, "id": "q", "responses": ["a"]}
    partial.write_text(json.dumps(header) + "\n" + json.dumps(sampled) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl\.partial: begun with .* delete it to start again"):
        main(command(folder, output, "--overwrite"))


def test_another_tokenizer_is_refused_on_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same template, same stops, other words: ids of the first half would be another tokenizer's."""
    output, other = tmp_path / "a.jsonl", tmp_path / "other"

    def stop(*_: object) -> None:
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "finish", stop)
        with pytest.raises(UserError, match="stopped"):
            main(command(folder, output, "--limit", "1"))
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"w35"', '"v35"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"partial: begun with tokenizer\.tokenizer\.json = "):
        main(command(folder, output, "--limit", "1", "--tokenizer", str(other)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--max-new-tokens", "125"], "go beyond the max_position_embeddings 128"),
        (["--model", "nowhere", "--tokenizer", "FOLDER"], "--model nowhere: no such folder"),
        (["--contexts", "nowhere"], "nowhere: no such file"),
    ],
)
def test_wrong_input_is_one_line(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    more = [str(folder) if argument == "FOLDER" else argument for argument in more]
    with pytest.raises(UserError) as error:
        main(command(folder, tmp_path / "a.jsonl", *more))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_complete_output_without_its_settings_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl\.settings\.json is not there or is another file's.*--overwrite"):
        main(command(folder, tmp_path / "a.jsonl"))
    assert (tmp_path / "a.jsonl").read_text() == "{}\n" and not (tmp_path / "a.jsonl.partial").exists()
    main(command(folder, tmp_path / "a.jsonl", "--overwrite"))
    assert len(list(read_responses(tmp_path / "a.jsonl"))) == 40


def test_a_complete_output_is_extended_and_never_cut(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(folder, tmp_path / "whole.jsonl", "--samples", "9"))
    output = tmp_path / "a.jsonl"
    main(command(folder, output, "--samples", "4", "--limit", "5"))
    settings = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert settings["settings"]["temperature"] == 0.85 and settings["bytes"] == output.stat().st_size
    capsys.readouterr()
    for samples, limit, new in (("4", "12", 28), ("9", "12", 60), ("2", "3", 0), ("9", "40", 252)):
        before = output.read_bytes()
        main(command(folder, output, "--samples", samples, "--limit", limit))
        printed = capsys.readouterr().out
        if new:
            assert f"sampled now: {new} responses" in printed
        else:
            assert "holds 2 responses to each of 3 questions already" in printed and output.read_bytes() == before
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.jsonl", "a.jsonl.settings.json"]
    with pytest.raises(
        UserError, match=r"a\.jsonl: was sampled with seed = 0, now 1; give another name, or --overwrite"
    ):
        main(command(folder, output, "--seed", "1", "--samples", "10"))
    main(command(folder, output, "--seed", "1", "--overwrite", "--samples", "1"))
    assert [len(record.responses) for record in read_responses(output)] == [1] * 40


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, after: int, arguments: list[str]) -> None:
    """Runs the command until the call of a method of `PartialFile` after so many."""
    calls, method = [0], getattr(PartialFile, name)

    def stop(self: PartialFile, *more: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return method(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, name, stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)


@pytest.mark.parametrize(("first", "then"), [((8, 9), (5, 40)), ((5, 40), (8, 9)), ((8, 40), (5, 9))])
def test_an_unfinished_output_is_finished_with_more_or_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[int, int], then: tuple[int, int]
) -> None:
    """And what lies beyond a smaller request stays for a larger one."""
    main(command(folder, tmp_path / "whole.jsonl", "--samples", "8"))
    whole = [record.responses for record in read_responses(tmp_path / "whole.jsonl")]
    output = tmp_path / "a.jsonl"

    def asked(samples: int, limit: int) -> list[str]:
        return command(folder, output, "--samples", str(samples), "--limit", str(limit))

    interrupted(monkeypatch, "add", 6, asked(*first))
    main(asked(*then))
    samples, limit = then
    assert [record.responses for record in read_responses(output)] == [one[:samples] for one in whole[:limit]]
    main(asked(8, 40))
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.partial").exists()


@pytest.mark.parametrize(("name", "after"), [("add", 3), ("add", 12), ("finish", 0), ("extend", 0)])
def test_an_extension_that_is_killed_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    output = tmp_path / "a.jsonl"
    main(command(folder, tmp_path / "whole.jsonl", "--limit", "20"))
    main(command(folder, output, "--limit", "10"))
    before = output.read_bytes()
    interrupted(monkeypatch, name, after, command(folder, output, "--limit", "20"))
    assert output.read_bytes() == before
    main(command(folder, output, "--limit", "20"))
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_kill_before_the_output_takes_its_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings are there and name its size; the old output is not taken for it."""
    output, aside = tmp_path / "a.jsonl", tmp_path / "a.jsonl.complete"
    main(command(folder, output, "--limit", "10"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "megatron_solopo.data.sampling.responses.put_in_place", lambda output: aside.exists() and interrupt()
        )
        with pytest.raises(KeyboardInterrupt):
            main(command(folder, output, "--limit", "20"))
    main(command(folder, output, "--limit", "20"))
    assert "holds 6 responses to each of 20 questions already" in capsys.readouterr().out
    assert len(list(read_responses(output))) == 20


def test_overwrite_samples_anew_and_resumes_itself_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    arguments = command(folder, output, "--limit", "10")
    main(arguments)
    interrupted(
        monkeypatch, "add", 14, command(folder, output, "--limit", "20")
    )  # an extension, of which nothing stays
    interrupted(monkeypatch, "add", 4, [*arguments, "--overwrite"])
    capsys.readouterr()
    main([*arguments, "--overwrite"])
    printed = capsys.readouterr().out
    assert "resuming: 24 of 60 responses" in printed and "sampled now: 36 responses" in printed


def test_a_partial_file_of_an_earlier_version_is_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings hold --limit and --samples."""
    output = tmp_path / "a.jsonl"
    interrupted(monkeypatch, "add", 6, command(folder, output))
    partial = Path(f"{output}.partial")
    head, *lines = partial.read_text().splitlines()
    settings = json.loads(head)["settings"] | {"limit": None, "samples": 6}
    partial.write_text("\n".join([json.dumps({"settings": settings}), *lines]) + "\n")
    main(command(folder, output, "--limit", "9"))
    assert "resuming: " in capsys.readouterr().out


def interrupt() -> None:
    raise KeyboardInterrupt
