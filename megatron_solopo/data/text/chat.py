"""Chats to token ids: the one place where a prompt ends and a response begins.

A prompt is the chat template rendered with its generation prompt. A response is what a model writes behind that, and
the end-of-turn token, once; spaces, and control tokens that a text cannot show, are as the template writes them around
it. The ids of a prompt never depend on the response. Control tokens come from the template alone (`control`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.control import control_tokens, end_of_turn, end_of_turn_id
from megatron_solopo.data.text.tokenizer import Tokens, add_special_tokens, parse_batch, read_tokenizer
from megatron_solopo.errors import UserError


def load_tokenizer(
    folder: str | Path,
    chat_template: str | Path | None = None,
    eos_token: str | None = None,
    chat_template_kwargs: str | None = None,
    added_tokens: str | None = None,
    chat_template_date: str | None = None,
    begun_with: str | None = None,
    of_data: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, with its own chat template or the one in a file.

    ``chat_template_kwargs`` is a JSON object of values for the template's variables; None takes those that the
    folder came with, if any (`template_kwargs`).

    Its ``eos_token`` is the token that ends a turn: ``eos_token`` if given, else the special token that the
    chat template writes after an assistant's message, else the folder's. (Folders disagree with their
    templates: base models name the end of a text there, a bare ``tokenizer.json`` names nothing.)

    Args:
        added_tokens: --add-special-tokens of a training run; folders that a run exported hold them already.
        chat_template_date, begun_with, of_data: for a template that prints the date, see `template_kwargs.apply`.

    Raises:
        UserError: no tokenizer in the folder, no chat template or a broken one, no variable of it by that name, no
            end-of-turn (eos) token, or see `add_special_tokens`.
    """
    tokenizer = read_tokenizer(folder)
    if added_tokens is not None:
        add_special_tokens(tokenizer, added_tokens, folder)
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise UserError("file-missing", f"--chat-template {path}: no such file; give a Jinja chat template")
        tokenizer.chat_template = read_text("--chat-template", path)
    if not tokenizer.chat_template:
        raise UserError(
            "chat-template-missing",
            f"{folder}: the tokenizer has no chat template; give one with --chat-template FILE "
            "(examples/chat_templates/chatml.jinja is Qwen's)",
        )
    where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
    try:
        template_kwargs.apply(tokenizer, chat_template_kwargs, str(folder), chat_template_date, begun_with, of_data)
        written = _template_end_of_turn(tokenizer, where)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            "chat-template-invalid",
            f"{where}: line {error.lineno}: no valid Jinja template ({error.message}); repair it",
        ) from None
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise UserError(
            "token-unknown", f"--eos-token {eos_token}: no such token in {folder}; give the token that ends a turn"
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
    """The special token that the chat template writes right after an assistant's message, if any.

    Raises:
        UserError: the template, which ``where`` names, does not write the message.
    """
    marker = "solopo end of message"
    try:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        text = template_kwargs.rendered(tokenizer, chat)
    except jinja2.TemplateSyntaxError:
        raise
    except jinja2.TemplateError:
        return None  # a template with demands of its own; the folder's eos_token stands
    if marker not in text:
        raise UserError(
            "chat-template-invalid",
            f"{where}: the chat template does not write an assistant's message; give another template",
        )
    tail = text.rpartition(marker)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    endings = (token for token in special.union(tokenizer.all_special_tokens) if tail.startswith(token))
    return max(endings, key=len, default=None)


_BOUNDARY = 64
"""Characters at the end of a prompt that decide how the first tokens behind it are cut, and hold its last tags."""

_TAG = "[<\u25c1][^<>\u25c1\u25b7\\s]+[>\u25b7]"
_OPENED = re.compile(rf"(?:{_TAG}\s*)+$")
"""The tags that a generation prompt ends with, such as ``<think>``."""
_CLOSED = re.compile(r"(<([^<>/\s]+)>)\s*</\2>\s*$")
"""A thought that a generation prompt opens and closes, as Qwen3's without thinking."""
_THOUGHT = re.compile(r"<([\w:]*(?:think|thought|reason)[\w:]*)>\s*$")
"""A thought that a generation prompt leaves open."""


class _Chat:
    """Messages that are rendered and tokenised with no control token but the template's.

    Texts of it hold aliases where a message spells control tokens (`control`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self.messages, self._reader = self._control.hide(messages)

    def render(self, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """The first ``count`` messages, None for all.

        Raises:
            UserError: the template refuses them.
        """
        try:
            return template_kwargs.rendered(
                self._tokenizer, self.messages[:count], add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:  # templates refuse roles and orders that they do not know
            raise UserError("chat-template-refuses", f"the chat template refuses the messages ({error})") from None

    def shown(self, text: str) -> str:
        """The text as a person reads it."""
        return text if self._reader is None else self._reader.exchange(text, self._reader.aliases)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """See `tokenizer.parse_batch`."""
        if self._reader is None:
            return parse_batch(self._tokenizer, texts)
        return self._reader.encode_batch([self._reader.exchange(text) for text in texts])

    def ids(self, *texts: str) -> list[list[int]]:
        return [tokens if isinstance(tokens, list) else tokens.ids for tokens in self.encode_batch(texts)]

    def starts(self, text: str) -> list[int]:
        """The character that each token of a text begins with; tokenizers with a Rust backend only."""
        if self._reader is None:
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return [start for start, _ in encoding["offset_mapping"]]
        (tokens,) = self._reader.encode_batch([self._reader.exchange(text)])
        return [start for start, _ in tokens.offsets]

    def ids_behind(self, before: str, text: str) -> list[int]:
        """Token ids of a text that follows another one. A tokenizer that puts a space before every text puts none here;
        a token that would reach over the border is cut there, as generation cuts it."""
        tail = before[-_BOUNDARY:]
        alone, together = self.ids(tail, tail + text)
        if together[: len(alone)] == alone:
            return together[len(alone) :]
        return self.ids(text)[0]

    def answer(self, prompt: str, count: int) -> str:
        """What the model writes behind ``prompt``, whose answer is message ``count - 1``, with the end of turn where
        the template writes it right behind.

        Where the template rewrites a response (drops or adds a thought), it is taken as it was given.

        Raises:
            UserError: the response opens a thought that the generation prompt has closed.
        """
        full, response = self.render(count), self.messages[count - 1]["content"]
        if full.startswith(prompt):
            body, end, _ = full[len(prompt) :].partition(end_of_turn(self._tokenizer))
            if body.strip() == response.strip() or self._framed(body, response):
                return body + end
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
                "again; give the --chat-template-kwargs that the responses were sampled with, or remove the example",
            )
        return response

    def _framed(self, body: str, response: str) -> bool:
        """Whether a template writes control tokens around a response, which its text cannot show (gpt-oss)."""
        return self._control.spelled(body, "assistant") and "".join(response.split()) in "".join(body.split())


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The prompt as text, ending where the response starts."""
    chat = _Chat(tokenizer, messages)
    return chat.shown(chat.render(add_generation_prompt=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a prompt, ending where the response starts; the template has put every special token there."""
    chat = _Chat(tokenizer, messages)
    return chat.ids(chat.render(add_generation_prompt=True))[0]


def prompt_length(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> int:
    """How many token ids `prompt_ids` has, without making the list."""
    chat = _Chat(tokenizer, messages)
    return len(chat.encode_batch([chat.render(add_generation_prompt=True)])[0])


def prompt_starts(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """The character of `render_prompt` that each id of `prompt_ids` begins with, by a tokenizer with a Rust backend."""
    chat = _Chat(tokenizer, messages)
    return chat.starts(chat.render(add_generation_prompt=True))


def open_thought(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What closes the thought that the generation prompt opens, ``</think>``; None where it opens none."""
    try:
        opened = _THOUGHT.search(render_prompt(tokenizer, [{"role": "user", "content": "?"}])[-_BOUNDARY:])
    except UserError:  # a template that wants other messages
        return None
    return f"</{opened[1]}>" if opened else None


def response_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Token ids of a response to ``messages``, its last id the end-of-turn token, exactly once.

    Templates differ in what follows a turn (Qwen adds a newline that the model never generates);
    everything after the end-of-turn token is left out.

    Raises:
        UserError: the response has no token, or the template refuses the messages or does not fit the response.
    """
    return _one_turn(tokenizer, body_ids(tokenizer, messages, response))


def body_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Token ids of a response without its end of turn; see `response_ids`."""
    chat = _Chat(tokenizer, [*messages, {"role": "assistant", "content": response}])
    prompt = chat.render(len(messages), add_generation_prompt=True)
    return _before_end(tokenizer, chat.ids_behind(prompt, chat.answer(prompt, len(messages) + 1)))


def _before_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids without the end of turn that the template wrote.

    Raises:
        UserError: there is one before the last, which the tokenizer has made of the response's own text.
    """
    if tokenizer.eos_token_id in ids[:-1]:
        raise UserError(
            "control-token-in-text",
            f"a response holds the end of turn {tokenizer.eos_token}, which this tokenizer cannot take as text; remove "
            "the example, or give another --eos-token",
        )
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _one_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids of a response and the end of turn."""
    if not ids:
        raise UserError("response-empty", "a response has no token before its end of turn; remove the example")
    return [*ids, end_of_turn_id(tokenizer)]


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int], list[bool]]:
    """A conversation as (prompt ids, continuation ids, which continuation ids are learnt).

    The prompt ends before the first assistant message; in the continuation the assistant's tokens, each
    turn's end included, are marked True.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chat, end = _Chat(tokenizer, messages), end_of_turn(tokenizer)
    prompt = rendered = chat.render(turns[0], add_generation_prompt=True)
    ids: list[int] = []
    learnt: list[bool] = []
    for index in turns:
        before = chat.render(index, add_generation_prompt=True)
        if not rendered.endswith(end) and before.startswith(rendered + end):
            rendered += end  # behind a response that was taken as it was given
        if not before.startswith(rendered):
            raise UserError(
                "chat-template-rewrites",
                "the chat template rewrites earlier turns, so a multi-turn conversation cannot be learnt "
                "in one pass; split it into one record a turn",
            )
        answer = chat.answer(before, index + 1)
        # What the template writes after the end of turn belongs to the next stretch.
        stretch = chat.ids_behind(rendered, before[len(rendered) :])
        response = _one_turn(tokenizer, _before_end(tokenizer, chat.ids_behind(before, answer)))
        ids += [*stretch, *response]
        learnt += [False] * len(stretch) + [True] * len(response)
        rendered = before + answer
    return chat.ids(prompt)[0], ids, learnt
