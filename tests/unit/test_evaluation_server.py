"""Evaluation of a model behind a server: a real HTTP server, whose answers are transformers' own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import PROMPT, write_model, write_questions
from benchmark_files import byte_model, write_longbench
from option_lines import last_wins
from refusals import refused
from scripted_server import Scripted, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.evaluation import evaluate

__all__ = ["serve"]  # a fixture

Answer = Callable[[str, dict[str, Any] | None], tuple[int, Any]]


class Served:
    """Answers of a folder's model, one prompt at a time; ``most`` is the largest number of requests in flight."""

    def __init__(self, folder: Path, owner: str = "vllm", echo: bool = True) -> None:
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.owner, self.echo, self.lock = owner, echo, threading.Lock()
        self.flying = self.most = 0

    def __call__(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            listed = {"data": [{"id": "tiny", "owned_by": self.owner}]}
            return (200, listed) if path.endswith("/models") else (404, {})
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
        time.sleep(0.02)
        with self.lock:
            choice = self._choice(path, body)
            self.flying -= 1
        return 200, {"choices": [choice], "usage": {"prompt_tokens": self.prompt_tokens}}

    @torch.inference_mode()
    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat = path.endswith("/chat/completions")
        if chat:
            text = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            prompt = body["prompt"]
        self.prompt_tokens = len(prompt)
        ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        out = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=body["max_tokens"])[0]
        new = out[len(prompt) :].tolist()
        reason = "stop" if new[-1] == self.tokenizer.eos_token_id else "length"
        # As servers do: the text has no special tokens, and vLLM's ids have the one that ended the response.
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        choice = {"message": {"content": text}} if chat else {"text": text}
        choice |= {"finish_reason": reason} | ({"token_ids": new} if self.owner == "vllm" else {})
        if body.get("echo") and self.echo:
            log_probs = self.model(ids).logits[0].log_softmax(-1)
            of_prompt = log_probs[:-1].gather(1, ids[0, 1:, None]).squeeze(1).tolist()
            choice["logprobs"] = {"token_logprobs": [None, *of_prompt, -0.5]}
        return choice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")


def command(folder: Path, output: Path, *more: str | Path) -> list[str]:
    """In this process; `served` asks a server for the same."""
    return last_wins([*f"--model {folder} --output {output} --max-new-tokens 6".split(), *map(str, more)])


def served(server: Scripted | str, folder: Path, output: Path, *more: str | Path) -> list[str]:
    url = server if isinstance(server, str) else server.url
    named = f"--server {url} --model tiny --tokenizer {folder} --max-retries 0"
    return last_wins([*command(folder, output, *more), *named.split()])


def both(server: Scripted, folder: Path, tmp_path: Path, *asked: str | Path, only: tuple[str, ...] = ()) -> None:
    """The predictions and scores from the server are those in this process, byte for byte."""
    evaluate.main(command(folder, tmp_path / "here.json", *asked))
    evaluate.main(served(server, folder, tmp_path / "there.json", *asked, *only))
    here, there = ((tmp_path / f"{name}.predictions.jsonl").read_bytes() for name in ("here", "there"))
    assert here == there and len(here) > 0
    here, there = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "there"))
    assert here["metrics"] == there["metrics"]
    assert there["model"] == "tiny" and there["settings"]["server"] == server.url
    assert not {"dtype", "device", "batch_tokens"} & there["settings"].keys() and "server" not in here["settings"]


@pytest.mark.parametrize("owner", ["vllm", "someone"])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_servers_answers_are_those_in_this_process(
    owner: str, api: str, folder: Path, questions: Path, serve: Callable[[Answer], Scripted], tmp_path: Path
) -> None:
    """With ids or texts as answers, prompts as ids or messages; each question is asked once."""
    server = serve(model := Served(folder, owner))
    asked = ("--data", questions, "--context-documents", "2,8", "--depths", "0,1", *PROMPT)
    both(server, folder, tmp_path, *asked, only=("--server-api", api, "--concurrency", "3"))
    names = [name for name, _ in server.asked]
    expected = {f"{n} documents/q{number}/{depth}" for n in (2, 8) for number in range(6) for depth in (0, 1)}
    assert len(names) == len(set(names)) and set(names) == expected
    assert {(body["temperature"], body["max_tokens"]) for _, body in server.asked} == {(0, 6)}
    assert all(("messages" in body) is (api == "chat") for _, body in server.asked) and 1 < model.most <= 3


def test_answers_of_a_server_on_disk_are_not_asked_for_again(
    folder: Path, questions: Path, serve: Callable[[Answer], Scripted], tmp_path: Path, capsys: Any
) -> None:
    """The server fails at its sixth answer; another one goes on, in other requests at once."""
    model, answered = Served(folder), iter(range(5))

    def failing(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None and next(answered, None) is None:
            return 500, {"error": {"message": "it broke"}}
        return model(path, body)

    asked = ("--data", questions, "--context-documents", "2,4", *PROMPT)
    first = serve(failing)
    with refused("server-failed", "request 2 documents/q5: 500: it broke"):
        evaluate.main(served(first, folder, tmp_path / "r.json", *asked, "--concurrency", "1"))
    second = serve(model)
    with refused("unfinished-other-settings", "server_api = 'completions', now 'chat'"):
        evaluate.main(served(second, folder, tmp_path / "r.json", *asked, "--server-api", "chat"))
    evaluate.main(served(second, folder, tmp_path / "r.json", *asked, "--concurrency", "4"))
    assert "resuming: 5 of 12 answers were generated before" in capsys.readouterr().out
    names = [name for name, _ in second.asked]
    assert sorted(names) == sorted(["2 documents/q5", *(f"4 documents/q{number}" for number in range(6))])
    evaluate.main(command(folder, tmp_path / "here.json", *asked))
    here, there = ((tmp_path / f"{name}.predictions.jsonl").read_bytes() for name in ("here", "r"))
    assert here == there and not (tmp_path / "r.json.partial").exists()


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("bytes") / "tiny")


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choices") / "high_school_physics_test.csv"
    path.write_text("".join(f"What is {number} + 2?,{number},{number + 2},7,9,B\n" for number in range(4)))
    return path


