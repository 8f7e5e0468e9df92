"""One example taken apart for a reader: what is said of it, its prompts, its responses, the tokens of the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.console import RenderableType
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.answers import find_in_response
from megatron_solopo.data.inspection.blocks import (
    Note,
    Prose,
    Section,
    Token,
    Tokens,
    highlighted,
    many,
    table,
    visible,
)
from megatron_solopo.data.inspection.context import ContextView, make_context
from megatron_solopo.data.inspection.examples import FLAGS, Example, Facts, measure, token_group
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.losses.registry import loss_class
from megatron_solopo.losses.solopo import (
    adds_likelihood,
    aligned_sides,
    all_scores,
    pair_context,
    policy_scores,
    reference_scores,
)
from megatron_solopo.pack import Context, Side, segment_name


@dataclass(frozen=True)
class Segment:
    """A response on a context as it stands in the pack.

    Attributes:
        response: which response of its side, from 0.
        predictors: first and last place of each run of places in the pack whose hidden states predict its tokens; the
            prompt's last place predicts the first.
        learnt: tokens whose log-probs are summed.
        uses: the terms of the loss that its reward enters.
    """

    context: Context
    side: Side
    response: int
    prompt_tokens: int
    tokens: list[Token]
    predictors: list[tuple[int, int]]
    learnt: int
    uses: list[str]

    @property
    def name(self) -> str:
        return segment_name(self.context, self.side, self.response)


@dataclass(frozen=True)
class Response:
    """``name`` is "chosen" or "rejected"; ``tokens`` count the end of turn.

    ``text`` has the answers that sub-EM finds in the style "answer", others in "other"; ``right``: whether there are
    any of the first, None where no answers are known.
    """

    name: str
    text: Text
    tokens: int
    right: bool | None

    def section(self) -> Section:
        """What is shown of it."""
        said = {None: "", True: ", an answer is found in it", False: ", no answer is found in it"}[self.right]
        note = f"{many(self.tokens, 'token')}{said}"
        return Section(self.name, note, [Prose(self.text)], f"response {self.name}")


@dataclass(frozen=True)
class View:
    """An example ready to be shown; without ``segments`` there are no responses, or ``facts.refused`` says why."""

    example: Example
    facts: Facts
    method: MethodConfig
    contexts: list[ContextView]
    responses: list[Response]
    segments: list[Segment] = field(default_factory=list)
    pack_tokens: int = 0
    separate_tokens: int = 0

    @property
    def lengths(self) -> str:
        """Of the prompts, in words."""
        tokens = {context.name: context.tokens for context in self.contexts}
        ratio = f", ratio {tokens['short'] / tokens['long']:.3f}" if len(tokens) == 2 else ""
        return ", ".join(f"{name} {length:,} tokens" for name, length in tokens.items()) + ratio

    @property
    def warnings(self) -> list[str]:
        """What looks wrong."""
        reason = f": {visible(self.facts.refused or '')}"
        return [FLAGS[flag] + (reason if flag == "refused" else "") for flag in self.facts.flags]

    def printed(self, file: str) -> Iterator[RenderableType]:
        """What a terminal shows of it, in order."""
        example = self.example
        yield Section(visible(example.id), f"(index {example.index} of {file})", ())
        about = [
            ("question", visible(example.question) or "not recorded"),
            ("answers", " | ".join(map(visible, example.answers)) or "not recorded"),
            ("scores", ", ".join(f"{visible(name)} {value:g}" for name, value in example.scores.items())),
            ("source", visible(example.source)),
            ("lengths", self.lengths),
        ]
        yield from (Text.assemble((f"{name:<9} ", "soft"), value) for name, value in about if value)
        yield from (Note(f"! {warning}", "warn") for warning in self.warnings)
        yield Note("prompts as the chat template renders them: behind a bar what it adds, {control tokens} marked")
        yield from (part.section() for part in (*self.contexts, *self.responses))
        if self.segments:
            yield self.loss()

    def loss(self) -> Section:
        """The segments of the pack, and the tokens of each response once."""
        rows = table("segment", ">prompt", ">learnt", "positions", "predicted from", "its reward enters")
        alike: dict[tuple[int, ...], list[Segment]] = {}
        for segment in self.segments:
            alike.setdefault(tuple(token.id for token in segment.tokens), []).append(segment)
            partly = f" of {len(segment.tokens):,}" if segment.learnt != len(segment.tokens) else ""
            rows.add_row(
                Text.assemble((segment.name, segment.side.name.lower())),
                f"{segment.prompt_tokens:,}",
                f"{segment.learnt:,}{partly}",
                _run(segment.tokens[0].position, segment.tokens[-1].position),
                " and ".join(_run(*places) for places in segment.predictors),
                "; ".join(segment.uses),
            )
        loss, mode = self.method.preference_loss, self.method.context_mode
        saved = (self.separate_tokens - self.pack_tokens) / self.separate_tokens
        pack = f"one pack of {many(self.pack_tokens, 'token')} with shared prompts"
        blocks = [
            Note(f"--preference-loss {loss} --context-mode {mode}; reward: {loss_class(loss).reward_text}"),
            rows,
            *(
                Tokens(", ".join(s.name for s in same), same[0].side.name.lower(), same[0].tokens)
                for same in alike.values()
            ),
        ]
        note = f"{pack} ({self.separate_tokens:,} apart, {saved:.0%} saved)"
        return Section("what the loss sees", note, blocks, "loss")


def _run(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def make_view(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    seq_length: int | None = None,
    full: bool = False,
) -> View:
    """Takes an example apart; the token ids are those that training makes of it with ``method``.

    Args:
        full: fold and cut nothing.
    """
    wanted = all_scores(method) if example.group else frozenset()
    facts = measure(example, tokenizer, wanted, seq_length)
    contexts = [make_context(example, name, tokenizer, full) for name in example.chats]
    view = View(example, facts, method, contexts, [])
    if example.group is None:
        return view
    for name in ("chosen", "rejected"):
        text = getattr(example.group, name)
        found = find_in_response(text, example.answers) if example.answers else []
        marked = highlighted(text, found, answer_pattern(example.answers))
        right = bool(found) if example.answers else None
        view.responses.append(Response(name, marked, facts.tokens.get(name, 0), right))
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
                prompt.context,
                continuation.side,
                continuation.response,
                len(prompt.ids),
                shown,
                _runs(pack.predictors[own].tolist()),
                int(pack.scored.lengths[number]),
                uses(prompt.context, continuation.side, method),
            )
        )
    return replace(view, pack_tokens=len(pack.tokens), separate_tokens=tokens.separate_tokens())


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs


def uses(context: Context, side: Side, method: MethodConfig) -> list[str]:
    """The terms of the loss that a segment's log-prob enters, in words."""
    found = []
    if (context, side) in policy_scores(method):
        if context == pair_context(method):
            found.append(f"preference loss: {side.name.lower()}")
            held = loss_class(method.preference_loss).holds_likelihood or adds_likelihood(method)
            if side == Side.CHOSEN and held:
                found.append("likelihood term")
        if side in aligned_sides(method):
            stopped = context == Context.SHORT and method.alignment_stop_short_gradient
            found.append(f"alignment: {context.name.lower()} side" + (", no gradient" if stopped else ""))
    if (context, side) in reference_scores(method):
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
