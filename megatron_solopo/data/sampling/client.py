"""A model behind an OpenAI-compatible server: its kind, requests to it, and answers that follow the API."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.sampling.server_errors import BadAnswer, reason, refuse_at_start, request_failed
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.control import control_tokens, end_of_turn_id
from megatron_solopo.errors import UserError
from megatron_solopo.terminal import write_line

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""The kind of a server by the ``owned_by`` of its models."""
FINISHED = {"stop": True, "length": False}
"""Whether a response ended by itself, by the server's ``finish_reason``."""
PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
SET: Mapping[str, Mapping[str, object]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **PENALTIES},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **PENALTIES},
    "llama.cpp": {
        "samplers": ["temperature", "top_p"],  # its default order applies the nucleus before the temperature
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dynatemp_range": 0.0,
        "mirostat": 0,
        "repeat_penalty": 1.0,
        "dry_multiplier": 0.0,
        **PENALTIES,
    },
    "transformers": {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
}
"""Fields that each kind of server is sent, so that only temperature and top-p shape the distribution. For fields that a
request lacks, a server uses its defaults or the checkpoint's generation_config.json."""
LEFT = "top-k, min-p, typical-p and penalties"
"""What another kind of server may apply and no field of OpenAI's API switches off."""
PARSED_OUT = ("reasoning_content", "reasoning", "tool_calls")
"""Fields for parts that servers remove from a message's text."""


@dataclass(frozen=True)
class Choice:
    """A response of an answer: its text (None if the server has changed it), token ids (None if not sent), and whether
    it ended by itself."""

    text: str | None
    ids: list[int] | None
    finished: bool


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: str) -> list[int]:
    """Returns the ids that end a response: the tokenizer's end of turn and those of generation_config.json.

    Raises:
        UserError: generation_config.json is not a JSON object.
    """
    path = Path(folder) / "generation_config.json"
    try:
        end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError):
        raise UserError(
            "not-json", f"{path}: not a JSON object; copy it again from where the model came from"
        ) from None
    ids = [] if end is None else end if isinstance(end, list) else [end]
    return sorted({end_of_turn_id(tokenizer), *ids})


