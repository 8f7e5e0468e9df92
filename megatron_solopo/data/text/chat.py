"""Chats to token ids: the one place where a prompt ends and a response begins.

A prompt is the chat template rendered with its generation prompt; a response is what the template adds
after it, up to and including the end-of-turn token, once. Prompt and response are tokenised apart, as a
generating model sees them, so that the ids of a prompt never depend on the response.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.tokenizer import add_special_tokens, encode, read_tokenizer
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
        chat_template_date, begun_with, of_data: for a template that prints the date, see `template_kwargs.give`.

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
            raise UserError(f"--chat-template {path}: no such file; give a Jinja chat template")
        tokenizer.chat_template = read_text("--chat-template", path)
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template; give one with --chat-template FILE "
            "(examples/chat_templates/chatml.jinja is Qwen's)"
        )
    where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
    try:
        template_kwargs.give(tokenizer, chat_template_kwargs, str(folder), chat_template_date, begun_with, of_data)
        written = _template_end_of_turn(tokenizer, where)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: no valid Jinja template ({error.message}); repair it") from None
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise UserError(f"--eos-token {eos_token}: no such token in {folder}; give the token that ends a turn")
    end_of_turn = eos_token or written
    if end_of_turn is not None and end_of_turn != tokenizer.eos_token:
        tokenizer.eos_token = end_of_turn
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer names no eos_token and the chat template writes no special token "
            "after a message; set eos_token in tokenizer_config.json to the token that ends a turn"
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
        text = tokenizer.apply_chat_template(chat, tokenize=False, **template_kwargs.rendering(tokenizer))
    except jinja2.TemplateSyntaxError:
        raise
    except jinja2.TemplateError:
        return None  # a template with demands of its own; the folder's eos_token stands
    if marker not in text:
        raise UserError(f"{where}: the chat template does not write an assistant's message; give another template")
    tail = text.rpartition(marker)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    endings = (token for token in special.union(tokenizer.all_special_tokens) if tail.startswith(token))
    return max(endings, key=len, default=None)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The prompt as text, ending where the response starts."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs.rendering(tokenizer),
        )
    except jinja2.TemplateError as error:  # templates refuse roles and orders that they do not know
        raise UserError(f"the chat template refuses the messages ({error})") from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a prompt, ending where the response starts; the template has put every special token there."""
    return encode(tokenizer, render_prompt(tokenizer, messages))


def response_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Token ids of a response to ``messages``, its last id the end-of-turn token, exactly once.

    Templates differ in what follows a turn (Qwen adds a newline that the model never generates);
    everything after the first end-of-turn token is left out.

    Raises:
        UserError: the response has no token, or the template refuses the messages.
    """
    return _one_turn(tokenizer, body_ids(tokenizer, messages, response))


def body_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> list[int]:
    """Token ids of a response without its end of turn; none where its text begins with that."""
    prompt = render_prompt(tokenizer, messages)
    full = _render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    return _before_end(tokenizer, encode(tokenizer, _written(prompt, full, response)))


def _written(prompt: str, full: str, response: str) -> str:
    """What a chat template writes for a response behind its prompt, ``full`` being the whole chat.

    Some templates rewrite the history or open a thought in the prompt, and some drop the thought from a response (as
    DeepSeek-R1's do); then the response is taken as it was sampled. Spaces a template may write otherwise.
    """
    written = full.removeprefix(prompt) if full.startswith(prompt) else ""
    return written if "".join(response.split()) in "".join(written.split()) else response


def _before_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return ids


def _one_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids up to the first end of turn, which is put there if the template wrote none."""
    ids = _before_end(tokenizer, ids)
    if not ids:
        raise UserError("a response has no token before its end of turn; remove the example")
    return [*ids, tokenizer.eos_token_id]


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[int], list[bool]]:
    """A conversation as (prompt ids, continuation ids, which continuation ids are learnt).

    The prompt ends before the first assistant message; in the continuation the assistant's tokens, each
    turn's end included, are marked True.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    rendered = ""
    texts: list[str] = []  # what stands before a response, the response; before the next, the next; ...
    for index in turns:
        before = render_prompt(tokenizer, messages[:index])
        full = before + _written(before, _render(tokenizer, messages[: index + 1]), messages[index]["content"])
        if not before.startswith(rendered):
            raise UserError(
                "the chat template rewrites earlier turns, so a multi-turn conversation cannot be learnt "
                "in one pass; split it into one record a turn"
            )
        texts += [before[len(rendered) :], full[len(before) :]]
        # What the template writes after the end of turn belongs to the next stretch.
        end = full.find(tokenizer.eos_token, len(before))
        rendered = full[: end + len(tokenizer.eos_token)] if end >= 0 else full
    prompt, *stretches = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    learnt: list[bool] = []
    for number, stretch in enumerate(stretches):
        response = number % 2 == 0
        if response:
            stretch = _one_turn(tokenizer, stretch)
        ids += stretch
        learnt += [response] * len(stretch)
    return prompt, ids, learnt
