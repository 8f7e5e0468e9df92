"""Chats to token ids: this module alone decides where a prompt ends and a response starts.

A prompt is the chat template rendered with its generation prompt. A response is what a model writes after it, ended by
one end-of-turn token; spaces around it, and control tokens that a text cannot show, are as the template writes them.
The ids of a prompt never depend on the response. Only the template writes control tokens (`control`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.control import control_tokens, end_of_turn, end_of_turn_id
from megatron_solopo.data.text.tokenizer import Tokens, add_special_tokens, parse_batch, read_tokenizer
from megatron_solopo.data.validation import TOOL_CALLS, TOOLS, tool_names
from megatron_solopo.errors import UserError


def load_tokenizer(
    folder: str | Path,
    chat_template: str | Path | None = None,
    eos_token: str | None = None,
    chat_template_kwargs: str | None = None,
    added_tokens: str | None = None,
    chat_template_date: str | None = None,
    of_resumed: str | None = None,
    of_data: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder, with the folder's chat template or one from a file.

    The tokenizer's ``eos_token`` is the token that ends a turn: the argument ``eos_token``, else the special token that
    the chat template writes after an assistant's message, else the folder's. (Folders can disagree with their
    templates: those of base models name the end of a text, and a bare ``tokenizer.json`` names none.)

    Args:
        folder: of the tokenizer.
        chat_template: path of a Jinja template; None uses the folder's.
        eos_token: --eos-token.
        chat_template_kwargs: JSON object of values for the template's variables; None uses those that the folder
            records, if any (`template_kwargs`).
        added_tokens: --add-special-tokens of a training run; folders that a run exported have them already.
        chat_template_date, of_resumed, of_data: for a template that prints the date, see `template_kwargs.apply`.

    Raises:
        UserError: the folder has no tokenizer; the chat template is missing, invalid, or lacks a variable that is set;
            there is no end-of-turn (eos) token; or as `add_special_tokens`.
    """
    tokenizer = read_tokenizer(folder)
    if added_tokens is not None:
        add_special_tokens(tokenizer, added_tokens, folder)
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise UserError("file-missing", f"--chat-template {path}: no such file; set a Jinja chat template")
        tokenizer.chat_template = read_text("--chat-template", path)
    if not tokenizer.chat_template:
        raise UserError(
            "chat-template-missing",
            f"{folder}: the tokenizer has no chat template; set one with --chat-template FILE "
            "(examples/chat_templates/chatml.jinja is Qwen's)",
        )
    where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
    try:
        template_kwargs.apply(tokenizer, chat_template_kwargs, str(folder), chat_template_date, of_resumed, of_data)
        written = _template_end_of_turn(tokenizer, where)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            "chat-template-invalid",
            f"{where}: line {error.lineno}: no valid Jinja template ({error.message}); repair it",
        ) from None
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise UserError(
            "token-unknown", f"--eos-token {eos_token}: no such token in {folder}; set the token that ends a turn"
        )
    end = eos_token or written
    if end is not None and end != tokenizer.eos_token:
        tokenizer.eos_token = end
    if tokenizer.eos_token_id is None:
        raise UserError(
            "eos-token-missing",
            f"{folder}: the tokenizer names no eos_token and the chat template writes no special token "
            "after a message; set eos_token in tokenizer_config.json to the token that ends a turn",
        )
    return tokenizer


def _template_end_of_turn(tokenizer: PreTrainedTokenizerBase, where: str) -> str | None:
    """Returns the special token that the chat template writes right after an assistant's message, if any.

    Raises:
        UserError: the template does not write the message; ``where`` names the template.
    """
    marker = "solopo end of message"
    try:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        text = template_kwargs.rendered(tokenizer, chat)
    except jinja2.TemplateSyntaxError:
        raise
    except jinja2.TemplateError:
        return None  # the template requires other messages; the folder's eos_token is used
    if marker not in text:
        raise UserError(
            "chat-template-invalid",
            f"{where}: the chat template does not write an assistant's message; use another template",
        )
    tail = text.rpartition(marker)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    endings = (token for token in special.union(tokenizer.all_special_tokens) if tail.startswith(token))
    return max(endings, key=len, default=None)


