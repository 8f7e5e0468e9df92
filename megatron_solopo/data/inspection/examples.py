"""What a data file holds, one example at a time, and the facts about an example that are counted over a file."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import find_in_document, golds, normalise, stated_golds
from megatron_solopo.data.building.contexts import ContextPair, read_contexts
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.files.records import is_parquet
from megatron_solopo.data.formats import CHOSEN, REJECTED
from megatron_solopo.data.schema import DocumentSpan, Message, PreferenceGroup, read_groups
from megatron_solopo.data.scoring import sub_em
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.prompt import DEFAULT_DOCUMENT_TEMPLATE
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, SHORT_PAIR, is_store
from megatron_solopo.data.tokenized.tokens import Encoder, TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored

SHORT, LONG = "short", "long"
CONTEXTS = (SHORT, LONG)

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
class Example:
    """A preference group, or the contexts of a question before there are responses.

    Attributes:
        index: its place in the file, from 0.
        chats: "short" and, where there is one, "long" -> messages.
        spans: "short", "long" -> the documents of the last message; empty where not known.
        group: the preference group; None for contexts.
        recorded: "short", "long" -> prompt tokens as the file says; empty for groups.
    """

    index: int
    id: str
    question: str
    answers: list[str]
    source: str
    chats: dict[str, list[Message]]
    spans: dict[str, list[DocumentSpan]]
    scores: dict[str, float] = field(default_factory=dict)
    group: PreferenceGroup | None = None
    recorded: dict[str, int] = field(default_factory=dict)

    def content(self, context: str) -> str:
        """The text of the last message, where documents and question stand."""
        return self.chats[context][-1]["content"]

    def documents(self, context: str) -> list[tuple[str, bool]]:
        """(text, gold) of each document; none where documents are not known."""
        content = self.content(context)
        return [(content[start:end], gold) for start, end, gold in self.spans[context]]

    @cached_property
    def answers_found(self) -> dict[str, list[list[tuple[int, int]]]]:
        """ "short", "long" -> for each document the places of answers in it.

        Numbers that the document template writes are no part of a document. Where documents are not known, it is one
        list for the whole last message but its question.
        """
        if not stated_golds(self.answers):
            return {name: [[] for _ in self.spans[name] or [None]] for name in self.chats}
        texts = {name: [text for text, _ in self.documents(name)] for name in self.chats}
        numbered = without_numbers([list(enumerate(one, 1)) for one in texts.values()])
        found = {}
        for name, documents in zip(texts, numbered, strict=True):
            searched = documents or [_without_question(self.content(name), self.question)]
            found[name] = [find_in_document(text, self.answers) for text in searched]
        return found


_HEAD = re.escape(DEFAULT_DOCUMENT_TEMPLATE.partition("{number}")[0])


def _blank(text: str, spans: Iterable[tuple[int, int]]) -> str:
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def without_numbers(contexts: Sequence[Sequence[tuple[int, str]]]) -> list[list[str]]:
    """Rendered documents with what the template wrote for ``{number}`` blanked, by as many NUL characters.

    Files do not record the template. What it wrote is the documents' own numbers in the same surroundings in all
    documents; for a single one it is the default template.

    Args:
        contexts: (number, text) of the documents of each context; one template wrote them all.
    """
    documents = [document for context in contexts for document in context]
    if len(documents) == 1:
        ((number, text),) = documents
        head = [match.span(1) for match in re.finditer(rf"\A{_HEAD}({number})(?!\d)", text)]
        return [[_blank(text, head) for _, text in context] for context in contexts]
    places = [[match.span() for match in re.finditer(rf"(?<!\d){number}(?!\d)", text)] for number, text in documents]
    written: list[set[tuple[int, int]]] = [set() for _ in documents]
    for before in range(8, 0 if len(documents) > 3 else 1, -1):
        if before < 3 and any(written):  # so short surroundings may be common by chance
            break

        def around(text: str, span: tuple[int, int], before: int = before) -> tuple[str, str]:
            return text[max(span[0] - before, 0) : span[0]], text[span[1] : span[1] + 1]

        kinds = [{around(text, span) for span in spans} for (_, text), spans in zip(documents, places, strict=True)]
        common = set.intersection(*kinds) if kinds else set()
        if common:
            for known, (_, text), spans in zip(written, documents, places, strict=True):
                known.update(span for span in spans if around(text, span) in common)
    blanked = iter([_blank(text, spans) for (_, text), spans in zip(documents, written, strict=True)])
    return [[next(blanked) for _ in context] for context in contexts]


def _without_question(content: str, question: str) -> str:
    """A message whose documents are not known, without its question and the default template's numbers."""
    place = content.rfind(question) if question else -1
    spans = [(place, place + len(question))] if place >= 0 else []
    return _blank(content, [*spans, *(m.span(1) for m in re.finditer(rf"(?m)^{_HEAD}(\d+)(?!\d)", content))])


