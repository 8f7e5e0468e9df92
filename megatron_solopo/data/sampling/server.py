"""Sampling from an OpenAI-compatible server: many requests in flight, each answer written when it arrives.

A request is named ``ID/NUMBER`` after its question and its first sample, and has that name as ``X-Request-ID``. A
command that resumes repeats only the requests that were in flight when it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from urllib.parse import quote

import openai
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.records import read_jsonl
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import Responses, SampledJobs, runs
from megatron_solopo.data.sampling.sampled import Statistics, from_ids, from_texts
from megatron_solopo.data.sampling.server_errors import BadAnswer, reason, refuse_at_start, request_failed
from megatron_solopo.data.text.chat import render_prompt
from megatron_solopo.data.text.control import control_tokens, end_of_turn_id
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar
from megatron_solopo.terminal import write_line

SAMPLES_PER_REQUEST = 8
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
class Request:
    """A request for the samples ``first`` to ``first + count - 1`` of a question."""

    prompt: Prompt
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.prompt.id}/{self.first}"


def request_seed(seed: int, question_id: str, first: int) -> int:
    """Returns a seed of 31 bits, derived from the run's seed, the question and the number of the first sample."""
    digest = hashlib.sha256(f"{seed}\0{question_id}\0{first}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


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


class FromServer:
    """Samples from the model ``--model`` of the server at ``--server``.

    Raises:
        UserError: the server cannot be used, or it does not support an option.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        self._options, self._tokenizer, self._prompts = options, tokenizer, prompts
        self._key = "none"
        if options.api_key_env is not None:
            self._key = os.environ.get(options.api_key_env, "")
            if not self._key:
                raise UserError(
                    "api-key-missing", f"--api-key-env {options.api_key_env}: this environment variable is not set"
                )
        self._stops = stop_ids(tokenizer, options.tokenizer or options.model)
        self._values = template_kwargs.for_server(tokenizer) if options.server_api == "chat" else {}
        self._most = SAMPLES_PER_REQUEST
        self._kind = asyncio.run(self._detect_kind())
        self._as_text = self._kind == "transformers" and options.server_api == "completions"
        self._as_ids = self._prompts_as_ids()
        self._with_start = set(self._prompts_with_start()) if self._as_text else set()
        self._foreign = False
        sent: dict[str, object] = {"sent": SET.get(self._kind, {})}
        self.notes: dict[str, object] = {"sampling": sent}
        if self._kind not in SET:
            sent["left_to_the_server"] = LEFT
            write_line(
                f"warning: --server {options.server}: its kind is unknown; {LEFT} have the server's "
                "defaults and may change the distribution: switch them off there, or set its kind with --server-kind"
            )
        # What determines a response. Another host may resume the run, in smaller requests too.
        self.settings: dict[str, object] = {
            "backend": "server",
            "server_api": options.server_api,
            "server_kind": self._kind,
            "stop_ids": self._stops,
        }

    def _client(self) -> openai.AsyncOpenAI:
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
        async with self._client().with_options(max_retries=0, timeout=min(options.request_timeout, 30)) as client:
            try:
                listed = await client.get("/models", cast_to=object)
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
                kind = kind or await self._kind_by_paths(client)
            named = {options.model, options.model.partition(":")[0]}  # an adapter's name may follow its model's
            if kind in ("vllm", "sglang") and models and not named & models.keys():
                raise UserError(
                    "server-model-missing",
                    f"--model {options.model}: the server has no such model; it has {', '.join(models)}",
                )
            if kind == "llama.cpp":
                self._most = min(self._most, await self._slots(client))
            return kind

    async def _slots(self, client: openai.AsyncOpenAI) -> int:
        """Returns the most choices of one answer of llama.cpp's server, which are as many as it has slots."""
        try:
            properties = await client.get(f"{self._root}/props", cast_to=object)
        except (openai.OpenAIError, ValueError):
            return 1
        slots = properties.get("total_slots") if isinstance(properties, dict) else None
        return slots if type(slots) is int and slots > 0 else 1

    @property
    def _root(self) -> str:
        return self._options.server.rstrip("/").removesuffix("/v1")

    async def _kind_by_paths(self, client: openai.AsyncOpenAI) -> str:
        """Recognises ``transformers serve`` by the paths that it serves."""
        try:  # after a failed listing it closes the connection, which the client sees when it uses it again
            description = await client.with_options(max_retries=2).get(f"{self._root}/openapi.json", cast_to=object)
        except (openai.OpenAIError, ValueError):
            return "other"
        paths = description.get("paths") if isinstance(description, dict) else None
        return "transformers" if isinstance(paths, dict) and "/load_model" in paths else "other"

    def _text(self, prompt: Prompt, with_start: bool) -> str:
        """Returns the prompt as text, for transformers serve, which puts the tokenizer's start token before it."""
        start = str(self._tokenizer.bos_token or "")
        text = render_prompt(self._tokenizer, prompt.messages).removeprefix(start)
        return start + text if with_start else text

    def _prompts_with_start(self) -> Iterator[str]:
        """Yields the ids of the questions whose text needs the start token.

        Raises:
            UserError: a prompt's text has other tokens than the prompt, with the start token and without it.
        """
        for prompt in self._prompts:
            fits = [
                self._tokenizer(self._text(prompt, form))["input_ids"] == list(prompt.ids) for form in (False, True)
            ]
            if not any(fits):
                raise UserError(
                    "server-adds-tokens",
                    f"question {prompt.id!r}: transformers serve would add tokens to the prompt; use --server-api chat",
                )
            if not fits[0]:
                yield prompt.id

    def _prompts_as_ids(self) -> set[str]:
        """Returns the ids of the questions that spell control tokens.

        A server that tokenizes texts would read these as control tokens, so such prompts are sent as token ids,
        whatever the API of the others.

        Raises:
            UserError: the server is not known to accept ids; the message names the first question.
        """
        options = self._options
        if options.server_api == "completions" and not self._as_text:
            return set()  # all prompts are sent as ids
        spelled = control_tokens(self._tokenizer).spelled
        names = [p.id for p in self._prompts if any(spelled(m["content"], m["role"]) for m in p.messages)]
        if names and self._kind not in ("vllm", "sglang"):
            where = next(where for where, record in read_jsonl(options.contexts) if record["id"] == names[0])
            raise UserError(
                "control-token-server",
                f"{where}: question {names[0]!r} spells control tokens ({len(names)} questions do), which this server "
                "would read as such; remove them, or sample without --server"
                + ("" if self._as_text or self._kind == "transformers" else ", or with --server-api completions"),
            )
        return set(names)

    def _api(self, prompt: Prompt) -> str:
        return "completions" if prompt.id in self._as_ids else self._options.server_api

    def _body(self, request: Request) -> dict[str, object]:
        options, kind, prompt = self._options, self._kind, request.prompt
        body: dict[str, object] = {
            "model": options.model,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "seed": request_seed(options.seed, prompt.id, request.first),
        }
        if request.count > 1:
            body["n"] = request.count
        if self._api(prompt) == "completions":
            body["prompt"] = self._text(prompt, prompt.id in self._with_start) if self._as_text else list(prompt.ids)
        else:
            body["messages"] = prompt.messages
            if self._values:
                body["chat_template_kwargs"] = self._values
        if kind != "transformers":
            body |= SET.get(kind, {})
        if kind in ("vllm", "sglang"):
            body |= {"stop_token_ids": self._stops, "return_token_ids": True}
        if kind == "sglang" and self._api(prompt) == "chat":
            body["separate_reasoning"] = False
        if kind == "llama.cpp" and self._api(prompt) == "chat":
            body["reasoning_format"] = "none"
        if kind == "transformers":
            config = {"do_sample": options.temperature > 0, **SET[kind]}
            config |= {"eos_token_id": self._stops, "max_new_tokens": options.max_new_tokens}
            body["generation_config"] = json.dumps(config)
        return body

    def run(self, jobs: SampledJobs, statistics: Statistics) -> None:
        """Requests the missing responses of ``jobs``.

        Raises:
            UserError: a request failed after its retries; answers to the requests in flight are awaited and kept.
        """
        samples = self._options.samples
        total = len(self._prompts) * samples
        before = total - sum(len(jobs.missing(name, samples)) for name in self._prompts.names)
        if before:
            print(f"resuming: {before} of {total} responses were sampled before")
        with ProgressBar(desc="sampling", total=total, initial=before, unit="response") as bar:
            asyncio.run(self._run(jobs, statistics, bar))

    def _requests(self, jobs: SampledJobs) -> Iterator[Request]:
        options = self._options
        several = options.temperature > 0 and self._kind != "transformers"
        count = options.samples_per_request or (self._most if several else 1)
        for index, name in enumerate(self._prompts.names):
            missing = jobs.missing(name, options.samples)
            # A request asks for consecutive samples; finished samples can lie between the missing ones.
            for run in runs(missing):
                for numbers in batched(run, count):
                    yield Request(self._prompts[index], numbers[0], len(numbers))

    async def _run(self, jobs: SampledJobs, statistics: Statistics, bar: ProgressBar) -> None:
        requests = self._requests(jobs)
        failures: list[UserError] = []

        async def work() -> None:
            for request in requests:
                # Servers may ignore ``n`` and return one response; the rest is requested again.
                while request.count and not failures:
                    try:
                        responses = await self._ask(client, request, statistics)
                        jobs.add_samples(responses, request.first)
                    except UserError as error:
                        failures.append(error)
                        return
                    count = len(responses.responses)
                    bar.update(count)
                    request = Request(request.prompt, request.first + count, request.count - count)
                if failures:
                    return

        async with self._client() as client:
            await asyncio.gather(*(work() for _ in range(self._options.concurrency)))
        if failures:
            raise failures[0]

    async def _ask(self, client: openai.AsyncOpenAI, request: Request, statistics: Statistics) -> Responses:
        options = self._options
        path = "/chat/completions" if self._api(request.prompt) == "chat" else "/completions"
        for attempt in range(options.max_retries + 1):
            try:
                answer = await client.post(
                    path,
                    cast_to=object,
                    body=self._body(request),
                    options={"headers": {"X-Request-ID": quote(request.name)}},
                )
                return self._read(request, answer, statistics)
            except (BadAnswer, json.JSONDecodeError) as error:
                if attempt == options.max_retries:
                    raise request_failed(options, request.name, error) from None
                await asyncio.sleep(min(0.5 * 2**attempt, 8))
            except openai.OpenAIError as error:  # the client has retried it already
                raise request_failed(options, request.name, error) from None
        raise AssertionError("the last attempt returns or raises")

    def _read(self, request: Request, answer: object, statistics: Statistics) -> Responses:
        """Reads the responses of an answer.

        Raises:
            BadAnswer: it does not follow the API.
        """
        if not isinstance(answer, dict):
            raise BadAnswer("the answer is not a JSON object")
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise BadAnswer("the answer has no choices")
        if len(choices) > request.count:
            raise BadAnswer(f"the answer has {len(choices)} choices, {request.count} requested")
        read = [_choice(choice, self._api(request.prompt)) for choice in choices]
        finished = [end for _, _, end in read]
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = {name: count for name, count in usage.items() if type(count) is int}
        self._compare_prompts(request.prompt, counts.get("prompt_tokens"))
        ids = [ids for _, ids, _ in read if ids is not None]
        if len(ids) == len(read):
            return from_ids(self._tokenizer, request.prompt, ids, finished, self._stops, statistics)
        texts = [text for text, _, _ in read if text is not None]
        if len(texts) < len(read):
            raise UserError(
                "server-reasoning-parser",
                f"--server {self._options.server}: request {request.name}: the server removed reasoning or a tool call "
                "from the response; start it without a parser for them, or use --server-api completions",
            )
        tokens = counts.get("completion_tokens")
        return from_texts(self._tokenizer, request.prompt, texts, finished, tokens, statistics)

    def _compare_prompts(self, prompt: Prompt, tokens: int | None) -> None:
        """Warns once if the server's prompts have another number of tokens than those of training."""
        if tokens is None or tokens == len(prompt.ids) or self._foreign:
            return
        self._foreign = True
        write_line(
            f"warning: question {prompt.id!r} has {tokens} prompt tokens on the server and {len(prompt.ids)} here: its "
            "chat template or tokenizer differs; start it with the same one, or use --server-api completions"
        )


def _choice(choice: object, api: str) -> tuple[str | None, list[int] | None, bool]:
    """Returns a response's text (None if the server has changed it), token ids (None if not sent) and whether it ended.

    Raises:
        BadAnswer: it does not follow the API.
    """
    if not isinstance(choice, dict) or choice.get("finish_reason") not in list(FINISHED):  # any JSON, also unhashable
        reported = choice.get("finish_reason") if isinstance(choice, dict) else choice
        raise BadAnswer(f"a response has the finish_reason {reported!r}, supported are {', '.join(FINISHED)}")
    finished, ids = FINISHED[choice["finish_reason"]], choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise BadAnswer("token_ids is not a list of numbers")
    message = choice.get("message") if api == "chat" else choice
    text = message.get("content" if api == "chat" else "text") if isinstance(message, dict) else None
    if isinstance(message, dict) and any(message.get(key) for key in PARSED_OUT):
        return None, ids, finished
    if ids is None:
        if not isinstance(text, str):
            raise BadAnswer("a response has no text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadAnswer("a response holds half of a surrogate pair")
    return text, ids, finished
