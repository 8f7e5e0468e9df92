"""The server of a recipe: started with a model's folder before a stage that asks it, and handed the next folder.

serving:
  url: http://127.0.0.1:8000/v1
  command: vllm serve $model --served-model-name policy --port 8000    # left out: a server that runs already
  reload:                                # requests that put another folder into a running server, in this order
    /collective_rpc: {method: reload_weights, kwargs: {weights_path: $model}}
    /reset_prefix_cache:
stages:
  responses:
    served: base-hf                      # the folder that the server must have
    sample-responses: {model: policy, tokenizer: base-hf, ...}
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin

from megatron_solopo.errors import UserError
from megatron_solopo.stage_process import Locks, start
from megatron_solopo.variables import filled

LOG = Path("server.log")
"""What a server of a recipe prints, in the output folder."""

END_SECONDS = 60
"""Time that a server has to end after SIGTERM."""


@dataclass(frozen=True)
class Serving:
    """How a recipe's server is reached, started and handed a folder, ``$model`` in what follows.

    Attributes:
        where: its ``file:line``.
        url: base URL of its API, which ends in /v1.
        command: words of the command that starts it; (): it runs already.
        ready: path that answers with 200 once the server can be asked.
        reload: path -> JSON body (None: no body) of each request that makes a running server load a folder; {}: a
            server is ended and started again.
        timeout: seconds that a start or a request may take.
    """

    where: str
    url: str
    command: Sequence[str] = ()
    ready: str = "/health"
    reload: Mapping[str, object] = field(default_factory=dict)
    timeout: float = 600.0

    def place(self, path: str) -> str:
        """Returns the URL of a path of the server, beside /v1."""
        return urljoin(self.url.rstrip("/").removesuffix("/v1") + "/", path.lstrip("/"))

    def with_model(self, value: object, folder: str) -> object:
        """Returns a part of the command or of a request with the folder for ``$model``."""
        return filled(value, {"model": folder})[0]

    def readable(self, folder: str) -> str:
        """Returns how the server gets a folder, as a person would do it."""
        words = self.with_model(list(self.command), _absolute(folder))
        return " ".join(words) if isinstance(words, list) and words else f"POST {', '.join(self.reload)} at {self.url}"


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute()) if Path(folder).is_dir() else folder


class Server:
    """The server while a recipe runs; a context manager, which ends what it started.

    Args:
        environment: variables of the recipe.
        locks: held by the server too, so that the next run waits for its end.
    """

    def __init__(self, serving: Serving | None, environment: Mapping[str, str], locks: Locks) -> None:
        self._serving, self._environment, self._locks = serving, environment, locks
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def provide(self, folder: str | None) -> None:
        """Makes the server have a folder; None: a stage that does not ask it, for which a server without ``reload``
        ends, so that its memory is free.

        Raises:
            UserError: it cannot be started, or does not take the folder.
        """
        serving = self._serving
        if serving is None:
            return
        if folder is None:
            if not serving.reload:
                self._end()
            return
        running = self._process is not None and self._process.poll() is None
        if folder == self._folder and (running or not serving.command):
            return
        if serving.reload and (running or not serving.command):
            self._reload(serving, folder)
        else:
            self._end()
            self._start(serving, folder)
        self._folder = folder

    def ending(self) -> str:
        """Returns how a server that has ended by itself ended, for the message about a stage; "" while it runs."""
        if self._process is None or (status := self._process.poll()) is None:
            return ""
        return f" (the server has ended with status {status}, see {LOG.absolute()})"

    def _start(self, serving: Serving, folder: str) -> None:
        ready = serving.place(serving.ready)
        if _answers(ready):
            raise UserError(
                "server-other",
                f"{serving.where}: serving: a server answers at {ready} already; end it, or leave command: out",
            )
        words = serving.with_model(list(serving.command), _absolute(folder))
        assert isinstance(words, list)
        started = time.monotonic()
        print(f"server: {' '.join(words)}", flush=True)
        with LOG.open("ab") as log:
            self._process = start(words, os.environ | self._environment, self._locks, log)
        while not _answers(ready):
            late = time.monotonic() - started > serving.timeout
            if late or self._process.poll() is not None:
                how = f"did not answer at {ready} in {serving.timeout:g} s" if late else "ended"
                ending = "" if late else f" with status {self._process.returncode}"
                self._end()
                raise UserError(
                    "server-start",
                    f"{serving.where}: serving: the server {how}{ending}; see {LOG.absolute()}, correct command: or "
                    "raise timeout:",
                )
            time.sleep(0.1)
        print(f"server: ready after {time.monotonic() - started:.1f} s", flush=True)

    def _reload(self, serving: Serving, folder: str) -> None:
        started = time.monotonic()
        for path, body in serving.reload.items():
            reason = _post(serving.place(path), serving.with_model(body, _absolute(folder)), serving.timeout)
            if reason:
                raise UserError(
                    "server-reload",
                    f"{serving.where}: serving: reload: POST {serving.place(path)} failed ({reason}){self.ending()}; "
                    "correct it, or leave reload: out to restart the server",
                )
        print(f"server: loaded {folder} in {time.monotonic() - started:.1f} s", flush=True)

    def _end(self) -> None:
        process, self._process, self._folder = self._process, None, None
        if process is None:
            return
        self._signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        self._signal(process, signal.SIGKILL)  # what is left of it
        process.wait()

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # its session has no process any more
            os.killpg(process.pid, number)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _post(url: str, body: object, timeout: float) -> str:
    """Makes a request.

    Returns:
        Why it failed; "" where it did not. vLLM's /reset_prefix_cache fails with status 200 and ``"success": false``.
    """
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = _short(answer.read())
    except urllib.error.HTTPError as error:
        return f"{error.code}: {_short(error.read()) or error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    with contextlib.suppress(ValueError):
        read = json.loads(text)
        return text if isinstance(read, dict) and read.get("success") is False else ""
    return ""


def _short(body: bytes, most: int = 200) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= most else text[:most] + " ..."