_BOUNDARY = 64
"""Characters at the end of a prompt that determine the first tokens after it, and contain its last tags."""

_TAG = "[<\u25c1][^<>\u25c1\u25b7\\s]+[>\u25b7]"
_OPENED = re.compile(rf"(?:{_TAG}\s*)+$")
"""The tags that a generation prompt ends with, such as ``<think>``."""
_CLOSED = re.compile(r"(<([^<>/\s]+)>)\s*</\2>\s*$")
"""A thought that a generation prompt opens and closes, as Qwen3's does without thinking."""
_THOUGHT = re.compile(r"<([\w:]*(?:think|thought|reason)[\w:]*)>\s*$")
"""A thought that a generation prompt leaves open."""


class _Chat:
    """Messages that are rendered and tokenized so that only the template's control tokens count.

    Its texts have aliases where a message spells control tokens (`control`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self.messages, self._reader = self._control.hide(messages)

    def render(self, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """Renders the first ``count`` messages, or all of them.

        Raises:
            UserError: the template refuses them, or does not write their tools.
        """
        names = tool_names(self.messages[0])
        tools = self.messages[0][TOOLS] if names else None
        chat = [{name: field for name, field in message.items() if name != TOOLS} for message in self.messages[:count]]
        try:
            text = template_kwargs.rendered(
                self._tokenizer, chat, add_generation_prompt=add_generation_prompt, tools=tools
            )
        except jinja2.TemplateError as error:  # templates refuse unknown roles and orders
            raise UserError("chat-template-refuses", f"the chat template refuses the messages ({error})") from None
        for name in names:
            if name not in text:
                raise UserError(
                    "chat-template-refuses",
                    f"the chat template does not write the tool {self.shown(name)!r}; set a --chat-template that "
                    f"writes tools, or remove the field '{TOOLS}'",
                )
        for number, message in enumerate(chat):
            if message["role"] == "system" and message["content"].strip() not in text:
                self._check_written(chat, number)
        return text

    def _check_written(self, chat: list[Message], number: int) -> None:
        """Refuses a template that leaves out a system message; one may rewrite it (SmolLM3's takes commands out)."""
        marker = "solopo system message"
        chat = [*chat[:number], chat[number] | {"content": marker}, *chat[number + 1 :]]
        if marker not in template_kwargs.rendered(self._tokenizer, chat):
            raise UserError(
                "chat-template-refuses",
                f"the chat template does not write message {number + 1}, whose role is system; remove it, or begin the "
                "user's message with it",
            )

    def shown(self, text: str) -> str:
        """Returns the text without aliases."""
        return text if self._reader is None else self._reader.exchange(text, self._reader.aliases)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """See `tokenizer.parse_batch`."""
        if self._reader is None:
            return parse_batch(self._tokenizer, texts)
        return self._reader.encode_batch([self._reader.exchange(text) for text in texts])

    def ids(self, *texts: str) -> list[list[int]]:
        return [tokens if isinstance(tokens, list) else tokens.ids for tokens in self.encode_batch(texts)]

    def ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Returns the token ids of a text and the characters of each, (start, end); None for a tokenizer without a Rust
        backend."""
        if self._reader is None:
            (tokens,) = parse_batch(self._tokenizer, [text], offsets=True)
        else:
            (tokens,) = self._reader.encode_batch([self._reader.exchange(text)])
        return (tokens, None) if isinstance(tokens, list) else (tokens.ids, tokens.offsets)

    def ids_and_places(self, text: str, content: str, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the token ids of a rendered prompt, and which of them has each of these characters of its last
        message's ``content``, or is the next one; no place where the template rewrites the message, or for a tokenizer
        without a Rust backend."""
        if not places:
            return self.ids(text)[0], []  # offsets cost half as much again as ids
        ids, offsets = self.ids_and_offsets(text)
        start = text.rfind(content.strip())
        if offsets is None or start < 0:
            return ids, []
        start -= len(content) - len(content.lstrip())
        ends = [end for _, end in offsets]  # not starts: a word's token may begin with the space before it
        return ids, [bisect_right(ends, start + place) for place in places]

    def ids_after(self, before: str, text: str) -> list[int]:
        """Returns the token ids of a text that follows another one.

        A tokenizer that puts a space before every text puts none before this one. A token that would cross the border
        is split there, as in generation.
        """
        tail = before[-_BOUNDARY:]
        alone, together = self.ids(tail, tail + text)
        if together[: len(alone)] == alone:
            return together[len(alone) :]
        return self.ids(text)[0]

    def answer(self, prompt: str, count: int) -> str:
        """Returns what the model writes after ``prompt``, whose answer is message ``count - 1``.

        It includes the end of turn if the template writes that right after the answer. A response that the
        template rewrites (drops or adds a thought) is returned unchanged. Tool calls are as the template writes them.

        Raises:
            UserError: the response opens a thought that the generation prompt closes; the template does not write a
                tool call.
        """
        full, response = self.render(count), self.messages[count - 1]["content"]
        calls = self.messages[count - 1].get(TOOL_CALLS)
        if full.startswith(prompt):
            body, end, _ = full[len(prompt) :].partition(end_of_turn(self._tokenizer))
            if calls:
                self._check_calls(body, calls)
                return body + end
            if body.strip() == response.strip() or self._framed(body, response):
                return body + end
        if calls:
            raise UserError(
                "chat-template-rewrites",
                "the chat template writes something else before a message with tool calls than its generation prompt; "
                "set the --chat-template-kwargs that the responses were sampled with, or another --chat-template",
            )
        end, start = prompt[-_BOUNDARY:], response.lstrip()
        opened, closed = _OPENED.search(end), _CLOSED.search(end)
        tags = opened[0] if opened else ""
        for tag in re.finditer(_TAG, tags):
            repeated = tags[tag.start() :]
            if tag[0][1] != "/" and start.startswith(repeated.strip()):
                spaces = repeated[len(repeated.rstrip()) :]
                return start.removeprefix(repeated.strip()).removeprefix(spaces)
        if closed and start.startswith(closed[1]):
            raise UserError(
                "response-reopens-thought",
                f"the chat template's generation prompt has opened and closed {closed[1]}, and the response opens it "
                "again; set the --chat-template-kwargs that the responses were sampled with, or remove the example",
            )
        return response

    @staticmethod
    def _check_calls(body: str, calls: Sequence[Mapping[str, Any]]) -> None:
        """Refuses a template that leaves out a call, which would then not be trained on."""
        for call in calls:
            name = call.get("function", call)["name"]
            if name not in body:
                raise UserError(
                    "chat-template-refuses",
                    f"the chat template does not write the call of the tool {name!r}; set a --chat-template that "
                    "writes tool_calls",
                )

    def _framed(self, body: str, response: str) -> bool:
        """Whether the template writes control tokens around a response that its text cannot show (gpt-oss)."""
        return self._control.spelled(body, "assistant") and "".join(response.split()) in "".join(body.split())


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Returns the prompt as text, which ends where the response starts."""
    chat = _Chat(tokenizer, messages)
    return chat.shown(chat.render(add_generation_prompt=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Returns the token ids of a prompt, which end where the response starts. All special tokens are the template's."""
    chat = _Chat(tokenizer, messages)
    return chat.ids(chat.render(add_generation_prompt=True))[0]


def prompt_length(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> int:
    """Returns the number of token ids of `prompt_ids` without making the list."""
    chat = _Chat(tokenizer, messages)
    return len(chat.encode_batch([chat.render(add_generation_prompt=True)])[0])


def prompt_starts(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Returns the character of `render_prompt` at which each id of `prompt_ids` starts; needs a Rust backend."""
    chat = _Chat(tokenizer, messages)
    _, offsets = chat.ids_and_offsets(chat.render(add_generation_prompt=True))
    assert offsets is not None
    return [start for start, _ in offsets]


def prompt_and_places(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], places: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Returns `prompt_ids`, and which of them has each of these characters of the last message, see
    `_Chat.ids_and_places`."""
    chat = _Chat(tokenizer, messages)
    return chat.ids_and_places(chat.render(add_generation_prompt=True), chat.messages[-1]["content"], places)


def open_thought(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the closing tag of the thought that the generation prompt opens, ``</think>``; None if it opens none."""
    try:
        opened = _THOUGHT.search(render_prompt(tokenizer, [{"role": "user", "content": "?"}])[-_BOUNDARY:])
    except UserError:  # the template requires other messages
        return None
    return f"</{opened[1]}>" if opened else None


def response_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Returns the token ids of a response to ``messages``; the end-of-turn token is the last id and occurs once.

    What a template writes after the end-of-turn token is left out (Qwen's writes a newline, which the model never
    generates).

    Raises:
        UserError: the response has no token, or the template refuses the messages or the response.
    """
    return _one_turn(tokenizer, body_ids(tokenizer, messages, response))


def body_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Returns the token ids of a response without its end of turn; see `response_ids`."""
    chat = _Chat(tokenizer, [*messages, {"role": "assistant", "content": response}])
    prompt = chat.render(len(messages), add_generation_prompt=True)
    return _before_end(tokenizer, chat.ids_after(prompt, chat.answer(prompt, len(messages) + 1)))


def _before_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Returns the ids without the template's end of turn.

    Raises:
        UserError: an earlier id is the end of turn, which the response's text spells.
    """
    if tokenizer.eos_token_id in ids[:-1]:
        raise UserError(
            "control-token-in-text",
            f"a response holds the end of turn {tokenizer.eos_token}, which this tokenizer cannot read as text; remove "
            "the example, or set another --eos-token",
        )
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _one_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Returns the ids of a response with the end of turn.

    Raises:
        UserError: the response has no id.
    """
    if not ids:
        raise UserError("response-empty", "a response has no token before its end of turn; remove the example")
    return [*ids, end_of_turn_id(tokenizer)]


def turns_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], turns: list[Message]
) -> tuple[list[int], list[bool]]:
    """Returns the token ids of a response of several turns to ``messages``, and its loss mask, true for the
    assistant's tokens; see `conversation_ids`."""
    _, _, ids, loss_mask = _turns(_Chat(tokenizer, [*messages, *turns]), tokenizer, len(messages))
    return ids, loss_mask


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], start: int = 0
) -> tuple[list[int], list[int], list[bool]]:
    """Returns a conversation as (prompt ids, completion ids, loss mask of the completion).

    The prompt ends before the first assistant message from message ``start`` on. The loss mask is True for the
    assistant's tokens, each end of turn included.

    Raises:
        UserError: the template rewrites earlier turns, or as `response_ids`.
    """
    chat = _Chat(tokenizer, messages)
    prompt, _, ids, loss_mask = _turns(chat, tokenizer, start)
    return chat.ids(prompt)[0], ids, loss_mask


def conversation_and_places(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], places_in: Callable[[str], Sequence[int]]
) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Returns `conversation_ids`, and behind the prompt ids which of them has each character that ``places_in`` returns
    of the prompt's last message, see `_Chat.ids_and_places`."""
    chat = _Chat(tokenizer, messages)
    prompt, content, ids, loss_mask = _turns(chat, tokenizer, 0)
    return *chat.ids_and_places(prompt, content, places_in(content)), ids, loss_mask


def _turns(chat: _Chat, tokenizer: PreTrainedTokenizerBase, start: int) -> tuple[str, str, list[int], list[bool]]:
    """Returns the rendered prompt of `conversation_ids`, its last message, the completion ids and their loss mask."""
    messages = chat.messages
    turns = [index for index, message in enumerate(messages) if index >= start and message["role"] == "assistant"]
    end = end_of_turn(tokenizer)
    prompt = rendered = chat.render(turns[0], add_generation_prompt=True)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for index in turns:
        before = chat.render(index, add_generation_prompt=True)
        if not rendered.endswith(end) and before.startswith(rendered + end):
            rendered += end  # after a response that the template rewrites
        if not before.startswith(rendered):
            raise UserError(
                "chat-template-rewrites",
                "the chat template rewrites earlier turns, so a multi-turn conversation cannot be trained "
                "on in one pass; split it into one record per turn",
            )
        answer = chat.answer(before, index + 1)
        # What the template writes after the end of turn belongs to the text between the turns.
        between = chat.ids_after(rendered, before[len(rendered) :])
        response = _one_turn(tokenizer, _before_end(tokenizer, chat.ids_after(before, answer)))
        ids += [*between, *response]
        loss_mask += [False] * len(between) + [True] * len(response)
        rendered = before + answer
    return prompt, messages[turns[0] - 1]["content"] or "", ids, loss_mask
