"""The facts about an example that are counted over a file, and what may be wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import golds, normalise, stated_golds
from megatron_solopo.data.inspection.examples import CONTEXTS, LONG, SHORT, Example, depths
from megatron_solopo.data.schema import PreferenceGroup, text_of
from megatron_solopo.data.scoring import sub_em
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.tokenized.encoder import NO_LONG_CONTEXT, Encoder
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, SHORT_PAIR
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored

FLAGS = {
    "refused": "training refuses it",
    "too_long": "longer than --seq-length",
    "chosen_lacks_answer": "chosen does not contain an answer",
    "rejected_has_answer": "rejected contains an answer",
    "short_answer": "an answer that is yes, no, one short word or a number",
    "answer_not_in_short": "no answer in the short context",
    "answer_not_in_long": "no answer in the long context",
    "answer_not_in_evidence": "no answer in the evidence documents",
    "answer_in_distractor": "an answer in a distractor",
    "less_evidence_in_short": "less evidence in the short context than in the long one",
    "evidence_only_in_short": "evidence of the short context missing from the long one",
    "long_not_longer": "the long context is not longer than the short one",
    "other_ids": "sampled token ids that this tokenizer decodes to another text",
    "other_length": "recorded length of a context differs from this tokenizer's",
}
"""What may be wrong with an example: key -> plain words. An answer is in a response as sub-EM has it, in a document or
context as prepare-data has it (`answers.mentions`; "yes" and "no" are searched for in none)."""


@dataclass(frozen=True)
class Facts:
    """What is counted of one example.

    Attributes:
        tokens: "short", "long" (prompts), "chosen", "chosen_1", ..., "rejected", ... (trained tokens of the responses,
            with their ends of turn) -> tokens.
        numbers: (name, value) of what has a distribution: "short tokens", "ratio", "difference" (chosen - rejected
            tokens), "long depth" (one for each gold document), "long documents", "score NAME", ...
        flags: keys of `FLAGS`.
        refused: why training refuses it, if so.
    """

    tokens: dict[str, int]
    numbers: list[tuple[str, float]]
    flags: tuple[str, ...]
    refused: str | None


def token_group(group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, scored: Scored) -> TokenGroup:
    """Returns the token ids that training makes of a group.

    Raises:
        UserError: why training refuses it.
    """
    return _encode(Encoder(tokenizer, None, "refuse"), group, scored)


def _encode(encoder: Encoder, group: PreferenceGroup, scored: Scored) -> TokenGroup:
    tokens = encoder.encode(group, scored)
    assert tokens is not None, "without a length nothing is dropped"
    return tokens


def measure(
    example: Example, tokenizer: PreTrainedTokenizerBase, scored: Scored = frozenset(), seq_length: int | None = None
) -> Facts:
    """Returns the facts about one example.

    Args:
        scored: what the loss scores of a group; a group that lacks its context is one that training refuses.
        seq_length: the longest prompt plus response that training takes, if it is to be checked.
    """
    tokens: dict[str, int] = {}
    refused, flags = None, set()
    group = example.group
    encoder = Encoder(tokenizer, None, "refuse")
    try:
        if group is None:
            tokens = {name: len(prompt_ids(tokenizer, chat)) for name, chat in example.chats.items()}
        else:
            encoded = _encode(encoder, group, BOTH_PAIRS if LONG in example.chats else SHORT_PAIR)
            tokens = _lengths(encoded)
            if LONG not in example.chats and any(context == Context.LONG for context, _ in scored):
                raise UserError("long-context-missing", NO_LONG_CONTEXT)
            if seq_length is not None and encoded.only(scored).longest > seq_length:
                flags.add("too_long")
    except UserError as error:
        refused = str(error).removeprefix(f"group {example.id!r}: ")  # so that equal reasons are counted together
        flags.add("refused")
    flags |= set(_answer_flags(example)) | set(_evidence_flags(example))
    if LONG in tokens and tokens[LONG] <= tokens[SHORT]:
        flags.add("long_not_longer")
    if tokens and any(tokens[name] != length for name, length in example.recorded.items()):
        flags.add("other_length")
    if encoder.report.ids_mismatched:
        flags.add("other_ids")
    ordered = tuple(key for key in FLAGS if key in flags)
    return Facts(tokens, list(_numbers(example, tokens)), ordered, refused)


def _numbers(example: Example, tokens: dict[str, int]) -> Iterator[tuple[str, float]]:
    for name, length in tokens.items():
        yield f"{name.partition('_')[0]} tokens", length
    if {SHORT, LONG} <= tokens.keys():
        yield "ratio", round(tokens[SHORT] / tokens[LONG], 4)
    for chosen, rejected in pair_lengths(tokens):
        yield "difference", chosen - rejected
    for name, spans in example.spans.items():
        if spans:
            yield f"{name} documents", len(spans)
        yield from ((f"{name} depth", round(depth, 3)) for depth in depths(spans))
    for name, value in example.scores.items():
        yield f"score {name}", round(value, 3)


def pair_lengths(tokens: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Returns the lengths of every pair of a chosen and a rejected response in `Facts.tokens`."""
    sides = ([tokens[name] for name in tokens if name.startswith(side)] for side in ("chosen", "rejected"))
    return itertools.product(*sides)


def _lengths(group: TokenGroup) -> dict[str, int]:
    tokens = {}
    for prompt in group.prompts:
        tokens[prompt.context.name.lower()] = len(prompt.ids)
        for completion in prompt.completions:
            number = f"_{completion.response}" if completion.response else ""
            tokens.setdefault(completion.side.name.lower() + number, completion.trained_tokens)
    return tokens


def _answer_flags(example: Example) -> Iterator[str]:
    if any(gold.short for gold in golds(example.answers)):
        yield "short_answer"
    if example.group is not None and golds(example.answers):
        chosen, rejected = (map(text_of, example.group.responses(side)) for side in ("chosen", "rejected"))
        if not all(sub_em(text, example.answers) for text in chosen):
            yield "chosen_lacks_answer"
        if any(sub_em(text, example.answers) for text in rejected):
            yield "rejected_has_answer"
    for name in example.chats if stated_golds(example.answers) else ():
        answer_places = example.answer_places[name]
        if not any(answer_places):
            yield f"answer_not_in_{name}"
        documents = [
            (bool(places), gold) for places, (_, _, gold) in zip(answer_places, example.spans[name], strict=False)
        ]
        if any(gold for _, gold in documents):
            if not any(has_answer and gold for has_answer, gold in documents):
                yield "answer_not_in_evidence"
            if any(has_answer and not gold for has_answer, gold in documents):
                yield "answer_in_distractor"


def _evidence_flags(example: Example) -> Iterator[str]:
    if not all(example.spans.get(name) for name in CONTEXTS):
        return
    # Numbers of documents differ between the contexts; their texts do not.
    words = {
        name: {"".join(c for c in normalise(text) if not c.isdigit()) for text, gold in example.documents(name) if gold}
        for name in CONTEXTS
    }
    if words[LONG] - words[SHORT]:
        yield "less_evidence_in_short"
    if words[SHORT] - words[LONG]:
        yield "evidence_only_in_short"


def measure_all(
    examples: Iterable[Example], measure_one: Callable[[Example], Facts], workers: int
) -> Iterator[tuple[Example, Facts]]:
    """Measures a stream in order on ``workers`` threads (tokenizers work outside Python's lock), a batch in memory."""
    with ThreadPoolExecutor(workers) as pool:
        for batch in itertools.batched(examples, 8 * workers):
            yield from zip(batch, pool.map(measure_one, batch), strict=True)
