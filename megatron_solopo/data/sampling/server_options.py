"""The options of a server, for every command that generates responses from one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from megatron_solopo.errors import UserError, require
from megatron_solopo.model_folder import download

SERVER: Mapping[str, object] = {
    "server_kind": "auto",
    "concurrency": 32,
    "request_timeout": 600.0,
    "max_retries": 8,
    "api_key_env": None,
}
"""The defaults of the options; that of --server-api is the command's."""
TITLE = "from a server (vLLM, SGLang, llama.cpp, transformers serve, ...)"


def add_server_options(group: argparse._ArgumentGroup, api: str) -> None:
    """Adds the options; ``api`` is the default of --server-api."""
    group.add_argument("--server", metavar="URL", help="base URL, such as http://localhost:8000/v1")
    group.add_argument(
        "--server-api",
        choices=("chat", "completions"),
        help="chat: the server applies its chat template; completions: it receives the prompt's tokens "
        f"(default: {api})",
    )
    group.add_argument(
        "--server-kind",
        choices=("auto", "vllm", "sglang", "llama.cpp", "transformers", "other"),
        help="determines which fields beyond OpenAI's are sent; auto: detected from the server (default)",
    )
    group.add_argument("--concurrency", type=int, metavar="N", help="requests in flight (default: 32)")
    group.add_argument("--request-timeout", type=float, metavar="S", help="seconds a request may take (default: 600)")
    group.add_argument(
        "--max-retries",
        type=int,
        metavar="N",
        help="times a failed request is repeated, after 0.5 s, 1 s, 2 s and so on up to 8 s (default: 8)",
    )
    group.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the API key (default: no key)"
    )


def set_defaults(
    options: argparse.Namespace, in_process: Mapping[str, object], of_server: Mapping[str, object]
) -> None:
    """Sets the defaults of the options that only one of the two back ends has, where they were not passed.

    Raises:
        UserError: an option of the other back end was passed.
    """
    unread, needed = (in_process, "leave --server out") if options.server else (of_server, "needs --server")
    for name in unread:
        if getattr(options, name) is not None:
            raise UserError("option-unused", f"--{name.replace('_', '-')} would have no effect: {needed}")
    for name, default in (of_server if options.server else in_process).items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def check_server_options(options: argparse.Namespace) -> None:
    """Checks the options of a server after `set_defaults`; nothing without --server.

    Raises:
        UserError: a value is wrong, or the client or the tokenizer is missing.
    """
    if not options.server:
        return
    for name, low in (("concurrency", 1), ("max_retries", 0)):
        value = getattr(options, name)
        if value < low:
            raise UserError("option-value", f"--{name.replace('_', '-')} {value}: set a number of at least {low}")
    if options.concurrency > 1000:
        raise UserError(
            "option-value", f"--concurrency {options.concurrency}: the client has 1000 connections; set at most 1000"
        )
    if not options.request_timeout > 0:
        raise UserError(
            "option-value", f"--request-timeout {options.request_timeout}: set a positive number of seconds"
        )
    require("--server", "openai", "server")
    if not _is_url(options.server):
        raise UserError(
            "option-value", f"--server {options.server}: not a URL; set one such as http://localhost:8000/v1"
        )
    if options.tokenizer is None and not Path(options.model).is_dir():
        raise UserError(
            "option-missing",
            f"--tokenizer is missing: --model {options.model} is a name on the server; set the Hugging Face folder of "
            "its tokenizer" + (f" ({hub})" if (hub := download(options.model)) else ""),
        )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
