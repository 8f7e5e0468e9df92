"""Servers that fail, and options that do not fit: each is one line, and what is finished is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from option_lines import last_wins_in
from refusals import refused
from scripted_server import Scripted, chat_choice, command, folder, serve, well

from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import read_responses

__all__ = ["folder", "serve"]  # fixtures

main = last_wins_in(sample_responses.main)


def failing(
    status: int, document: Any, after: int = 0, times: int = 99
) -> Callable[[str, dict[str, Any] | None], tuple[int, Any]]:
    """After so many good answers so many bad ones, then good ones again."""
    asked = [0]

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        asked[0] += body is not None
        return (status, document) if body and after < asked[0] <= after + times else well(path, body)

    return answer


ODD_END = ("server-response", "q1/1", "finish_reason")
BAD = {
    "wrong model": (
        404,
        {"error": {"message": "The model `tiny` does not exist."}},
        ("server-model-missing", "--model tiny: --server ", "404"),
    ),
    "bad request": (
        400,
        {"error": {"message": "maximum context length is 8"}},
        ("server-refuses-request", "request q1/1: 400: maximum"),
    ),
    "unprocessable": (
        422,
        {"detail": "Unexpected fields"},
        ("server-refuses-request", "request q1/1: 422: Unexpected fields"),
    ),
    "wrong key": (401, {"error": {"message": "no"}}, ("api-key-refused", "--api-key-env ", "(401: no")),
    "too many": (
        429,
        {"error": {"message": "slow down"}},
        ("server-rate-limit", "429: slow down (retries: 0)", "--concurrency"),
    ),
    "its fault": (500, b"Internal Server Error", ("server-failed", "request q1/1: 500: Internal Server Error")),
    "overloaded": (503, {"error": "loading"}, ("server-failed", "request q1/1: 503: loading")),
    "cut": (0, None, ("server-unreachable", "request q1/1: peer closed connection", "(retries: 0)")),
    "not JSON": (200, b"<html>", ("server-response", "request q1/1: ", "not valid JSON (retries: 0)")),
    "no object": (200, ["?"], ("server-response", "q1/1", "not a JSON object")),
    "no choices": (200, {"choices": []}, ("server-response", "q1/1", "no choices")),
    "null choices": (200, {"choices": None}, ("server-response", "q1/1", "no choices")),
    "too many choices": (200, {"choices": [chat_choice("w")] * 3}, ("server-response", "q1/1", "3 choices, 1 ")),
    "no text": (200, {"choices": [{"finish_reason": "stop", "message": {}}]}, ("server-response", "q1/1", "no text")),
    "half a character": (200, {"choices": [chat_choice("w\ud83d")]}, ("server-response", "q1/1", "surrogate pair")),
    "odd end": (
        200,
        {"choices": [chat_choice("w", "content_filter")]},
        ("server-response", "q1/1", "finish_reason 'content_filter'"),
    ),
    "end of another type": (200, {"choices": [chat_choice("w") | {"finish_reason": ["stop"]}]}, ODD_END),
    "choice of another type": (200, {"choices": ["stop"]}, ODD_END),
    "odd ids": (200, {"choices": [chat_choice("w", token_ids="4 5")]}, ("server-response", "q1/1", "token_ids")),
    "reasoning": (
        200,
        {"choices": [{"finish_reason": "stop", "message": {"content": "w1", "reasoning_content": "hm"}}]},
        ("server-reasoning-parser", "request q1/1: ", "--server-api completions"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_server_is_one_line_and_costs_nothing_finished(
    name: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    status, document, (code, *named) = BAD[name]
    server = serve(failing(status, document, after=3))
    few = ["--limit", "3", "--samples", "2", "--samples-per-request", "1", "--concurrency", "1"]
    arguments = command(folder, server, tmp_path / "a.jsonl", *few)
    with refused(code, *named):
        main([*arguments, "--max-retries", "0"])
    healthy = serve(well)
    main([*arguments, "--server", healthy.url])
    asked = [name for name, _ in server.asked[:3] + healthy.asked]
    assert asked == [f"q{number}/{first}" for number in range(3) for first in range(2)]
    assert all(len(record.responses) == 2 for record in read_responses(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["too many", "its fault", "cut", "not JSON", "no choices"])
def test_temporary_failures_are_retried(
    name: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    status, document, _ = BAD[name]
    server = serve(failing(status, document, times=1))
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1", "--samples", "1"))
    assert [asked for asked, _ in server.asked] == ["q0/0", "q0/0"]
    assert server.asked[0] == server.asked[1]


def test_a_failure_waits_for_requests_in_flight(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None and body["messages"][-1]["content"].startswith("w0"):
            time.sleep(0.1)
            return 400, {"detail": "no"}
        time.sleep(0.3 if body else 0)
        return well(path, body)

    with refused("server-refuses-request", "request q0/0"):
        main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples-per-request", "6", "--concurrency", "3"))
    kept = [json.loads(line)["job"][0] for line in (tmp_path / "a.jsonl.partial").read_text().splitlines()[1:]]
    assert sorted(kept) == ["q1", "q2"]


def test_a_slow_server_is_one_line(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        time.sleep(0.4 if body else 0)
        return well(path, body)

    more = ["--request-timeout", "0.1", "--limit", "1", "--samples", "1", "--max-retries", "0"]
    with refused("server-timeout", "request q0/0", "--request-timeout 0.1"):
        main(command(folder, serve(answer), tmp_path / "a.jsonl", *more))


def test_a_server_that_is_not_there_is_one_line_at_once(folder: Path, tmp_path: Path) -> None:
    with refused("server-unreachable", "--server http://127.0.0.1:9/v1: ", "("):
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl"))
    assert not list(tmp_path.iterdir())


def test_a_name_that_vllm_does_not_list_is_refused_before_a_request(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = serve(lambda path, body: (200, {"data": [{"id": "large", "owned_by": "vllm"}]}))
    with refused("server-model-missing", "--model tiny: ", "it has large"):
        main(command(folder, server, tmp_path / "a.jsonl"))
    assert not server.asked


@pytest.mark.parametrize("listed", [5, [{"id": "tiny", "owned_by": ["vllm"]}, 6]], ids=["number", "odd owner"])
def test_a_server_that_describes_itself_oddly_is_of_unknown_kind(
    listed: object, folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda path, body: well(path, body) if body else (200, {"data": listed, "paths": 7}))
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1", "--samples", "1"))
    assert "its kind is unknown" in capsys.readouterr().err
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        ("--device cpu", "option-unused", ("--device ", "leave --server out")),
        ("--batch-size 4", "option-unused", ("--batch-size ", "leave --server out")),
        ("--server localhost:8000", "option-value", ("--server localhost:8000: ", "http://localhost:8000")),
        ("--server http://localhost:port/v1", "option-value", ("--server http://localhost:port/v1: ",)),
        ("--concurrency 1001", "option-value", ("--concurrency 1001: ", "1000 connections")),
        ("--concurrency 0", "option-value", ("--concurrency 0: ", "at least 1")),
        ("--request-timeout 0", "option-value", ("--request-timeout 0.0: ", "positive")),
        ("--max-retries -1", "option-value", ("--max-retries -1: ", "at least 0")),
        ("--samples-per-request 2 --temperature 0", "option-conflict", ("--samples-per-request 2", "--temperature 0")),
        ("--api-key-env NO_SUCH_NAME", "api-key-missing", ("--api-key-env NO_SUCH_NAME: ", "environment variable")),
    ],
)
def test_wrong_options_are_one_line(folder: Path, tmp_path: Path, more: str, code: str, named: tuple[str, ...]) -> None:
    with refused(code, *named):
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl", *more.split()))


def test_options_of_the_other_backend_are_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--contexts", str(folder / "contexts.jsonl"), "--output", str(tmp_path / "a")]
    with refused("option-unused", "--concurrency ", "needs --server"):
        main([*arguments, "--concurrency", "4"])
    with refused("option-missing", "--tokenizer ", "--model tiny "):
        main([*arguments, "--model", "tiny", "--server", "http://127.0.0.1:9/v1"])


def test_without_the_client_package_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("package-missing", "--server: ", "openai", "pip install 'megatron-solopo[server]'"):
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl"))