def test_tasks_from_a_server(
    bytes_folder: Path, choices: Path, serve: Callable[[Answer], Scripted], tmp_path: Path
) -> None:
    """Choices are compared by the log-probs of their tokens, a request for each."""
    server = serve(Served(bytes_folder))
    essay = write_longbench(tmp_path / "hotpotqa.jsonl")
    tasks = ("--tasks", "ruler_vt", f"longbench_hotpotqa={essay}", f"multiple_choice={choices}")
    both(server, bytes_folder, tmp_path, *tasks, "--limit", "2", "--context-tokens", "2048")
    names = [name for name, _ in server.asked if "choice" in name]
    assert sorted(names) == [f"multiple_choice: 4 choices/{number}/{place}" for number in (0, 1) for place in range(4)]
    (tmp_path / "here.json").unlink()
    chat = ("--tasks", f"longbench_hotpotqa={essay}", "--context-tokens", "900", "--limit", "2")
    both(server, bytes_folder, tmp_path, *chat, only=("--server-api", "chat"))


def test_gold_answers_are_scored_as_in_this_process(
    folder: Path, questions: Path, serve: Callable[[Answer], Scripted], tmp_path: Path
) -> None:
    server = serve(Served(folder))
    asked = ("--data", questions, "--context-documents", "2,8", "--gold-log-prob", *PROMPT)
    evaluate.main(command(folder, tmp_path / "here.json", *asked))
    evaluate.main(served(server, folder, tmp_path / "there.json", *asked))
    here, there = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("here", "there"))
    assert [*here] == [*there] == ["2 documents", "8 documents"]
    for length, scores in here.items():
        assert scores["gold_log_prob"] == pytest.approx(there[length]["gold_log_prob"], abs=2e-5)
        low, high = scores["interval"]["gold_log_prob"]
        assert low < scores["gold_log_prob"] < high < 0 and scores["interval_method"]["gold_log_prob"] == "bootstrap"
    lines = (tmp_path / "here.predictions.jsonl").read_text().splitlines()
    of_questions = [json.loads(line)["gold_log_prob"] for line in lines]
    assert len(set(of_questions)) == 12 and sum(of_questions[:6]) / 6 == here["2 documents"]["gold_log_prob"]


@pytest.mark.parametrize(
    ("owner", "more", "code", "named"),
    [
        ("vllm", "--tasks ruler_vt --gold-log-prob", "option-unused", ["--gold-log-prob", "--tasks"]),
        (
            "vllm",
            "--data {choices} --context-tokens 99 --gold-log-prob --server-api chat",
            "option-conflict",
            ["--gold-log-prob", "completions"],
        ),
        ("vllm", "--tasks ruler_vt --server-api chat", "option-conflict", ["--tasks ruler_vt with --server-api chat"]),
        ("vllm", "--tasks multiple_choice={choices} --server-api chat", "option-conflict", ["completions"]),
        ("someone", "--tasks multiple_choice={choices}", "server-log-probs-missing", ["(echo)", "without --server"]),
        ("vllm", "--tasks ruler_vt --server-kind transformers", "option-conflict", ["accepts no token ids", "chat"]),
        ("vllm", "--tasks ruler_vt --dtype float32", "option-unused", ["--dtype", "leave --server out"]),
        ("vllm", "--tasks ruler_vt --batch-tokens 9", "option-unused", ["--batch-tokens", "leave --server out"]),
        ("vllm", "--tasks ruler_vt --concurrency 0", "option-value", ["--concurrency 0"]),
        ("vllm", "--tasks ruler_vt --model other", "server-model-missing", ["--model other", "it has tiny"]),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(
    owner: str,
    more: str,
    code: str,
    named: list[str],
    bytes_folder: Path,
    choices: Path,
    serve: Callable[[Answer], Scripted],
    tmp_path: Path,
) -> None:
    sized = ("--context-tokens", "2048") if "ruler" in more else ()
    words = more.format(choices=choices).split()
    server = serve(Served(bytes_folder, owner, echo=False))
    with refused(code, *named):
        evaluate.main(last_wins([*served(server, bytes_folder, tmp_path / "r.json", "--limit", "1", *sized), *words]))
    assert not (tmp_path / "r.json").exists()


def test_options_of_a_server_need_one(folder: Path, questions: Path, tmp_path: Path) -> None:
    asked = ("--data", questions, "--context-documents", "2")
    with refused("option-unused", "--concurrency ", "needs --server"):
        evaluate.main(command(folder, tmp_path / "r.json", *asked, "--concurrency", "4"))
    with refused("option-missing", "--tokenizer is missing", "--model tiny"):
        evaluate.main(command(Path("tiny"), tmp_path / "r.json", *asked, "--server", "http://127.0.0.1:9/v1"))
