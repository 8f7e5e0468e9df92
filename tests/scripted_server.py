"""An HTTP server with the answers of a test, and sample-responses as its client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tiny_models import write_lines, write_model

LISTED = {"object": "list", "data": [{"id": "tiny", "owned_by": "someone"}]}


class Scripted:
    """A real HTTP server on a free port; ``answer(path, body)`` returns (status, document or bytes)."""

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
    servers: list[Scripted] = []

    def start(answer: Callable[[str, dict[str, Any] | None], tuple[int, Any]]) -> Scripted:
        servers.append(Scripted(answer))
        return servers[-1]

    yield start
    for one in servers:
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
