"""From what a model sampled to `Responses`: texts without their end of turn, and the ids where the text loses them."""

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
        tokens: sampled ones, ends of turn included.
        mismatches: responses whose text, tokenised for training, gives other ids than were sampled; where a server
            tells only how many tokens a request took, requests whose texts have another number of ids.
    """

    responses: int = 0
    tokens: int = 0
    unfinished: int = 0
    empty: int = 0
    mismatches: int = 0


def from_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampled: Sequence[Sequence[int]],
    finished: Sequence[bool],
    stop_ids: Collection[int],
    statistics: Statistics,
) -> Responses:
    """Responses whose ids are known.

    Ids are kept where training would not find them again by tokenising the text (other merges, spaces that the template
    strips, special tokens inside). All of them would more than double the file.

    Args:
        sampled: the ids of each response, with or without its end of turn.
        finished: which of them ended by themselves; the last id of those is dropped where it is one of ``stop_ids``.
    """
    bodies = [
        list(ids[:-1]) if end and ids and ids[-1] in stop_ids else list(ids)
        for ids, end in zip(sampled, finished, strict=True)
    ]
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=True)
    kept = [
        body if text.strip() and _learnt(tokenizer, prompt, text) != body else None
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
    """Responses of which only the texts are known; an end of turn in a text ends it there.

    Args:
        tokens: how many the server says were sampled, ends of turn included; None where it does not. Of several
            responses some servers count the first only: a number nearer to that one's than to that of all is not used.
    """
    parts = [text.partition(end_of_turn(tokenizer)) for text in texts]
    texts = [text for text, _, _ in parts]
    finished = [end or bool(mark) for end, (_, mark, _) in zip(finished, parts, strict=True)]
    each = [len(_learnt(tokenizer, prompt, text)) + end for text, end in zip(texts, finished, strict=True)]
    again = sum(each)
    if tokens is None or (len(each) > 1 and abs(tokens - each[0]) <= abs(tokens - again)):
        tokens = again
    _count(statistics, texts, finished, tokens, int(tokens != again))
    return Responses(prompt.id, texts, finished)


def _learnt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> list[int]:
    """The ids that training finds for a text, without the end of turn; a text of spaces is never trained on, nor is one
    that the chat template does not fit, whose ids are kept."""
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
