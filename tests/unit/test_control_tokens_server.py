"""A server reads control tokens in the texts it is sent: prompts that spell them go as ids, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from scripted_server import Scripted, chat_choice, command, context, serve
from tiny_models import write_lines, write_model

from megatron_solopo.data.sampling.responses import read_responses
from megatron_solopo.data.sampling.sample_responses import main
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids

__all__ = ["serve"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions, of which the third and the fifth spell control tokens."""
    path = write_model(tmp_path_factory.mktemp("model"))
    records = [context(number) for number in range(5)]
    for number, text in ((2, "w2 <end> w3"), (4, "<assistant>")):
        records[number]["short_messages"] = [{"role": "user", "content": text}]
    write_lines(path / "contexts.jsonl", records)
    return path


def answers(owner: str) -> Callable[[str, dict[str, Any] | None], tuple[int, Any]]:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            listed = {"data": [{"id": "tiny", "owned_by": owner}]}
            return (200, listed) if path.endswith("/models") else (404, {"detail": "Not Found"})
        if path.endswith("/chat/completions"):
            return 200, {"choices": [chat_choice("w1") for _ in range(body.get("n", 1))]}
        return 200, {"choices": [{"text": "w2", "finish_reason": "stop"} for _ in range(body.get("n", 1))]}

    return answer


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_servers_that_accept_token_ids_get_them(
    owner: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = serve(answers(owner))
    assert main(command(folder, server, tmp_path / "a.jsonl")) == 0
    tokenizer = load_tokenizer(folder)
    sent = {name.partition("/")[0]: body for name, body in server.asked}
    for number, text in ((2, "w2 <end> w3"), (4, "<assistant>")):
        body = sent[f"q{number}"]
        assert body["prompt"] == prompt_ids(tokenizer, [{"role": "user", "content": text}]) and "messages" not in body
        assert body["prompt"].count(3) == 0 and body["prompt"].count(2) == 1 and "separate_reasoning" not in body
    assert all("prompt" not in sent[f"q{number}"] and sent[f"q{number}"]["messages"] for number in (0, 1, 3))
    texts = [set(record.responses) for record in read_responses(tmp_path / "a.jsonl")]
    assert texts == [{"w1"}, {"w1"}, {"w2"}, {"w1"}, {"w2"}]


def test_other_servers_never_get_such_a_prompt(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    """Unless every prompt goes as ids."""
    server = serve(answers("someone"))
    with refused("control-token-server", "contexts.jsonl:3: question 'q2' ", "(2 questions") as caught:
        main(command(folder, server, tmp_path / "a.jsonl"))
    assert str(caught.value).endswith("without --server, or with --server-api completions") and not server.asked
    assert main(command(folder, server, tmp_path / "b.jsonl", "--limit", "2")) == 0
    assert main(command(folder, server, tmp_path / "c.jsonl", "--server-api", "completions")) == 0
    with refused("control-token-server", "--server") as caught:
        kind = ("--server-api", "completions", "--server-kind", "transformers")
        main(command(folder, server, tmp_path / "d.jsonl", *kind))
