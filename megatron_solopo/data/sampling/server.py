"""Sampling from an OpenAI-compatible server: many requests in flight, each answer written when it arrives.

A request is named ``ID/NUMBER`` after its question and its first sample, and has that name as ``X-Request-ID``. A
command that resumes repeats only the requests that were in flight when it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import batched
from typing import Any

import openai
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.files.records import read_jsonl
from megatron_solopo.data.sampling.client import Client, counts
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import Responses, SampledJobs, runs
from megatron_solopo.data.sampling.sampled import Statistics, from_ids, from_texts
from megatron_solopo.data.text.chat import render_prompt
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar

SAMPLES_PER_REQUEST = 8


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


class FromServer:
    """Samples from the model ``--model`` of the server at ``--server``.

    Raises:
        UserError: the server cannot be used, or it does not support an option.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        self._options, self._tokenizer, self._prompts = options, tokenizer, prompts
        self._client = client = Client(options, tokenizer)
        self.notes, self.settings = client.notes, client.settings
        self._as_text = client.kind == "transformers" and options.server_api == "completions"
        self._as_ids = self._prompts_as_ids()
        self._with_start = set(self._prompts_with_start()) if self._as_text else set()

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
        """Returns the ids of the questions whose prompts are sent as ids though others are not; see `Client.as_ids`."""
        options = self._options
        if options.server_api == "completions" and not self._as_text:
            return set()  # all prompts are sent as ids

        def where(name: str) -> str:
            return next(where for where, record in read_jsonl(options.contexts) if record["id"] == name)

        return self._client.as_ids(((prompt.id, prompt.messages) for prompt in self._prompts), where)

    def _body(self, request: Request) -> dict[str, object]:
        options, prompt = self._options, request.prompt
        fields: dict[str, object] = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "seed": request_seed(options.seed, prompt.id, request.first),
        }
        if request.count > 1:
            fields["n"] = request.count
        if options.server_api == "chat" and prompt.id not in self._as_ids:
            return self._client.body(prompt.messages, **fields)
        text = self._text(prompt, prompt.id in self._with_start) if self._as_text else list(prompt.ids)
        return self._client.body(text, **fields)

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

            async def answer(session: openai.AsyncOpenAI, request: Request) -> Request | None:
                def read(one: Mapping[str, Any]) -> Responses:
                    return self._read(request, one, statistics)

                responses = await self._client.ask(session, request.name, self._body(request), read)
                jobs.add_samples(responses, request.first)
                count = len(responses.responses)
                bar.update(count)
                if count == request.count:
                    return None
                # Servers may ignore ``n`` and return one response; the rest is requested again.
                return Request(request.prompt, request.first + count, request.count - count)

            self._client.each(self._requests(jobs), answer)

    def _requests(self, jobs: SampledJobs) -> Iterator[Request]:
        options, client = self._options, self._client
        several = options.temperature > 0 and client.kind != "transformers"
        most = min(SAMPLES_PER_REQUEST, client.slots or SAMPLES_PER_REQUEST)
        count = options.samples_per_request or (most if several else 1)
        for index, name in enumerate(self._prompts.names):
            missing = jobs.missing(name, options.samples)
            # A request asks for consecutive samples; finished samples can lie between the missing ones.
            for run in runs(missing):
                for numbers in batched(run, count):
                    yield Request(self._prompts[index], numbers[0], len(numbers))

    def _read(self, request: Request, answer: Mapping[str, Any], statistics: Statistics) -> Responses:
        """Reads the responses of an answer; see `Client.choices`."""
        read = self._client.choices(request.name, answer, request.count)
        finished, tokens = [choice.finished for choice in read], counts(answer)
        self._client.compare_prompts(request.prompt.id, len(request.prompt.ids), tokens.get("prompt_tokens"))
        ids = [choice.ids for choice in read if choice.ids is not None]
        if len(ids) == len(read):
            return from_ids(self._tokenizer, request.prompt, ids, finished, self._client.stops, statistics)
        texts = [choice.text or "" for choice in read]
        return from_texts(self._tokenizer, request.prompt, texts, finished, tokens.get("completion_tokens"), statistics)