class Client:
    """The model ``--model`` of the server at ``--server``.

    Args:
        options: those of `server_options.add_server_options`, ``model`` and ``tokenizer``.

    Attributes:
        kind: of `SET`, or ``other``.
        stops: ids that end a response.
        slots: the most choices of one answer; None: any number.

    Raises:
        UserError: the server cannot be used.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._key = "none"
        if options.api_key_env is not None:
            self._key = os.environ.get(options.api_key_env, "")
            if not self._key:
                raise UserError(
                    "api-key-missing", f"--api-key-env {options.api_key_env}: this environment variable is not set"
                )
        self.stops = stop_ids(tokenizer, options.tokenizer or options.model)
        self._values = template_kwargs.for_server(tokenizer) if options.server_api == "chat" else {}
        self.slots: int | None = None
        self.kind = asyncio.run(self._detect_kind())
        self._foreign = False
        sent: dict[str, object] = {"sent": SET.get(self.kind, {})}
        self.notes: dict[str, object] = {"sampling": sent}
        if self.kind not in SET:
            sent["left_to_the_server"] = LEFT
            write_line(
                f"warning: --server {options.server}: its kind is unknown; {LEFT} have the server's "
                "defaults and may change the distribution: switch them off there, or set its kind with --server-kind"
            )
        # What determines a response. Another host may resume the run, in smaller requests too.
        self.settings: dict[str, object] = {
            "backend": "server",
            "server_api": options.server_api,
            "server_kind": self.kind,
            "stop_ids": self.stops,
        }

    def _session(self) -> openai.AsyncOpenAI:
        options = self._options
        return openai.AsyncOpenAI(
            base_url=options.server,
            api_key=self._key,
            max_retries=options.max_retries,
            timeout=openai.Timeout(options.request_timeout, connect=min(options.request_timeout, 30)),
        )

    async def _detect_kind(self) -> str:
        """Returns the kind of the server.

        Raises:
            UserError: it cannot be reached, refuses the key, or does not have the model.
        """
        options = self._options
        async with self._session().with_options(max_retries=0, timeout=min(options.request_timeout, 30)) as session:
            try:
                listed = await session.get("/models", cast_to=object)
            except openai.APIStatusError as error:
                refuse_at_start(options, error)
                listed = None  # transformers serve fails here without a hub cache
            except (openai.APIConnectionError, ValueError) as error:
                raise UserError(
                    "server-unreachable",
                    f"--server {options.server}: cannot be reached ({reason(error)}); start it, or correct the URL",
                ) from None
            entries = listed.get("data") if isinstance(listed, dict) else None
            entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
            models = {str(entry.get("id")): str(entry.get("owned_by")) for entry in entries}
            kind = options.server_kind
            if kind == "auto":
                kind = next((kind for owner, kind in OWNERS.items() if owner in models.values()), None)
                kind = kind or await self._kind_by_paths(session)
            named = {options.model, options.model.partition(":")[0]}  # an adapter's name may follow its model's
            if kind in ("vllm", "sglang") and models and not named & models.keys():
                raise UserError(
                    "server-model-missing",
                    f"--model {options.model}: the server has no such model; it has {', '.join(models)}",
                )
            if kind == "llama.cpp":
                self.slots = await self._count_slots(session)
            return kind

    async def _count_slots(self, session: openai.AsyncOpenAI) -> int:
        """Returns the most choices of one answer of llama.cpp's server, which are as many as it has slots."""
        try:
            properties = await session.get(f"{self._root}/props", cast_to=object)
        except (openai.OpenAIError, ValueError):
            return 1
        slots = properties.get("total_slots") if isinstance(properties, dict) else None
        return slots if type(slots) is int and slots > 0 else 1

    @property
    def _root(self) -> str:
        return self._options.server.rstrip("/").removesuffix("/v1")

    async def _kind_by_paths(self, session: openai.AsyncOpenAI) -> str:
        """Recognises ``transformers serve`` by the paths that it serves."""
        try:  # after a failed listing it closes the connection, which the client sees when it uses it again
            description = await session.with_options(max_retries=2).get(f"{self._root}/openapi.json", cast_to=object)
        except (openai.OpenAIError, ValueError):
            return "other"
        paths = description.get("paths") if isinstance(description, dict) else None
        return "transformers" if isinstance(paths, dict) and "/load_model" in paths else "other"

    def as_ids(self, chats: Iterable[tuple[str, list[Message]]], where: Callable[[str], str]) -> set[str]:
        """Returns the ids of the questions that spell control tokens.

        A server that tokenizes texts would read these as control tokens, so such prompts are sent as token ids,
        whatever the API of the others.

        Args:
            chats: the messages of each question, by its id.
            where: the place of a question, first in the message.

        Raises:
            UserError: the server is not known to accept ids; the message names the first question.
        """
        spelled = control_tokens(self._tokenizer).spelled
        names = [name for name, chat in chats if any(spelled(one["content"], one["role"]) for one in chat)]
        if names and self.kind not in ("vllm", "sglang"):
            raise UserError(
                "control-token-server",
                f"{where(names[0])}: question {names[0]!r} spells control tokens ({len(names)} questions do), which "
                "this server would read as such; remove them, or repeat the command without --server"
                + ("" if self.kind == "transformers" else ", or with --server-api completions"),
            )
        return set(names)

    def body(self, prompt: list[int] | str | list[Message], **fields: object) -> dict[str, object]:
        """Returns the body of a request.

        Args:
            prompt: token ids or a text for ``/completions``, messages for ``/chat/completions``.
            fields: ``temperature``, ``top_p``, ``max_tokens`` and others of OpenAI's API.
        """
        kind, chat = self.kind, _is_chat(prompt)
        body: dict[str, object] = {"model": self._options.model, **fields}
        body["messages" if chat else "prompt"] = prompt
        if chat and self._values:
            body["chat_template_kwargs"] = self._values
        if kind != "transformers":
            body |= SET.get(kind, {})
        if kind in ("vllm", "sglang"):
            body |= {"stop_token_ids": self.stops, "return_token_ids": True}
        if kind == "sglang" and chat:
            body["separate_reasoning"] = False
        if kind == "llama.cpp" and chat:
            body["reasoning_format"] = "none"
        if kind == "transformers":
            temperature, most = fields["temperature"], fields["max_tokens"]
            config = {"do_sample": temperature != 0, **SET[kind], "eos_token_id": self.stops, "max_new_tokens": most}
            body["generation_config"] = json.dumps(config)
        return body

    def each[Request](
        self,
        requests: Iterable[Request],
        answer: Callable[[openai.AsyncOpenAI, Request], Coroutine[Any, Any, Request | None]],
    ) -> None:
        """Makes requests, --concurrency at a time.

        Args:
            answer: makes one request and keeps its result; returns what is left of it, which is requested next.

        Raises:
            UserError: a request failed after its retries; no other is started, and answers to those in flight are
                awaited and kept.
        """
        left, failures = iter(requests), list[UserError]()

        async def work(session: openai.AsyncOpenAI) -> None:
            for request in left:
                rest: Request | None = request
                while rest is not None and not failures:
                    try:
                        rest = await answer(session, rest)
                    except UserError as error:
                        failures.append(error)
                if failures:
                    return

        async def run() -> None:
            async with self._session() as session:
                await asyncio.gather(*(work(session) for _ in range(self._options.concurrency)))

        asyncio.run(run())
        if failures:
            raise failures[0]

    async def ask[Answer](
        self,
        session: openai.AsyncOpenAI,
        name: str,
        body: Mapping[str, object],
        read: Callable[[dict[str, Any]], Answer],
    ) -> Answer:
        """Sends a request, again where it fails for a time.

        Args:
            name: its ``X-Request-ID``, and its name in messages.
            read: reads the answer, and raises `BadAnswer` where that does not follow the API.

        Raises:
            UserError: it failed after all retries.
        """
        options = self._options
        path = "/chat/completions" if "messages" in body else "/completions"
        for attempt in range(options.max_retries + 1):
            try:
                answer = await session.post(
                    path, cast_to=object, body=body, options={"headers": {"X-Request-ID": quote(name)}}
                )
                if not isinstance(answer, dict):
                    raise BadAnswer("the answer is not a JSON object")
                return read(answer)
            except (BadAnswer, json.JSONDecodeError) as error:
                if attempt == options.max_retries:
                    raise request_failed(options, name, error) from None
                await asyncio.sleep(min(0.5 * 2**attempt, 8))
            except openai.OpenAIError as error:  # the client has retried it already
                raise request_failed(options, name, error) from None
        raise AssertionError("the last attempt returns or raises")

    def choices(self, name: str, answer: Mapping[str, Any], most: int) -> list[Choice]:
        """Returns the responses of an answer to the request ``name`` for ``most`` responses.

        Raises:
            BadAnswer: it does not follow the API.
            UserError: the server has removed a part of a response.
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise BadAnswer("the answer has no choices")
        if len(choices) > most:
            raise BadAnswer(f"the answer has {len(choices)} choices, {most} requested")
        read = [_choice(choice) for choice in choices]
        if any(choice.text is None for choice in read) and any(choice.ids is None for choice in read):
            raise UserError(
                "server-reasoning-parser",
                f"--server {self._options.server}: request {name}: the server removed reasoning or a tool call "
                "from the response; start it without a parser for them, or use --server-api completions",
            )
        return read

    def compare_prompts(self, question: str, here: int, there: int | None) -> None:
        """Warns once if the server's prompts have another number of tokens than those of training."""
        if there is None or there == here or self._foreign:
            return
        self._foreign = True
        write_line(
            f"warning: question {question!r} has {there} prompt tokens on the server and {here} here: its "
            "chat template or tokenizer differs; start it with the same one, or use --server-api completions"
        )


