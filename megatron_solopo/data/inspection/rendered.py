"""A prompt as its chat template renders it: what the template writes around the messages, control tokens apart."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.inspection.blocks import visible
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.chat import render_prompt


@dataclass(frozen=True)
class Rendered:
    """A rendered prompt.

    Attributes:
        text: the whole of it.
        frames: what the template writes before each message of ``shown`` and after the last of them; its control
            tokens in the style "control".
        shown: the messages that are in the prompt as they are, or without spaces at their ends; none where the
            template rewrites the last one, and only that one where it rewrites others.
        content: start and end of the last message's content in ``text``; None where it is not there.
        cut: characters that the template took from the beginning of the last message's content.
    """

    text: str
    frames: list[Text]
    shown: list[Message]
    content: tuple[int, int] | None = None
    cut: int = 0


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Rendered:
    """Renders a chat with its generation prompt, and separates the template's text from that of the messages.

    A message may contain what a template writes ("user"), so the chat is rendered with placeholders to locate them.
    """
    text = render_prompt(tokenizer, messages)
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
    marked = render_prompt(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    pattern = re.compile("|".join(marks))
    frames = pattern.split(marked)
    variants = ([message["content"] for message in messages], [message["content"].strip() for message in messages])

    def rendered(frames: list[str], shown: list[Message], last: str) -> Rendered:
        end = len(text) - len(frames[-1])
        cut = messages[-1]["content"].find(last)
        return Rendered(text, [split_control(tokenizer, f) for f in frames], shown, (end - len(last), end), cut)

    if pattern.findall(marked) == marks:
        for contents in variants:
            parts = itertools.chain.from_iterable(itertools.zip_longest(frames, contents, fillvalue=""))
            if "".join(parts) == text:
                return rendered(frames, messages, contents[-1])
    for *_, last in variants:  # the template rewrites messages; the last one may still be there
        before, _, behind = text.rpartition(last or "\0")
        if len(before) + len(behind) < len(text):
            return rendered([before, behind], messages[-1:], last)
    return Rendered(text, [split_control(tokenizer, text)], [])


def split_control(tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """Returns a text of the template; control tokens are the tokenizer's added ones."""
    control = {str(token) for token in tokenizer.added_tokens_decoder.values()}.union(tokenizer.all_special_tokens)
    marked = Text(visible(text), "template")
    marked.highlight_words(sorted(filter(str.strip, control), key=len, reverse=True), "control")
    return marked
