"""One example taken apart for a reader: documents folded around the evidence, answers found, tokens of the loss.

Nothing here knows whether a terminal or a page will show it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.answers import find_in_response, stated_golds
from megatron_solopo.data.inspection.examples import Example, Facts, depths, measure, token_group
from megatron_solopo.data.inspection.rendered import Rendered, render
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.chat import prompt_length, prompt_starts
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.losses.solopo import chosen_role, has_likelihood, reference_roles, roles, scored_roles

# Where documents are not known, this many characters stay around an answer and at both ends.
_AROUND = 240
_SHORTEST_FOLD = 400

REWARDS = {
    "dpo": "beta * (log pi - log pi_ref), summed over a response's tokens",
    "ipo": "beta * (log pi - log pi_ref), summed over a response's tokens; the loss takes means per token",
    "simpo": "beta * the mean log pi of a response's tokens",
    "orpo": "log odds of the mean log pi of a response's tokens",
    "longpo": "beta * (log pi on the long context - log pi_ref on the short one), summed over a response's tokens",
}
"""The reward of each --preference-loss in one line; losses/rewards.py has the formulas."""


@dataclass(frozen=True)
class Document:
    """A document, or a stretch of text where documents are not known.

    Attributes:
        number: from 1; 0 for a stretch of text.
        first_token: its position in the prompt; None where the template changed the text.
        depth: see `examples.depths`; None where it says nothing.
        found: start and end of the answers in the text.
    """

    text: str
    gold: bool
    number: int
    tokens: int
    first_token: int | None
    depth: float | None
    found: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What is shown at a time: "text" between documents, one "gold" document, or a "fold" of ``documents``.

    ``found`` is for a text as for a `Document`.
    """

    kind: str
    text: str = ""
    tokens: int = 0
    documents: tuple[Document, ...] = ()
    found: tuple[tuple[int, int], ...] = ()

    @property
    def with_answer(self) -> list[Document]:
        """The documents in which an answer is found."""
        return [document for document in self.documents if document.found]


@dataclass(frozen=True)
class ContextView:
    """A prompt.

    Attributes:
        tokens: of the whole prompt, chat template included.
        rendered: the prompt as the chat template writes it.
        role: of the last message.
        pieces: the last message in order.
        documents: all documents in order.
        depths: of the evidence.
        answers_in: numbers of the documents in which an answer is found, 0 for the last message where documents are not
            known; None where no answer is searched for in documents.
    """

    name: str
    tokens: int
    rendered: Rendered
    role: str
    pieces: list[Piece]
    documents: list[Document]
    depths: list[float]
    answers_in: list[int] | None


@dataclass(frozen=True)
class Token:
    """One token of a response: its id, its text, its position in the sequence, and whether it is learnt."""

    id: int
    text: str
    position: int
    learnt: bool
    end_of_turn: bool


@dataclass(frozen=True)
class Segment:
    """A response on a context as it stands in the pack.

    Attributes:
        predictors: first and last place of each run of places in the pack whose hidden states predict its tokens; the
            prompt's last place predicts the first.
        learnt: tokens whose log-probs are summed.
        uses: the terms of the loss that its reward enters.
    """

    role: str
    prompt_tokens: int
    tokens: list[Token]
    predictors: list[tuple[int, int]]
    learnt: int
    uses: list[str]


@dataclass(frozen=True)
class Response:
    """``name`` is "chosen" or "rejected"; ``tokens`` count the end of turn; ``found`` None: no answers known.

    ``found`` has start and end of the answers that sub-EM finds.
    """

    name: str
    text: str
    tokens: int
    found: list[tuple[int, int]] | None


@dataclass(frozen=True)
class View:
    """An example ready to be shown; without ``segments`` there are no responses, or ``facts.refused`` says why."""

    example: Example
    facts: Facts
    contexts: list[ContextView]
    responses: list[Response]
    segments: list[Segment] = field(default_factory=list)
    pack_tokens: int = 0
    separate_tokens: int = 0


