"""Pairs and evaluations through a real `transformers serve`, killed at random requests (SOLOPO_KILLS=10: 10 times)."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from option_lines import last_wins_in
from tiny_models import SHAPE, TEMPLATE, WORDS, write_lines, write_model
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_solopo.cli import run
from megatron_solopo.data.pairing.build_pairs import main as build_pairs
from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import read_responses
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids, response_ids
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.evaluate import main as evaluate

sample = last_wins_in(sample_responses.main)

KILLS = int(os.environ.get("SOLOPO_KILLS", "2"))
ROOT = Path(__file__).resolve().parents[2]
QUESTIONS, SAMPLES = 10, 6


def question(number: int) -> dict[str, Any]:
    """Three words, of which the first is the answer."""
    words = random.Random(number).sample(WORDS[:12], 3)
    chat = [{"role": "user", "content": " ".join(words)}]
    return {
        "id": f"q{number}",
        "question": "which word is the first?",
        "answers": [words[0]],
        "short_messages": chat,
        "long_messages": [{"role": "user", "content": " ".join(words + WORDS[20:40])}],
        "short_tokens": 5,
        "long_tokens": 25,
        "source": "test",
    }


def train_a_little(folder: Path) -> None:
    """Until the model is right sometimes: cross-entropy of the answer to questions that are never sampled on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    asked = [(one["short_messages"], one["answers"][0]) for one in map(question, range(1000, 3000))]
    rows = [(prompt_ids(tokenizer, chat), response_ids(tokenizer, chat, answer)) for chat, answer in asked]
    ids = torch.tensor([prompt + answer for prompt, answer in rows])
    labels = torch.tensor([[-100] * len(prompt) + answer for prompt, answer in rows])
    for step in range(60):
        batch = slice(32 * step % 1984, 32 * step % 1984 + 32)
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Serving:
    """A running `transformers serve` of a folder, and the log of its requests."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.log, self.url = folder, log, f"http://127.0.0.1:{port}/v1"
        arguments = ["serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "logged_serve.py"), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DELAY": "0.02"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while "Uvicorn running" not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)

    def events(self, kind: str) -> list[str]:
        """Names of requests that it ``received`` or ``answered``, in order."""
        return [line.split()[1] for line in self.log.read_text().splitlines() if line.startswith(kind + " ")]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    config = LlamaConfig(**SHAPE, eos_token_id=3, bos_token_id=None, pad_token_id=0)
    write_model(folder, config, template="{% if hint %}{{ hint + ' ' }}{% endif %}" + TEMPLATE)
    train_a_little(folder)
    write_lines(folder / "contexts.jsonl", [question(number) for number in range(QUESTIONS)])
    server = Serving(folder, tmp_path_factory.mktemp("log") / "server.txt")
    yield server
    server.process.terminate()
    server.process.wait(30)


def command(serving: Serving, output: Path, *more: str) -> list[str]:
    """With the folder as the name of the model, which is also where the tokenizer is."""
    words = f"--server {serving.url} --model {serving.folder} --contexts {serving.folder}/contexts.jsonl"
    return [*words.split(), "--output", str(output), "--samples", str(SAMPLES), "--max-new-tokens", "4", *more]


def _sample(argv: list[str], log: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.exit(run(sample, argv))


def start(argv: list[str], log: Path) -> BaseProcess:
    process = fork_server.process(_sample, argv, str(log))
    process.start()
    return process


def journal(partial: Path) -> set[str]:
    """Names of the requests whose answers are on disk, in whole lines."""
    lines = partial.read_bytes().split(b"\n")[1:-1] if partial.exists() else []
    return {f"{name}/{first}" for name, first, _ in (json.loads(line)["job"] for line in lines)}


def settled(serving: Serving) -> int:
    """Waits until every request that reached the server is answered, and returns how many there were."""
    while True:
        time.sleep(0.1)
        received, answered = serving.events("received"), serving.events("answered")
        if len(received) == len(answered):
            return len(received)


def test_killed_at_random_requests_no_answer_is_lost_or_requested_twice(
    serving: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's log against what is on disk, at each kill; then a pair set of what was sampled."""
    output, log = tmp_path / "responses.jsonl", tmp_path / "log.txt"
    partial = Path(f"{output}.partial")
    arguments = command(serving, output, "--temperature", "1.0", "--concurrency", "4")
    first = settled(serving)
    moments = sorted(random.Random(KILLS).sample(range(1, QUESTIONS * SAMPLES - 5), KILLS))
    in_flight: Counter[str] = Counter()
    kept_before: list[tuple[int, set[str]]] = []
    for moment in moments:
        process = start(arguments, log)
        while len(journal(partial)) < moment:
            assert process.is_alive(), log.read_text()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept, place = journal(partial), settled(serving)
        in_flight.update(set(serving.events("received")[first:place]) - kept)
        kept_before.append((place, kept))
    process = start(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()

    settled(serving)
    received = serving.events("received")
    for place, kept in kept_before:
        assert not kept & set(received[place:]), "an answer that was on disk was asked for again"
    times = Counter(received[first:])
    assert times.keys() == {f"q{question}/{sample}" for question in range(QUESTIONS) for sample in range(SAMPLES)}
    repeats = {name: count - 1 for name, count in times.items() if count > 1}
    assert all(count <= in_flight[name] for name, count in repeats.items())
    assert sum(repeats.values()) <= 4 * KILLS  # --concurrency
    ends = [line.split()[1:] for line in serving.log.read_text().splitlines() if line.startswith("answered ")]
    assert {name for name, status in ends if status == "200"} >= times.keys()
    assert all(name in in_flight for name, status in ends if status != "200")  # cut off before its body was there
    records = list(read_responses(output))
    assert [record.id for record in records] == [f"q{number}" for number in range(QUESTIONS)]
    assert all(len(record.responses) == SAMPLES for record in records)
    assert not partial.exists() and "warning" not in log.read_text()

    capsys.readouterr()
    contexts = str(serving.folder / "contexts.jsonl")
    build_pairs(["--contexts", contexts, "--responses", str(output), "--output", str(tmp_path / "groups.jsonl")])
    assert len(list(read_groups(tmp_path / "groups.jsonl"))) > 0
    printed = capsys.readouterr().out
    with capsys.disabled():
        if "SOLOPO_KILLS" in os.environ:
            print(f"\nkilled {KILLS} times; {len(times)} requests, each answered and on disk once")
            print(f"asked again, in flight at a kill: {sum(repeats.values())}\n{printed}")


def test_greedy_responses_are_those_of_the_model_in_process(serving: Serving, tmp_path: Path) -> None:
    """Texts, ends and order, byte for byte, for any concurrency and API."""
    names = {
        "chat": ["--concurrency", "8"],
        "one": ["--concurrency", "1"],
        "completions": ["--server-api", "completions"],
    }
    for name, more in names.items():
        greedy = ["--temperature", "0", "--samples", "2", "--max-new-tokens", "6", *more]
        sample(command(serving, tmp_path / f"{name}.jsonl", *greedy))
    local = command(serving, tmp_path / "local.jsonl", "--temperature", "0", "--samples", "2", "--max-new-tokens", "6")
    sample([*local[2:], "--device", "cpu"])
    expected = (tmp_path / "local.jsonl").read_bytes()
    assert [(tmp_path / f"{name}.jsonl").read_bytes() == expected for name in names] == [True] * 3
    finished = [end for record in read_responses(tmp_path / "local.jsonl") for end in record.finished]
    assert any(finished)


def test_an_evaluation_through_the_server_is_that_of_the_folder(serving: Serving, tmp_path: Path) -> None:
    """The server renders the messages itself."""
    records = []
    for number in range(4):
        words = random.Random(number).sample(WORDS, 6)
        texts = [
            {"idx": n, "title": f"t{n}", "paragraph_text": " ".join(words[n:]), "is_supporting": n == 0} for n in (0, 1)
        ]
        records.append({"id": f"q{number}", "question": words[1], "answer": words[0], "paragraphs": texts})
    write_lines(tmp_path / "asked.jsonl", records)
    prompt = (
        "--document-template",
        "{text}",
        "--document-separator",
        " ",
        "--prompt-template",
        "{documents} {question}",
    )
    asked = [*f"--model {serving.folder} --data {tmp_path}/asked.jsonl --context-documents 1,2".split(), *prompt]
    asked += ["--max-new-tokens", "6"]
    evaluate([*asked, "--output", str(tmp_path / "here.json")])
    server = ["--server", serving.url, "--server-api", "chat", "--concurrency", "2"]
    evaluate([*asked, "--output", str(tmp_path / "there.json"), *server])
    here, there = (read_lines(tmp_path / f"{name}.predictions.jsonl") for name in ("here", "there"))
    assert [one["prediction"] for one in here] == [one["prediction"] for one in there] and len(here) == 8
    assert json.loads((tmp_path / "there.json").read_text())["settings"]["server_kind"] == "transformers"


def test_samples_follow_the_temperature_not_the_checkpoints_defaults(serving: Serving, tmp_path: Path) -> None:
    """The checkpoint's generation config does not sample at all; one seed has one response, others differ."""
    one = ["--limit", "2", "--concurrency", "1", "--temperature", "3"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        sample(command(serving, tmp_path / f"{name}.jsonl", *one, "--seed", seed))
    first, again, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == again != other
    assert all(len(set(record.responses)) > 1 for record in read_responses(tmp_path / "a.jsonl"))


def test_values_of_template_variables_reach_the_servers_template(
    serving: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides then count the same prompt tokens; else the command would warn."""
    few = ["--limit", "1", "--samples", "1", "--temperature", "0"]
    texts = []
    for values in ("{}", '{"hint": "w9 w9 w9"}'):
        output = tmp_path / f"{len(values)}.jsonl"
        sample(command(serving, output, *few, "--chat-template-kwargs", values))
        texts.append(output.read_text())
    assert "warning" not in capsys.readouterr().err
    assert texts[0] != texts[1]
    sample(command(serving, tmp_path / "c.jsonl", *few, "--chat-template", str(plain_template(tmp_path))))
    assert "has 5 prompt tokens on the server and 6 here" in capsys.readouterr().err


def plain_template(folder: Path) -> Path:
    path = folder / "template.jinja"
    path.write_text("{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}<assistant> ")
    return path


def test_a_name_that_the_server_does_not_have_is_one_line(serving: Serving, tmp_path: Path) -> None:
    arguments = command(serving, tmp_path / "a.jsonl", "--model", "other", "--tokenizer", str(serving.folder))
    with pytest.raises(UserError, match=r"request q\d+/\d+: 400: Server is pinned to .*requested 'other'") as caught:
        sample(arguments)
    assert "\n" not in str(caught.value)
