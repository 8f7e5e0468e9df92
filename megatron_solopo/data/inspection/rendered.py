"""A prompt as its chat template renders it: what the template writes around the messages, control tokens apart."""

from __future__ import annotations

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
        shown: the messages that stand in the prompt as they are, or without spaces at their ends; none where the
            template rewrites the last one, and only that one where it rewrites others.
        content: start and end of the last message's content in ``text``; None where it is not there.
        cut: characters that the template took from the beginning of the last message's content.
    """

    text: str
    frames: list[Text]
    shown: list[Message]
    content: tuple[int, int] | None
    cut: int = 0


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Rendered:
    """Renders a chat with its generation prompt, and tells the template's text from that of the messages.

    A message may say what a template says ("user"), so the messages' places are those of stand-ins for their contents.
    """
    text = render_prompt(tokenizer, messages)
    frames = _frames(tokenizer, messages, text)
    if frames is None:  # messages that the template rewrites; the last one may still be there
        last = messages[-1]["content"]
        for content in (last, last.strip()):
            place = text.rfind(content) if content else -1
            if place >= 0:
                messages, frames = messages[-1:], [text[:place], text[place + len(content) :]]
                break
        else:
            return Rendered(text, [split_control(tokenizer, text)], [], None)
    content = messages[-1]["content"]
    end = len(text) - len(frames[-1])
    start = end - (len(content) if text[:end].endswith(content) else len(content.strip()))
    cut = len(content) - len(content.lstrip()) if end - start < len(content) else 0
    return Rendered(text, [split_control(tokenizer, frame) for frame in frames], messages, (start, end), cut)


def _frames(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> list[str] | None:
    """What stands between the contents of all messages; None where the template rewrites one."""
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
    marked = render_prompt(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    frames, rest = [], marked
    for mark in marks:
        before, there, rest = rest.partition(mark)
        if not there or mark in rest:
            return None
        frames.append(before)
    frames.append(rest)
    place = 0
    for frame, message, following in zip(frames, messages, frames[1:], strict=False):
        if not text.startswith(frame, place):
            return None
        place += len(frame)
        for content in (message["content"], message["content"].strip()):
            if text.startswith(content + following, place):
                place += len(content)
                break
        else:
            return None
    return frames if text[place:] == frames[-1] else None


def split_control(tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """A text of the template; control tokens are the tokenizer's added ones."""
    control = {str(token) for token in tokenizer.added_tokens_decoder.values()}.union(tokenizer.all_special_tokens)
    pattern = "|".join(map(re.escape, sorted(filter(str.strip, control), key=len, reverse=True)))
    made = Text(visible(text))
    for match in re.finditer(pattern, text) if pattern else ():
        made.stylize("control", *match.span())
    return made