def counts(answer: Mapping[str, Any]) -> dict[str, int]:
    """Returns the numbers of tokens that an answer reports: ``prompt_tokens``, ``completion_tokens``."""
    usage = answer.get("usage")
    return {name: count for name, count in usage.items() if type(count) is int} if isinstance(usage, dict) else {}


def _is_chat(prompt: list[int] | str | list[Message]) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], dict)


def _choice(choice: object) -> Choice:
    """Reads a response.

    Raises:
        BadAnswer: it does not follow the API.
    """
    if not isinstance(choice, dict) or choice.get("finish_reason") not in list(FINISHED):  # any JSON, also unhashable
        reported = choice.get("finish_reason") if isinstance(choice, dict) else choice
        raise BadAnswer(f"a response has the finish_reason {reported!r}, supported are {', '.join(FINISHED)}")
    finished, ids = FINISHED[choice["finish_reason"]], choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise BadAnswer("token_ids is not a list of numbers")
    message: Any = choice.get("message")
    chat = isinstance(message, dict)
    text = message.get("content") if chat else choice.get("text")
    if chat and any(message.get(key) for key in PARSED_OUT):
        return Choice(None, ids, finished)
    if ids is None:
        if not isinstance(text, str):
            raise BadAnswer("a response has no text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadAnswer("a response holds half of a surrogate pair")
    return Choice(text if isinstance(text, str) else None, ids, finished)
