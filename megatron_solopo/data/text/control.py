"""Control tokens: the tokens that frame the turns of a chat. Only the chat template writes them, never a text.

A control token is a special token of the tokenizer, or another added token that the chat template writes around
messages (DeepSeek-R1's ``<｜User｜>`` is not marked as special). A document, question, system prompt or response that
spells one is tokenized as text. Added tokens that are neither (Qwen's ``<tool_call>``, ``<think>``) are words of the
vocabulary in every text, as for ``split_special_tokens`` of transformers. Some special tokens are meant for
responses: those of --add-special-tokens, and pairs of tags, ``<think>`` and ``</think>``. They are words in the
assistant's texts, unless they have a role (``eos_token``) or frame messages, and control tokens elsewhere.

The tokenizers library matches added tokens before anything else, so a chat that spells one is read by another
tokenizer: the same one, with an alias of private-use characters in the place of each control token. Messages take the
aliases before the chat template is rendered, so that a control token in the rendered chat is the template's. Then names
and aliases change places: the other tokenizer finds the template's control tokens, with all that the tokenizer does
around them, and the names are text. An alias is as long as its name, so positions in a text stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.schema import Message
from megatron_solopo.data.validation import TOOL_CALLS, TOOLS, texts_of
from megatron_solopo.errors import UserError

RESPONSE_TOKENS = "response_tokens"
"""Key of the tokens of --add-special-tokens in a tokenizer's ``init_kwargs``, and so in tokenizer_config.json."""

_BRACKETED = re.compile(r"[<\[\u25c1\u3010]\S+[>\]\u25b7\u3011]")

_NUMBER, _MARKS = 0xF0000, range(0x100000, 0x10FFFE)
"""Private-use characters: the first one that numbers the aliases, and those with which all aliases of a reader can
begin."""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the token that ends a turn, which every tokenizer of `chat.load_tokenizer` has."""
    assert isinstance(tokenizer.eos_token, str)
    return tokenizer.eos_token


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of `end_of_turn`."""
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


class ControlTokens:
    """The control tokens of a tokenizer with its chat template, and the tokenization of chats that spell them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if isinstance(backend, Tokenizer) else None
        # No text can do without spaces, or a token of one character such as "!" as padding.
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        added = {text: token for text, token in added.items() if len(text) > 1 and not text.isspace()}
        special = {text for text, token in added.items() if token.special}
        special |= added.keys() & set(tokenizer.all_special_tokens)
        # A token that is not special and has no brackets, such as "###", is a word, in a template as in any text.
        around, between = _written(tokenizer, special | set(filter(_BRACKETED.fullmatch, added)))
        frame = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str | AddedToken)}
        frame |= around
        words = set(tokenizer.init_kwargs.get(RESPONSE_TOKENS) or ())
        words |= {tag for name in added if name.startswith("</") for tag in (name, f"<{name[2:]}")}
        self._added, self._names = added, _longest_first(special | around | between)
        self._prompt = self._patterns(self._names)
        self._response = self._patterns(_longest_first((special - words) | frame & added.keys()))
        self._readers: dict[str, _Reader] = {}

    def _patterns(self, names: Sequence[str]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Patterns of the names in a text, and of those that the tokenizer looks for in the normalised text."""
        normalizer = self._backend.normalizer if self._backend is not None else None
        normalised = [normalizer.normalize_str(n) for n in names if self._added[n].normalized] if normalizer else []
        return _any_of(names), _any_of(filter(None, normalised))

    def spelled(self, text: str, role: str = "user") -> bool:
        """Whether a text of this role spells a control token."""
        raw, normalised = self._response if role == "assistant" else self._prompt
        if raw is not None and raw.search(text):
            return True
        normalizer = self._backend.normalizer if self._backend is not None else None
        return bool(normalised and normalizer and normalised.search(normalizer.normalize_str(text)))

    def reader(self, texts: Iterable[str]) -> _Reader:
        """Returns a reader whose aliases occur in none of the texts.

        Raises:
            UserError: the tokenizer cannot read a control token as text.
        """
        characters = set().union(*texts)
        mark = next(chr(number) for number in _MARKS if chr(number) not in characters)
        if mark not in self._readers:
            if self._backend is None:
                raise UserError(
                    "control-token-in-text",
                    "a text holds a control token, and only a tokenizer with a tokenizer.json can read it as text; "
                    "use such a tokenizer, or remove the example",
                )
            words = {name for name in self._names if self._added[name].single_word}
            self._readers[mark] = _Reader(self._backend, self._names, words, mark)
        return self._readers[mark]

    def hide(self, messages: list[Message]) -> tuple[list[Message], _Reader | None]:
        """Returns messages with aliases for the control tokens that they spell, and the reader of the aliases, if any.

        Raises:
            UserError: the tokenizer cannot read a control token as text.
        """
        texts = [(message, texts_of(message)) for message in messages]
        if not any(self.spelled(text, message["role"]) for message, each in texts for text in each):
            return messages, None
        reader = self.reader(text for _, each in texts for text in each)
        hidden = []
        for message in messages:
            names, _ = self._response if message["role"] == "assistant" else self._prompt
            hidden.append(message if names is None else _exchanged(message, partial(reader.exchange, pattern=names)))
        return hidden, reader