def make_view(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    seq_length: int | None = None,
) -> View:
    """Takes an example apart; the token ids are those that training makes of it with ``method``."""
    wanted = scored_roles(method) if example.group else ()
    facts = measure(example, tokenizer, wanted, seq_length)
    view = View(example, facts, [_context(example, name, tokenizer) for name in example.chats], [])
    if example.group is None:
        return view
    for name in ("chosen", "rejected"):
        text = getattr(example.group, name)
        found = find_in_response(text, example.answers) if example.answers else None
        view.responses.append(Response(name, text, facts.tokens.get(name, 0), found))
    if facts.refused is not None:
        return view
    tokens = token_group(example.group, tokenizer, wanted)
    pack = build_pack([tokens], [0])
    continuations = [(prompt, one) for prompt in tokens.prompts for one in prompt.continuations]
    for number, (prompt, continuation) in enumerate(continuations):
        own = pack.segments == number
        learnt = continuation.learnt or [True] * len(continuation.ids)
        shown = [
            Token(i, token_text(tokenizer, i), len(prompt.ids) + k, learnt[k], i == tokenizer.eos_token_id)
            for k, i in enumerate(continuation.ids)
        ]
        view.segments.append(
            Segment(
                continuation.role,
                len(prompt.ids),
                shown,
                _runs(pack.predictors[own].tolist()),
                int(pack.segment_lengths[number]),
                uses(continuation.role, method),
            )
        )
    return View(
        example, facts, view.contexts, view.responses, view.segments, len(pack.tokens), tokens.separate_tokens()
    )


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs


def uses(role: str, method: MethodConfig) -> list[str]:
    """The terms of the loss that a role's log-prob enters, in words."""
    found = []
    context, response = role.split("_")
    if role in roles(method):
        preferred = chosen_role(method)
        if role == preferred:
            found.append("preference loss: chosen")
        if role == preferred.replace("chosen", "rejected"):
            found.append("preference loss: rejected")
        if role == preferred and (has_likelihood(method) or method.preference_loss == "orpo"):
            found.append("likelihood term")
        if method.context_mode == "solo" and (response == "chosen" or method.alignment_target == "both"):
            stopped = ", no gradient" if context == "short" and method.alignment_stop_short_gradient else ""
            found.append(f"alignment: {context} side{stopped}")
    if role in reference_roles(method):
        found.append("reference log-prob")
    return found


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as it stands in a text, its leading space included; the vocabulary's spelling where it is part of a
    character."""
    spelled = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        return spelled
    return " " + text if spelled.startswith("\u2581") and not text.startswith(" ") else text


def answer_pattern(answers: Sequence[str]) -> re.Pattern[str] | None:
    """Matches any answer in a text whatever its case and punctuation; None where there is none to look for."""
    words = [r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", answer))) for answer in answers]
    words = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(words), re.IGNORECASE) if words else None


def marked(
    text: str, found: Sequence[tuple[int, int]], pattern: re.Pattern[str] | None = None
) -> Iterator[tuple[str, str]]:
    """The text in parts: ("...", "") between answers, "found" an answer that counts, "other" one that does not.

    An answer that does not count is part of a longer word, or in a response outside its answer part.

    Args:
        found: start and end of those that count, in order.
        pattern: `answer_pattern`, which the others match.
    """
    others = [match.span() for match in pattern.finditer(text)] if pattern else []
    others = [span for span in others if not any(span[0] < end and start < span[1] for start, end in found)]
    last = 0
    for start, end, kind in sorted([*((*span, "found") for span in found), *((*span, "other") for span in others)]):
        if start > last:
            yield text[last:start], ""
        yield text[start:end], kind
        last = end
    if last < len(text):
        yield text[last:], ""


def excerpts(text: str, found: Sequence[tuple[int, int]], head: int, around: int) -> list[tuple[int, int]]:
    """Start and end of what is kept of a text that is cut: its beginning and what surrounds the answers."""
    kept: list[tuple[int, int]] = [(0, min(head, len(text)))] if head else []
    for start, end in found:
        start, end = max(start - around, 0), min(end + around, len(text))
        if kept and start <= kept[-1][1]:
            kept[-1] = kept[-1][0], max(end, kept[-1][1])
        else:
            kept.append((start, end))
    return kept


def within(found: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The places that lie in a part of a text, as places of that part."""
    return [(first - start, last - start) for first, last in found if start <= first and last <= end]


