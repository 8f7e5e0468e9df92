"""Makes `Responses` of sampled ids or texts: texts without their end of turn, and ids that tokenizing would change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.sampling.prompts import Prompt
from megatron_solopo.data.sampling.responses import Responses
from megatron_solopo.data.text.chat import body_ids
from megatron_solopo.data.text.control import end_of_turn
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.errors import UserError


@dataclass
class Statistics:
    """Counts over responses.

    Attributes:
        tokens: sampled tokens, ends of turn included.
        mismatches: responses whose text, tokenized for training, has other ids than were sampled; where a server
            reports only the number of tokens of a request, requests whose texts have another number of ids.
    """

    responses: int = 0
    tokens: int = 0
    unfinished: int = 0
    empty: int = 0
    mismatches: int = 0


def body_of(ids: Sequence[int], finished: bool, stop_ids: Collection[int]) -> list[int]:
    """Returns the ids of a response without its end of turn, which servers return or not."""
    return list(ids[:-1]) if finished and ids and ids[-1] in stop_ids else list(ids)


def until_end(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool) -> tuple[str, bool]:
    """Returns a response's text up to an end of turn that a server left in it, and whether it ended."""
    text, mark, _ = text.partition(end_of_turn(tokenizer))
    return text, finished or bool(mark)


def from_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampled: Sequence[Sequence[int]],
    finished: Sequence[bool],
    stop_ids: Collection[int],
    statistics: Statistics,
) -> Responses:
    """Returns responses whose ids are known.

    Ids are kept where tokenizing the text would yield others (other merges, spaces that the template strips, special
    tokens inside). To keep all ids would more than double the file.

    Args:
        sampled: the ids of each response, with or without its end of turn.
        finished: which of them ended by themselves; their last id is dropped if it is one of ``stop_ids``.
    """
    bodies = [body_of(ids, end, stop_ids) for ids, end in zip(sampled, finished, strict=True)]
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=True)
    kept = [
        body if text.strip() and _training_ids(tokenizer, prompt, text) != body else None
        for body, text in zip(bodies, texts, strict=True)
    ]
    _count(statistics, texts, finished, sum(map(len, sampled)), sum(ids is not None for ids in kept))
    return Responses(prompt.id, texts, list(finished), kept if any(kept) else None)


def from_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    texts: Sequence[str],
    finished: Sequence[bool],
    tokens: int | None,
    statistics: Statistics,
) -> Responses:
    """Returns responses of which only the texts are known; an end of turn in a text ends it there.

    Args:
        tokens: sampled tokens as the server reports them, ends of turn included; None if it does not. Servers may
            count only the first of several responses: a count nearer to the first one's than to the sum is ignored.
    """
    parts = [until_end(tokenizer, text, end) for text, end in zip(texts, finished, strict=True)]
    texts, finished = [text for text, _ in parts], [end for _, end in parts]
    counts = [len(_training_ids(tokenizer, prompt, text)) + end for text, end in zip(texts, finished, strict=True)]
    total = sum(counts)
    if tokens is None or (len(counts) > 1 and abs(tokens - counts[0]) <= abs(tokens - total)):
        tokens = total
    _count(statistics, texts, finished, tokens, int(tokens != total))
    return Responses(prompt.id, texts, finished)


def _training_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> list[int]:
    """Returns the ids that training computes for a text, without the end of turn.

    Empty for a text that the chat template refuses, so that its sampled ids are kept. A text of spaces is never
    trained on; its ids are those of the text alone.
    """
    if not text.strip():
        return encode(tokenizer, text)
    try:
        return body_ids(tokenizer, prompt.messages, text)
    except UserError:
        return []


def _count(statistics: Statistics, texts: Sequence[str], finished: Sequence[bool], tokens: int, changed: int) -> None:
    statistics.responses += len(texts)
    statistics.tokens += tokens
    statistics.unfinished += list(finished).count(False)
    statistics.empty += sum(not text.strip() for text in texts)
    statistics.mismatches += changed