def _exchanged(message: Message, exchange: Callable[[str], str]) -> Message:
    """Returns a message whose `texts_of` are exchanged."""

    def each(value: Any) -> Any:
        if isinstance(value, str):
            return exchange(value)
        if isinstance(value, dict):
            return {exchange(name): each(one) for name, one in value.items()}
        return [each(one) for one in value] if isinstance(value, list) else value

    return {name: each(value) if name in ("content", TOOL_CALLS, TOOLS) else value for name, value in message.items()}


class _Reader:
    """A tokenizer with aliases for its control tokens.

    Args:
        names: its control tokens, the longest first.
        words: the control tokens that match whole words only.
        mark: the character with which the aliases start.

    Raises:
        UserError: the tokenizer does not read an alias as its control token.
    """

    def __init__(self, backend: Tokenizer, names: Sequence[str], words: Collection[str], mark: str) -> None:
        aliases = {name: mark + chr(number) + mark * (len(name) - 2) for number, name in enumerate(names, _NUMBER)}
        self._other = aliases | {alias: name for name, alias in aliases.items()}
        self.aliases = _any_of(aliases.values())
        bounds = ((re.escape(name), r"(?<!\w)%s(?!\w)" if name in words else "%s") for name in names)
        self._both = re.compile(
            "|".join([*(bound % name for name, bound in bounds), *map(re.escape, aliases.values())])
        )
        self._tokenizer = Tokenizer.from_str(_renamed(backend.to_str(), aliases))
        for name, alias in aliases.items():
            probe = "{0}" if name in words else "{0} a{0}b"
            theirs = backend.encode(probe.format(name), add_special_tokens=False)
            if theirs.ids != self._tokenizer.encode(probe.format(alias), add_special_tokens=False).ids:
                raise UserError(
                    "control-token-in-text",
                    f"a text holds a control token, and this tokenizer cannot read {name} as text; use another "
                    "tokenizer, or remove the example",
                )

    def exchange(self, text: str, pattern: re.Pattern[str] | None = None) -> str:
        """Replaces names by aliases and aliases by names, all of them or those that the pattern matches."""
        return (pattern or self._both).sub(lambda match: self._other[match[0]], text)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Returns the tokens of texts in which aliases are control tokens and names are text."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[object, ...], ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Returns the control tokens of a tokenizer; they are computed once."""
    facts = (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    cached = _CACHE.get(tokenizer)
    if cached is None or cached[0] != facts:
        cached = _CACHE[tokenizer] = (facts, ControlTokens(tokenizer))
    return cached[1]


def _written(tokenizer: PreTrainedTokenizerBase, names: Collection[str]) -> tuple[set[str], set[str]]:
    """Returns the names that the chat template writes around a past exchange, and those between its question and
    answer, where it can open a thought that responses close."""
    if not names or not tokenizer.chat_template:
        return set(), set()
    texts = ("solopo question", "solopo answer", "solopo next question")
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)]
    try:
        rendered = template_kwargs.rendered(tokenizer, chat)
    except jinja2.TemplateError:
        return set(), set()
    before, _, rest = rendered.partition(texts[0])
    between, _, after = rest.partition(texts[1])
    return {n for n in names if n in before or n in after}, {n for n in names if n in between}


def _longest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (-len(name), name))


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    pattern = "|".join(map(re.escape, _longest_first(names)))
    return re.compile(pattern) if pattern else None


def _renamed(tokenizer_json: str, aliases: dict[str, str]) -> str:
    """Returns a tokenizer.json with aliases for some tokens, so that no text has these tokens any more."""
    document = json.loads(tokenizer_json)
    document |= {"truncation": None, "padding": None, "post_processor": None}
    for token in document["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = document["model"]
    if isinstance(model["vocab"], dict):
        renamed = aliases.keys() & model["vocab"].keys()
        model["vocab"] = {aliases.get(word, word): number for word, number in model["vocab"].items()}
    else:
        renamed = aliases.keys() & {word for word, _ in model["vocab"]}
        model["vocab"] = [[aliases.get(word, word), score] for word, score in model["vocab"]]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if renamed and "merges" in model:  # SentencePiece's pieces "</" and "s>" would make "</s>"
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if renamed.isdisjoint((*pair, "".join(pair)))]
    return json.dumps(document)
