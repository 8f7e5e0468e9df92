"""Sampling from servers that behave, that behave in their own way, and that do not behave at all."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from option_lines import last_wins_in
from tiny_models import write_lines, write_model

from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import read_responses
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids
from megatron_solopo.errors import UserError

main = last_wins_in(sample_responses.main)

END = 3  # and 2 in the folder's generation_config.json
LISTED = {"object": "list", "data": [{"id": "tiny", "owned_by": "someone"}]}


class Scripted:
    """A real HTTP server on a port of its own; ``answer(path, body)`` gives (status, document or bytes)."""

    def __init__(self, answer: Callable[[str, dict[str, Any] | None], tuple[int, Any]]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.heads: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((unquote(self.headers.get("X-Request-ID", "")), body))
                outer.heads.append({name.lower(): value for name, value in self.headers.items()})
                self._answer(body)

            def _answer(self, body: dict[str, Any] | None) -> None:
                status, document = answer(self.path, body)
                if status == 0:  # the connection is cut after half of a promised answer
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", "500")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                    return
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:  # the client did not wait
                    self.close_connection = True

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def start(answer: Callable[[str, dict[str, Any] | None], tuple[int, Any]]) -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    yield start
    for one in made:
        one.http.shutdown()
        one.http.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("model"))
    write_lines(path / "contexts.jsonl", [context(number) for number in range(5)])
    return path


def context(number: int) -> dict[str, Any]:
    chat = [{"role": "user", "content": f"w{number} w{number + 1}"}]
    return {
        "id": f"q{number}",
        "question": "?",
        "answers": ["w1"],
        "short_messages": chat,
        "long_messages": chat,
        "short_tokens": 4,
        "long_tokens": 4,
        "source": "test",
    }


def chat_choice(text: str, reason: str = "stop", **more: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, **more}


def well(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
    """Answers with the prompt's first word, once for every sample that is asked for."""
    if body is None:
        return (200, LISTED) if path.endswith("/models") else (404, {"detail": "Not Found"})
    word = body["messages"][-1]["content"].split()[0]
    usage = {"prompt_tokens": 4, "completion_tokens": 2 * body.get("n", 1)}
    return 200, {"choices": [chat_choice(word) for _ in range(body.get("n", 1))], "usage": usage}


def command(folder: Path, server: Scripted | str, output: Path, *more: str) -> list[str]:
    url = server if isinstance(server, str) else server.url
    arguments = f"--server {url} --model tiny --tokenizer {folder} --contexts {folder}/contexts.jsonl --output {output}"
    return [*arguments.split(), "--samples", "6", "--max-new-tokens", "8", "--max-retries", "1", *more]