def _finite(value: object) -> float | None:
    """A finite number as a float; None for anything else, whole numbers beyond a float's range too."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _from_group(index: int, group: PreferenceGroup) -> Example:
    chats = {SHORT: group.short_messages} | ({LONG: group.long_messages} if group.long_messages else {})
    spans = {SHORT: group.short_spans, LONG: group.long_spans}
    scores = {name: value for name, one in group.scores.items() if (value := _finite(one)) is not None}
    answers = [str(answer) for answer in group.answers]
    return Example(index, group.id, group.question, answers, group.source, chats, spans, scores, group)


def _from_contexts(index: int, pair: ContextPair) -> Example:
    chats, spans = {SHORT: pair.short_messages, LONG: pair.long_messages}, {SHORT: pair.short_spans}
    recorded = {SHORT: pair.short_tokens, LONG: pair.long_tokens}
    spans[LONG] = pair.long_spans
    return Example(index, pair.id, pair.question, pair.answers, pair.source, chats, spans, recorded=recorded)


def holds_groups(path: str | Path) -> bool:
    """Whether a file holds preference groups (else the contexts that prepare-data writes), by its first record.

    Raises:
        UserError: it is missing, empty, or holds something else, which is named with the command that reads it.
    """
    if is_store(path):
        raise UserError(f"--data {path}: is a folder; give the JSONL or Parquet file it was made from")
    if is_parquet(path):
        return True
    where, record = next(read_records([path]), (None, None))
    if record is None:
        raise UserError(f"--data {path}: holds no record; give groups of build-pairs or contexts of prepare-data")
    if {*CHOSEN, *REJECTED} & record.keys():
        return True
    if {"short_messages", "short_tokens"} <= record.keys():
        return False
    for key, what in (
        ("paragraphs", "questions; give what 'solopo prepare-data --data' makes of them"),
        ("responses", "responses; give what 'solopo build-pairs --responses' makes of them"),
        ("messages", "conversations for --objective sft, which have no contexts to compare; give preference groups"),
    ):
        if key in record:
            raise UserError(f"{where}: this file holds {what}")
    found = ", ".join(sorted(record)) or "none"
    raise UserError(
        f"{where}: neither a preference group nor contexts (fields found: {found}); see docs/data-storage.md"
    )


def read_examples(path: str | Path) -> Iterator[Example]:
    """Yields the examples of a file of groups (in the forms of `formats`) or of contexts, one in memory at a time.

    Raises:
        UserError: naming file:line and the field.
    """
    if holds_groups(path):
        yield from itertools.starmap(_from_group, enumerate(read_groups(path)))
    else:
        yield from itertools.starmap(_from_contexts, enumerate(read_contexts(path)))


class Reservoir:
    """A uniform sample of fixed size from a stream of unknown length (Vitter's algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._draw, self._seen = size, random.Random(seed), 0
        self._kept: list[Example] = []

    def add(self, example: Example) -> None:
        if len(self._kept) < self._size:
            self._kept.append(example)
        elif (place := self._draw.randrange(self._seen + 1)) < self._size:
            self._kept[place] = example
        self._seen += 1

    def examples(self) -> list[Example]:
        """The sample in the file's order."""
        return sorted(self._kept, key=lambda example: example.index)


def depths(spans: Sequence[DocumentSpan]) -> list[float]:
    """Where each gold document begins: 0 as the first document does, 1 as the last, by characters between them.

    Empty where there is one document or none.
    """
    if len(spans) < 2 or spans[-1][0] == spans[0][0]:
        return []
    first, last = spans[0][0], spans[-1][0]
    return [(start - first) / (last - first) for start, _, gold in spans if gold]


@dataclass(frozen=True)
class Facts:
    """What is counted of one example.

    Attributes:
        tokens: "short", "long" (prompts), "chosen", "rejected" (responses with end of turn) -> tokens.
        depths: "short", "long" -> `depths`.
        documents: "short", "long" -> number of documents, where known.
        flags: keys of `FLAGS`.
        refused: why training refuses it, if so.
    """

    tokens: dict[str, int]
    depths: dict[str, list[float]]
    documents: dict[str, int]
    flags: tuple[str, ...]
    refused: str | None


def token_group(group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, scored: Scored) -> TokenGroup:
    """The token ids that training makes of a group.

    Raises:
        UserError: why training refuses it.
    """
    return Encoder(tokenizer, None, "refuse").encode(group, scored)


def measure(
    example: Example, tokenizer: PreTrainedTokenizerBase, scored: Scored = frozenset(), seq_length: int | None = None
) -> Facts:
    """The facts about one example.

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
            made = encoder.encode(group, BOTH_PAIRS if LONG in example.chats else SHORT_PAIR)
            tokens = _lengths(made)
            if LONG not in example.chats and any(context == Context.LONG for context, _ in scored):
                raise UserError("no long_messages; give long contexts, or train with --context-mode short")
            if seq_length is not None and made.only(scored).longest > seq_length:
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
    spans = {name: found for name, found in example.spans.items() if found}
    return Facts(
        tokens,
        {name: depths(found) for name, found in spans.items()},
        {name: len(found) for name, found in spans.items()},
        tuple(key for key in FLAGS if key in flags),
        refused,
    )


def _lengths(group: TokenGroup) -> dict[str, int]:
    tokens = {}
    for prompt in group.prompts:
        tokens[prompt.context.name.lower()] = len(prompt.ids)
        for continuation in prompt.continuations:
            tokens.setdefault(continuation.side.name.lower(), len(continuation.ids))
    return tokens


def _answer_flags(example: Example) -> Iterator[str]:
    if any(gold.short for gold in golds(example.answers)):
        yield "short_answer"
    if example.group is not None and golds(example.answers):
        if not sub_em(example.group.chosen, example.answers):
            yield "chosen_lacks_answer"
        if sub_em(example.group.rejected, example.answers):
            yield "rejected_has_answer"
    for name in example.chats if stated_golds(example.answers) else ():
        found = example.answers_found[name]
        if not any(found):
            yield f"answer_not_in_{name}"
        documents = [(bool(places), gold) for places, (_, _, gold) in zip(found, example.spans[name], strict=False)]
        if any(gold for _, gold in documents):
            if not any(found and gold for found, gold in documents):
                yield "answer_not_in_evidence"
            if any(found and not gold for found, gold in documents):
                yield "answer_in_distractor"


def _evidence_flags(example: Example) -> Iterator[str]:
    if not all(example.spans.get(name) for name in CONTEXTS):
        return
    # Numbers of documents differ between the contexts; what stands in them does not.
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
