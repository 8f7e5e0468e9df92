"""Answers of a model behind an OpenAI-compatible server: many requests in flight, each kept when it arrives."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import openai
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.files.records import Record
from megatron_solopo.data.sampling.client import Choice, Client, counts
from megatron_solopo.data.sampling.sampled import body_of, until_end
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.generation import Response
from megatron_solopo.evaluation.items import Item
from megatron_solopo.progress import ProgressBar

GREEDY = {"temperature": 0.0, "top_p": 1.0}


class FromServer:
    """The model ``--model`` of the server at ``--server``; see `backends.Backend`.

    With --server-api completions, its default, a prompt goes as token ids, so that the server is asked exactly what the
    model in this process would be; with chat, its messages go, which a server's own template renders.

    Raises:
        UserError: the server cannot be used.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._client = client = Client(options, tokenizer)
        self._chat = options.server_api == "chat"
        self._as_ids: set[str] = set()
        if client.kind == "transformers" and not self._chat:
            raise UserError(
                "option-conflict",
                f"--server-api completions: {options.server} is transformers serve, which accepts no token ids; use "
                "--server-api chat",
            )
        self.settings: Record = client.settings
        self.notes: Record = {"server_kind": client.kind, **client.notes}

    def prepare(self, asked: Mapping[str, Sequence[Item]]) -> None:
        if not self._chat:
            return
        for flag, items in asked.items():
            if not all(item.chats for item in items):
                raise UserError(
                    "option-conflict",
                    f"{flag} with --server-api chat: its prompts are not the messages of a chat alone; use "
                    "--server-api completions",
                )
            chats = ((item.id, chat) for item in items for chat in item.chats)
            self._as_ids |= self._client.as_ids(chats, lambda _, flag=flag: flag)

    def generate(
        self,
        items: Sequence[Item],
        index: int,
        max_new_tokens: int,
        label: str,
        before: Mapping[int, Response],
        add: Callable[[dict[int, Response]], None],
    ) -> list[Response]:
        """See `backends.Backend`.

        Raises:
            UserError: a request failed after its retries; answers to those in flight are awaited and kept.
        """
        responses = dict(before)
        with ProgressBar(desc=label, total=len(items), initial=len(before), unit=" answers", leave=False) as bar:

            async def answer(session: openai.AsyncOpenAI, number: int) -> None:
                item = items[number]
                chat = self._chat and item.id not in self._as_ids
                prompt = item.chats[index] if chat else item.prompts[index]
                body = self._client.body(prompt, **GREEDY, max_tokens=max_new_tokens)
                name = _name(label, item)
                read = partial(self._read, name, item.id, len(item.prompts[index]))
                response = await self._client.ask(session, name, body, read)
                if item.gold:
                    total = await self._log_prob(session, f"{name}/gold", item.prompts[index], item.gold)
                    response = replace(response, gold_log_prob=total / len(item.gold))
                responses[number] = response
                add({number: response})
                bar.update()

            self._client.each([number for number in range(len(items)) if number not in before], answer)
        return [responses[number] for number in range(len(items))]

    def _read(self, name: str, question: str, prompt_tokens: int, answer: Mapping[str, Any]) -> Response:
        [choice] = self._client.choices(name, answer, 1)
        self._client.compare_prompts(question, prompt_tokens, counts(answer).get("prompt_tokens"))
        return self._response(choice)

    def _response(self, choice: Choice) -> Response:
        if choice.ids is not None:
            body = body_of(choice.ids, choice.finished, self._client.stops)
            return Response(str(self._tokenizer.decode(body, skip_special_tokens=True)), choice.finished)
        return Response(*until_end(self._tokenizer, choice.text or "", choice.finished))

    def choose(
        self,
        items: Sequence[Item],
        index: int,
        label: str,
        before: Mapping[int, int],
        add: Callable[[dict[int, int]], None],
    ) -> list[int]:
        """See `backends.Backend`. Log-probs are those of OpenAI's ``echo``, a request for each choice.

        Raises:
            UserError: the server returns none, or a request failed; see `generate`.
        """
        chosen, scores = dict(before), dict[int, dict[int, float]]()
        with ProgressBar(desc=label, total=len(items), initial=len(before), unit=" questions", leave=False) as bar:

            async def answer(session: openai.AsyncOpenAI, request: tuple[int, int]) -> None:
                number, place = request
                item = items[number]
                name, tokens = f"{_name(label, item)}/{place}", item.choices[place]
                of_item = scores.setdefault(number, {})
                of_item[place] = await self._log_prob(session, name, item.prompts[index], tokens)
                if len(of_item) == len(item.choices):
                    chosen[number] = best = max(sorted(of_item), key=of_item.__getitem__)
                    add({number: best})
                    bar.update()

            left = [number for number in range(len(items)) if number not in before]
            self._client.each(
                [(number, place) for number in left for place in range(len(items[number].choices))], answer
            )
        return [chosen[number] for number in range(len(items))]

    async def _log_prob(
        self, session: openai.AsyncOpenAI, name: str, prompt: Sequence[int], tokens: Sequence[int]
    ) -> float:
        """Asks for the log-prob of tokens after a prompt."""
        ids = [*prompt, *tokens]
        body = self._client.body(ids, **GREEDY, max_tokens=1, echo=True, logprobs=1)
        return await self._client.ask(session, name, body, partial(self._read_log_prob, name, len(ids), len(tokens)))

    def _read_log_prob(self, name: str, length: int, count: int, answer: Mapping[str, Any]) -> float:
        """Returns the log-prob of the last ``count`` of ``length`` tokens, which one generated token may follow."""
        self._client.choices(name, answer, 1)
        log_probs = answer["choices"][0].get("logprobs")
        read = log_probs.get("token_logprobs") if isinstance(log_probs, dict) else None
        tokens = read[length - count : length] if isinstance(read, list) and length <= len(read) <= length + 1 else []
        if len(tokens) != count or not all(isinstance(one, int | float) for one in tokens):
            raise UserError(
                "server-log-probs-missing",
                f"--server {self._options.server}: request {name}: the answer has no log-probs of the prompt's tokens "
                "(echo), by which choices and gold answers are scored; use a server that has them, such as vLLM, or "
                "evaluate the folder without --server",
            )
        return float(sum(tokens))


def _name(label: str, item: Item) -> str:
    """Returns the name of a request."""
    return f"{label}/{item.id}" + ("" if item.depth is None else f"/{item.depth:g}")
