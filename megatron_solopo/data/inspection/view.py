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
from megatron_solopo.data.inspection.examples import Example, Facts, depths, measure, token_group
from megatron_solopo.data.schema import Message
from megatron_solopo.data.scoring import is_word, sub_em
from megatron_solopo.data.text.chat import prompt_length, prompt_starts, render_prompt
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
    """

    text: str
    gold: bool
    number: int
    tokens: int
    first_token: int | None
    depth: float | None


@dataclass(frozen=True)
class Piece:
    """What is shown at a time: "text" between documents, one "gold" document, or a "fold" of ``documents``."""

    kind: str
    text: str = ""
    tokens: int = 0
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True)
class ContextView:
    """A prompt.

    Attributes:
        tokens: of the whole prompt, chat template included.
        before: the messages before the last one.
        pieces: the last message in order.
        documents: all documents in order.
        depths: of the evidence.
        has_answer: an answer occurs in a document (in the last message where documents are not known).
    """

    name: str
    tokens: int
    before: list[Message]
    role: str
    pieces: list[Piece]
    documents: list[Document]
    depths: list[float]
    has_answer: bool | None


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
    """``name`` is "chosen" or "rejected"; ``tokens`` count the end of turn; ``has_answer`` None: no answers known."""

    name: str
    text: str
    tokens: int
    has_answer: bool | None


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
        found = bool(sub_em(text, example.answers)) if example.answers else None
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


def marked(text: str, pattern: re.Pattern[str] | None) -> Iterator[tuple[str, str]]:
    """The text in parts: ("...", "") between answers, "word" an answer, "inside" one that is part of a longer word.

    Sub-EM finds both, so a short answer ("it") can count as found where nobody gave it.
    """
    last = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > last:
            yield text[last : match.start()], ""
        yield match[0], "word" if is_word(text, *match.span()) else "inside"
        last = match.end()
    if last < len(text):
        yield text[last:], ""


class _Ruler:
    """Counts the tokens of stretches of a chat's last message, as they stand in the whole prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
        self._tokenizer, self._content = tokenizer, messages[-1]["content"]
        prompt = render_prompt(tokenizer, messages)
        place = prompt.rfind(self._content)
        self._starts: list[int] | None = None
        if place < 0 or not tokenizer.is_fast:  # a template that trims; then stretches are counted alone
            self.total = prompt_length(tokenizer, messages)
            return
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
    content, ruler = example.content(name), _Ruler(tokenizer, messages)
    of_gold = iter(depths(spans))
    documents = [
        Document(
            content[start:end],
            gold,
            number,
            ruler.tokens(start, end),
            ruler.first(start),
            next(of_gold, None) if gold else None,
        )
        for number, (start, end, gold) in enumerate(spans, 1)
    ]
    searched = [text for text, _ in example.documents(name)] or [content]
    found = any(sub_em(text, example.answers) for text in searched) if example.answers else None
    pieces = _around_documents(example, name, documents, ruler) if spans else _around_answers(example, name, ruler)
    return ContextView(name, ruler.total, messages[:-1], messages[-1]["role"], pieces, documents, depths(spans), found)


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
    return [piece for piece in pieces if piece.text.strip() or piece.documents]


def _around_answers(example: Example, name: str, ruler: _Ruler) -> list[Piece]:
    """The ends of the text and what surrounds the answers; the rest in folds."""
    content, pattern = example.content(name), answer_pattern(example.answers)
    kept = [(0, _AROUND), (len(content) - 2 * _AROUND, len(content))]
    found = [match.span() for match in pattern.finditer(content)] if pattern else []
    kept += [(start - _AROUND, end + _AROUND) for start, end in found if is_word(content, start, end)]
    pieces: list[Piece] = []
    start = end = 0

    def text(begin: int, stop: int) -> None:
        if begin < stop:
            pieces.append(Piece("text", content[begin:stop]))

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
