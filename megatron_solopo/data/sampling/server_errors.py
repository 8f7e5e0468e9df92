"""Errors of a server, each in one line with what to change."""

from __future__ import annotations

import argparse
from typing import Any

import openai

from megatron_solopo.errors import UserError

KEPT = "what is finished is kept; repeat the command to resume"


class BadAnswer(Exception):
    """An answer with status 200 that does not follow the API; the message names the mistake."""


def reason(error: Exception) -> str:
    """Returns the reason of an error in a few words: what the server reports, or the connection."""
    if isinstance(error, openai.APIStatusError):
        return f"{error.status_code}: {_message(error)}"
    if isinstance(error, openai.APITimeoutError):
        return "no answer in time"
    if isinstance(error, openai.APIConnectionError):
        return _short(str(error.__cause__ or "") or "the connection failed")
    if isinstance(error, ValueError):
        return "the answer is not valid JSON"
    return _short(str(error))


def _message(error: openai.APIStatusError) -> str:
    """Returns the message of an error's body: OpenAI's ``message``, FastAPI's ``detail``, or its text."""
    body: Any = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return _short(str(body) if body else error.response.text or error.response.reason_phrase)


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= most else text[:most] + " ..."


def refuse_at_start(options: argparse.Namespace, error: openai.APIStatusError) -> None:
    """Raises a `UserError` where no request can succeed, as with a wrong key."""
    if error.status_code in (401, 403):
        raise _wrong_key(options, error)


def _wrong_key(options: argparse.Namespace, error: openai.APIStatusError) -> UserError:
    key = f"--api-key-env {options.api_key_env}" if options.api_key_env else "--api-key-env is missing"
    return UserError(
        "api-key-refused",
        f"{key}: the server refuses the key ({reason(error)}); set an environment variable that holds a valid one",
    )


def request_failed(options: argparse.Namespace, name: str, error: Exception) -> UserError:
    """Returns the error of a request that failed after all retries.

    Args:
        name: of the request.
    """
    server, tries = f"--server {options.server}", f"retries: {options.max_retries}"
    what = f"request {name}: {reason(error)}"
    if isinstance(error, openai.APITimeoutError):
        return UserError(
            "server-timeout",
            f"{server}: {what}; raise --request-timeout {options.request_timeout:g} or lower --concurrency "
            f"({tries}; {KEPT})",
        )
    if isinstance(error, openai.APIConnectionError):
        return UserError("server-unreachable", f"{server}: {what} ({tries}); check that it still runs ({KEPT})")
    if not isinstance(error, openai.APIStatusError):
        return UserError(
            "server-response", f"{server}: {what} ({tries}); check that it is an OpenAI-compatible server ({KEPT})"
        )
    status = error.status_code
    if status in (401, 403):
        return _wrong_key(options, error)
    if status == 404:
        return UserError(
            "server-model-missing",
            f"--model {options.model}: {server} does not have it, or its URL is not the API's, which mostly ends in "
            f"/v1 ({what})",
        )
    if status == 429:
        return UserError(
            "server-rate-limit", f"{server}: {what} ({tries}); lower --concurrency or raise --max-retries ({KEPT})"
        )
    if status >= 500:
        return UserError("server-failed", f"{server}: the server failed: {what} ({tries}); see its log ({KEPT})")
    return UserError("server-refuses-request", f"{server}: the server refuses {what} ({KEPT})")