def answers_line(context: ContextView) -> str:
    """In which documents an answer is found, in words."""
    if context.answers_in is None:
        return "answers not searched for in documents"
    if not context.answers_in:
        return "no answer found"
    if context.answers_in == [0]:
        return "an answer found"
    some = ", ".join(map(str, context.answers_in[:8])) + (", ..." if len(context.answers_in) > 8 else "")
    return f"an answer found in document{'s' * (len(context.answers_in) > 1)} {some}"


class _Ruler:
    """Counts the tokens of stretches of a chat's last message, as they stand in the whole prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], rendered: Rendered) -> None:
        self._tokenizer, self._content = tokenizer, messages[-1]["content"]
        self._starts: list[int] | None = None
        if rendered.content is None or not tokenizer.is_fast:  # a template that rewrites; then each is counted alone
            self.total = prompt_length(tokenizer, messages)
            return
        place = rendered.content[0] - rendered.cut
        self._starts = [start - place for start in prompt_starts(tokenizer, messages)]
        self.total = len(self._starts)

    def first(self, start: int) -> int | None:
        """The position of the token that begins at a character, or the next one."""
        return None if self._starts is None else bisect_left(self._starts, start)

    def tokens(self, start: int, end: int) -> int:
        if self._starts is None:
            return len(encode(self._tokenizer, self._content[start:end]))
        return bisect_left(self._starts, end) - bisect_left(self._starts, start)


def _context(example: Example, name: str, tokenizer: PreTrainedTokenizerBase) -> ContextView:
    messages, spans = example.chats[name], example.spans[name]
    content, rendered = example.content(name), render(tokenizer, messages)
    ruler = _Ruler(tokenizer, messages, rendered)
    of_gold = iter(depths(spans))
    documents = [
        Document(
            content[start:end],
            gold,
            number,
            ruler.tokens(start, end),
            ruler.first(start),
            next(of_gold, None) if gold else None,
            tuple(found),
        )
        for number, ((start, end, gold), found) in enumerate(zip(spans, example.answers_found[name], strict=False), 1)
    ]
    answers_in = [number for number, places in enumerate(example.answers_found[name], bool(spans)) if places]
    if not stated_golds(example.answers):
        answers_in = None
    pieces = _around_documents(example, name, documents, ruler) if spans else _around_answers(example, name, ruler)
    return ContextView(name, ruler.total, rendered, messages[-1]["role"], pieces, documents, depths(spans), answers_in)


def _around_documents(example: Example, name: str, documents: list[Document], ruler: _Ruler) -> list[Piece]:
    """Evidence in full, each run of distractors as one fold; separators between documents belong to the fold."""
    content, spans = example.content(name), example.spans[name]
    pieces = [Piece("text", content[: spans[0][0]])]
    index = 0
    while index < len(spans):
        first = index
        if spans[index][2]:
            index += 1
            pieces.append(Piece("gold", tokens=documents[first].tokens, documents=(documents[first],)))
        else:
            while index < len(spans) and not spans[index][2]:
                index += 1
            tokens = ruler.tokens(spans[first][0], spans[index - 1][1])
            pieces.append(Piece("fold", tokens=tokens, documents=tuple(documents[first:index])))
    pieces.append(Piece("text", content[spans[-1][1] :]))
    return [piece for piece in pieces if piece.text or piece.documents]


def _around_answers(example: Example, name: str, ruler: _Ruler) -> list[Piece]:
    """The ends of the text and what surrounds the answers; the rest in folds."""
    content, found = example.content(name), example.answers_found[name][0]
    kept = [(0, _AROUND), (len(content) - 2 * _AROUND, len(content))]
    kept += [(start - _AROUND, end + _AROUND) for start, end in found]
    pieces: list[Piece] = []
    start = end = 0

    def text(begin: int, stop: int) -> None:
        if begin < stop:
            pieces.append(Piece("text", content[begin:stop], found=tuple(within(found, begin, stop))))

    for first, last in sorted(kept):
        if first - end > _SHORTEST_FOLD:
            text(start, end)
            tokens = ruler.tokens(end, first)
            stretch = Document(content[end:first], False, 0, tokens, ruler.first(end), None)
            pieces.append(Piece("fold", tokens=tokens, documents=(stretch,)))
            start = first
        end = min(max(end, last), len(content))
    text(start, end)
    return pieces