def test_every_sample_is_asked_for_once_and_written_in_order(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the order of the answers: the slower the earlier the question."""

    def slow(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None:
            time.sleep(0.03 * (5 - int(body["messages"][-1]["content"].split()[0][1:])))
        return well(path, body)

    server = serve(slow)
    assert main(command(folder, server, tmp_path / "a.jsonl", "--samples-per-request", "4")) == 0
    records = list(read_responses(tmp_path / "a.jsonl"))
    assert [record.id for record in records] == [f"q{number}" for number in range(5)]
    assert all(record.responses == [f"w{number}"] * 6 for number, record in enumerate(records))
    assert all(record.finished == [True] * 6 and record.token_ids is None for record in records)
    names = [name for name, _ in server.asked]
    assert sorted(names) == sorted(f"q{number}/{first}" for number in range(5) for first in (0, 4))
    assert {body["n"] for _, body in server.asked} == {4, 2}
    assert len({body["seed"] for _, body in server.asked}) == len(names)
    printed = capsys.readouterr()
    assert "sampled now: 30 responses, 60 tokens" in printed.out and "other ids: 0" in printed.out


def test_a_server_that_gives_one_response_whatever_n_says(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = serve(lambda path, body: well(path, body and {**body, "n": 1}))
    main(command(folder, server, tmp_path / "a.jsonl"))
    assert sorted(name for name, _ in server.asked) == sorted(f"q{n}/{first}" for n in range(5) for first in range(6))
    assert all(len(record.responses) == 6 for record in read_responses(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_sampled_ids_are_kept_where_the_text_loses_them(
    kind: str, api: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    """And the end of turn is in neither: once a server returned it as an id, once it stopped before it."""
    ids = [[4, 5, END], [4, 1, 5], [4, 5, 6, 7, 8, 9, 10, 11], [END]]
    reasons = ["stop", "stop", "length", "stop"]
    texts = ["w0 w1", "w0 w1", "w0 w1 w2 w3 w4 w5 w6 w7", ""]

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return 200, {"data": [{"id": "tiny", "owned_by": kind}]}
        content = (lambda text: {"message": {"content": text}}) if api == "chat" else (lambda text: {"text": text})
        choices = [
            {**content(text), "finish_reason": reason, "token_ids": one}
            for text, reason, one in zip(texts, reasons, ids, strict=True)
        ]
        return 200, {"choices": choices}

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--samples", "4", "--limit", "1", "--server-api", api))
    [record] = read_responses(tmp_path / "a.jsonl")
    assert record.responses == texts and record.finished == [True, True, False, True]
    assert record.token_ids == [None, [4, 1, 5], None, None]  # <user> is a special token, which texts lose
    [(_, body)] = server.asked
    assert body["return_token_ids"] and body["stop_token_ids"] == [2, END] and body["n"] == 4
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
    prompt = prompt_ids(load_tokenizer(folder), context(0)["short_messages"])
    assert (body["prompt"] == prompt) if api == "completions" else (body["messages"] == context(0)["short_messages"])


def test_texts_end_at_their_end_of_turn_and_mismatches_are_counted(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that leaves the end of turn in the text, and one whose response was 5 tokens and is 3 as text."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return well(path, body)
        marked = body["messages"][-1]["content"].startswith("w0")
        text = "w5 w6 <end> " if marked else "w5 w6"
        usage = {"prompt_tokens": 4, "completion_tokens": 3 if marked else 6}
        return 200, {"choices": [chat_choice(text, "length" if marked else "stop")], "usage": usage}

    main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples", "1", "--limit", "2"))
    first, second = read_responses(tmp_path / "a.jsonl")
    assert (first.responses, first.finished) == (["w5 w6 "], [True])
    assert (second.responses, second.finished) == (["w5 w6"], [True])
    printed = capsys.readouterr().out
    assert "sampled now: 2 responses, 9 tokens" in printed and "other ids: 1" in printed


@pytest.mark.parametrize(
    ("texts", "usage", "tokens", "changed"),
    [
        (["w5", "w6 w7 w8", "w9 w9"], 9, 9, 0),  # all choices
        (["w5", "w6 w7 w8", "w9 w9"], 2, 9, 0),  # the first choice only, as llama.cpp's server counts
        (["w5 w6 w7 w8", "", "w9"], 5, 8, 0),
        (["w5", "w6 w7 w8", "w9 w9"], 10, 10, 1),  # one more than the texts have
        (["w5", "w6 w7 w8", "w9 w9"], None, 9, 0),
        (["w5"], 4, 4, 1),
    ],
)
def test_tokens_are_counted_over_all_choices(
    texts: list[str],
    usage: int | None,
    tokens: int,
    changed: int,
    folder: Path,
    serve: Callable[..., Scripted],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return well(path, body)
        return 200, {"choices": [chat_choice(text) for text in texts], "usage": {"completion_tokens": usage}}

    more = ["--samples", str(len(texts)), "--limit", "1"]
    main(command(folder, serve(answer), tmp_path / "a.jsonl", *more))
    printed = capsys.readouterr().out
    assert f"sampled now: {len(texts)} responses, {tokens} tokens" in printed
    assert f"mean length {tokens / len(texts):.1f} tokens" in printed and f"other ids: {changed}" in printed


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "library", None])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_shapes_the_distribution_is_set_or_said(
    owner: str | None,
    api: str,
    folder: Path,
    serve: Callable[..., Scripted],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server's own top-k, min-p and penalties: switched off where its API can, warned about where not; recorded."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            listed = {"data": [{"id": "tiny", "owned_by": owner}], "total_slots": 8}
            return (200, listed) if path.endswith(("/models", "/props")) else (404, {})
        choices = [{"text": "w1", **chat_choice("w1")} for _ in range(body.get("n", 1))]
        return 200, {"choices": choices}

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1", "--server-api", api))
    recorded = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    [(_, body)] = server.asked
    sent = recorded["sampling"]["sent"]
    assert sent.items() <= body.items() and (body["temperature"], body["top_p"]) == (0.85, 1.0)
    err = capsys.readouterr().err
    if owner in ("vllm", "sglang", "llamacpp"):
        assert body["min_p"] == 0 and body["top_k"] == (0 if owner == "llamacpp" else -1) and not err
        assert body["repeat_penalty" if owner == "llamacpp" else "repetition_penalty"] == 1
        assert "left_to_the_server" not in recorded["sampling"]
        assert recorded["settings"]["server_kind"] == {"llamacpp": "llama.cpp"}.get(owner, owner)
    else:
        assert err.count("\n") == 1 and "top-k, min-p, typical-p and penalties are the server's own defaults" in err
        assert not sent and "min-p" in recorded["sampling"]["left_to_the_server"]
    assert (body.get("samplers") == ["temperature", "top_p"]) is (owner == "llamacpp")


@pytest.mark.parametrize(("props", "most"), [((200, {"total_slots": 4}), 4), ((501, {}), 1), ((200, []), 1)])
def test_llama_cpp_is_asked_for_as_many_choices_as_it_has_slots(
    props: tuple[int, Any], most: int, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    """It refuses more, with status 400."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return props if path == "/props" else (200, {"data": [{"id": "tiny", "owned_by": "llamacpp"}]})
        return well(path, body)

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1"))
    assert max(body.get("n", 1) for _, body in server.asked) == most


def test_a_server_is_asked_for_what_a_complete_output_lacks(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server, output = serve(well), tmp_path / "a.jsonl"
    main(command(folder, server, output, "--samples", "3", "--limit", "2"))
    assert sorted(name for name, _ in server.asked) == ["q0/0", "q1/0"]
    server.asked.clear()
    main(command(folder, server, output, "--samples", "5", "--limit", "3"))
    assert sorted((name, body["n"]) for name, body in server.asked) == [("q0/3", 2), ("q1/3", 2), ("q2/0", 5)]
    server.asked.clear()
    main(command(folder, server, output, "--samples", "4", "--limit", "1"))
    assert not server.asked and [len(record.responses) for record in read_responses(output)] == [5] * 3


def test_prompts_that_are_not_the_trainers_are_warned_about_once(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        status, document = well(path, body)
        return status, document | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}} if body else document

    main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples-per-request", "1"))
    told = capsys.readouterr().err
    assert told.count("prompt tokens") == 1 and re.search("has 7 prompt tokens on the server and 4 here", told)


def test_template_values_and_the_key_travel_with_the_request(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant> {% if not think %}<end> {% endif %}"
    )
    monkeypatch.setenv("SECRET", "abc")
    server = serve(well)
    more = ["--chat-template", str(template), "--chat-template-kwargs", '{"think": true}', "--api-key-env", "SECRET"]
    main(command(folder, server, tmp_path / "a.jsonl", *more))
    assert all(body["chat_template_kwargs"] == {"think": True} for _, body in server.asked)
    assert all(head["authorization"] == "Bearer abc" for head in server.heads)


def failing(
    status: int, document: Any, after: int = 0, times: int = 99
) -> Callable[[str, dict[str, Any] | None], tuple[int, Any]]:
    """After so many good answers so many bad ones, then good ones again."""
    asked = [0]

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        asked[0] += body is not None
        return (status, document) if body and after < asked[0] <= after + times else well(path, body)

    return answer


BAD = {
    "wrong model": (404, {"error": {"message": "The model `tiny` does not exist."}}, r"--model tiny: --server .*404"),
    "bad request": (400, {"error": {"message": "maximum context length is 8"}}, r"refuses request q1/1: 400: maximum"),
    "unprocessable": (422, {"detail": "Unexpected fields"}, r"refuses request q1/1: 422: Unexpected fields"),
    "wrong key": (401, {"error": {"message": "no"}}, r"--api-key-env is missing: the server refuses the key \(401: no"),
    "too many": (429, {"error": {"message": "slow down"}}, r"429: slow down \(retries: 0\); lower --concurrency"),
    "its fault": (500, b"Internal Server Error", r"the server failed: request q1/1: 500: Internal Server Error"),
    "overloaded": (503, {"error": "loading"}, r"the server failed: request q1/1: 503: loading"),
    "cut": (0, None, r"request q1/1: peer closed connection .*see whether it still runs"),
    "not JSON": (200, b"<html>", r"request q1/1: the answer is not valid JSON \(retries: 0\)"),
    "no object": (200, ["?"], r"the answer is not a JSON object"),
    "no choices": (200, {"choices": []}, r"the answer has no choices"),
    "null choices": (200, {"choices": None}, r"the answer has no choices"),
    "too many choices": (200, {"choices": [chat_choice("w")] * 3}, r"has 3 choices, 1 were asked for"),
    "no text": (200, {"choices": [{"finish_reason": "stop", "message": {}}]}, r"a response has no text"),
    "half a character": (200, {"choices": [chat_choice("w\ud83d")]}, r"a response holds half of a surrogate pair"),
    "odd end": (200, {"choices": [chat_choice("w", "content_filter")]}, r"finish_reason 'content_filter'"),
    "odd ids": (200, {"choices": [chat_choice("w", token_ids="4 5")]}, r"token_ids is not a list of numbers"),
    "reasoning": (
        200,
        {"choices": [{"finish_reason": "stop", "message": {"content": "w1", "reasoning_content": "hm"}}]},
        r"request q1/1: the server took reasoning or a tool call out of the response",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_server_is_one_line_and_costs_nothing_finished(
    name: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    status, document, pattern = BAD[name]
    server = serve(failing(status, document, after=3))
    few = ["--limit", "3", "--samples", "2", "--samples-per-request", "1", "--concurrency", "1"]
    arguments = command(folder, server, tmp_path / "a.jsonl", *few)
    with pytest.raises(UserError, match=pattern) as caught:
        main([*arguments, "--max-retries", "0"])
    assert "\n" not in str(caught.value)
    healthy = serve(well)
    main([*arguments, "--server", healthy.url])
    asked = [name for name, _ in server.asked[:3] + healthy.asked]
    assert asked == [f"q{number}/{first}" for number in range(3) for first in range(2)]
    assert all(len(record.responses) == 2 for record in read_responses(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["too many", "its fault", "cut", "not JSON", "no choices"])
def test_what_passes_is_asked_again(name: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    status, document, _ = BAD[name]
    server = serve(failing(status, document, times=1))
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1", "--samples", "1"))
    assert [asked for asked, _ in server.asked] == ["q0/0", "q0/0"]
    assert server.asked[0] == server.asked[1]


def test_a_failure_waits_for_what_is_in_flight(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None and body["messages"][-1]["content"].startswith("w0"):
            time.sleep(0.1)
            return 400, {"detail": "no"}
        time.sleep(0.3 if body else 0)
        return well(path, body)

    with pytest.raises(UserError, match="refuses request q0/0"):
        main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples-per-request", "6", "--concurrency", "3"))
    kept = [json.loads(line)["id"] for line in (tmp_path / "a.jsonl.partial").read_text().splitlines()[1:]]
    assert sorted(kept) == ["q1", "q2"]


def test_a_slow_server_is_one_line(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        time.sleep(0.4 if body else 0)
        return well(path, body)

    more = ["--request-timeout", "0.1", "--limit", "1", "--samples", "1", "--max-retries", "0"]
    with pytest.raises(UserError, match="no answer in time; raise --request-timeout 0.1"):
        main(command(folder, serve(answer), tmp_path / "a.jsonl", *more))


def test_a_server_that_is_not_there_is_one_line_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--server http://127.0.0.1:9/v1: cannot be reached \(.*\); start it"):
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl"))
    assert not list(tmp_path.iterdir())


def test_a_name_that_vllm_does_not_list_is_refused_before_a_request(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = serve(lambda path, body: (200, {"data": [{"id": "large", "owned_by": "vllm"}]}))
    with pytest.raises(UserError, match="--model tiny: the server has no such model; it has large"):
        main(command(folder, server, tmp_path / "a.jsonl"))
    assert not server.asked


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cpu"], "--device would have no effect: leave --server out"),
        (["--batch-size", "4"], "--batch-size would have no effect: leave --server out"),
        (["--server", "localhost:8000"], "--server localhost:8000: not a URL; give one such as http://localhost:8000"),
        (["--server", "http://localhost:port/v1"], "--server http://localhost:port/v1: not a URL"),
        (["--concurrency", "1001"], "--concurrency 1001: the client has 1000 connections; give at most that"),
        (["--concurrency", "0"], "--concurrency 0: give a number of at least 1"),
        (["--request-timeout", "0"], "--request-timeout 0.0: give a positive number"),
        (["--max-retries", "-1"], "--max-retries -1: give a number of at least 0"),
        (["--samples-per-request", "2", "--temperature", "0"], "--samples-per-request 2 with --temperature 0"),
        (["--api-key-env", "NO_SUCH_NAME"], "--api-key-env NO_SUCH_NAME: this environment variable is not set"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl", *more))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_of_the_other_backend_are_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--contexts", str(folder / "contexts.jsonl"), "--output", str(tmp_path / "a")]
    with pytest.raises(UserError, match="--concurrency would have no effect: needs --server"):
        main([*arguments, "--concurrency", "4"])
    with pytest.raises(UserError, match="--tokenizer is missing: --model tiny is a name that the server knows"):
        main([*arguments, "--model", "tiny", "--server", "http://127.0.0.1:9/v1"])


def test_without_the_client_package_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package openai is not installed; pip install openai$"):
        main(command(folder, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl"))


def test_two_processes_never_write_one_output(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None and len(server.asked) == 1:
            with pytest.raises(UserError, match="another process is writing it"):
                main(command(folder, server, tmp_path / "a.jsonl"))
            tried.append(True)
        return well(path, body)

    tried: list[bool] = []
    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--concurrency", "1"))
    assert tried == [True]
