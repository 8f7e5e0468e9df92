"""One example, split into the parts that are shown: facts, prompts, responses, tokens of the loss."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.answers import find_in_response
from megatron_solopo.data.inspection.blocks import STYLES, Block, attributes, many, table, visible
from megatron_solopo.data.inspection.context import ContextView, make_context
from megatron_solopo.data.inspection.examples import Example
from megatron_solopo.data.inspection.facts import FLAGS, Facts, measure, token_group
from megatron_solopo.data.schema import text_of
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.stretch import Stretch
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

_ROW = 100
"""Cells of a row of tokens, each with a bar behind it."""


class Token(NamedTuple):
    """One token of a response: its id, its text, its position in the sequence, and whether it is trained."""

    id: int
    text: str
    position: int
    trained: bool
    end_of_turn: bool


@dataclass(frozen=True)
class Segment:
    """A response on a context in the pack.

    Attributes:
        response: which response of its side, from 0.
        predictors: first and last place of each run of places in the pack whose hidden states predict its tokens; the
            prompt's last place predicts the first.
        trained_tokens: tokens whose log-probs are summed.
        uses: the terms of the loss that its reward enters.
    """

    context: Context
    side: Side
    response: int
    prompt_tokens: int
    tokens: list[Token]
    predictors: list[tuple[int, int]]
    trained_tokens: int
    uses: list[str]

    @property
    def name(self) -> str:
        return segment_name(self.context, self.side, self.response)


@dataclass(frozen=True)
class View:
    """An example, ready to print; without ``segments`` it has no responses, or ``facts.refused`` holds the reason."""

    example: Example
    facts: Facts
    method: MethodConfig
    contexts: list[ContextView]
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

    def printed(self, file: str) -> Iterator[Block]:
        """Yields what a terminal shows of it, in order."""
        example = self.example
        about = [
            ("question", visible(example.question) or "not recorded"),
            ("answers", " | ".join(map(visible, example.answers)) or "not recorded"),
            ("scores", ", ".join(f"{visible(name)} {value:g}" for name, value in example.scores.items())),
            ("source", visible(example.source)),
            ("lengths", self.lengths),
        ]
        lines = [Text.assemble((f"{name:<9} ", "soft"), value) for name, value in about if value]
        lines += [Text(f"! {warning}", "warn") for warning in self.warnings]
        legend = "prompts as the chat template renders them: behind a bar what it adds, {control tokens} marked"
        yield Block(visible(example.id), [*lines, Text(legend, "soft")], f"(index {example.index} of {file})")
        yield from (context.section() for context in self.contexts)
        yield from self.responses()
        if self.segments:
            yield self.loss()

    def responses(self) -> Iterator[Block]:
        """Chosen and rejected ones; whether an answer is found in them, where answers are known."""
        group, answers = self.example.group, self.example.answers
        each = [(side, *one) for side in ("chosen", "rejected") if group for one in enumerate(group.responses(side))]
        for side, number, turns in each:
            name, response = f"{side}_{number}" if number else side, text_of(turns)
            answer_spans = find_in_response(response, answers) if answers else []
            answer_note = f", {'an' if answer_spans else 'no'} answer is found in it" if answers else ""
            note = many(self.facts.tokens.get(name, 0), "token") + answer_note
            yield Block(name, [highlighted(response, answer_spans, answer_pattern(answers))], note, f"response {side}")

    def loss(self) -> Block:
        """Returns the segments of the pack, and the tokens of each response once."""
        rows = table("segment", ">prompt", ">trained", "positions", "predicted from", "its reward enters")
        parts: list[Text | Table | Block] = [rows]
        alike: dict[tuple[int, ...], list[Segment]] = {}
        for segment in self.segments:
            alike.setdefault(tuple(token.id for token in segment.tokens), []).append(segment)
            partly = f" of {len(segment.tokens):,}" if segment.trained_tokens != len(segment.tokens) else ""
            rows.add_row(
                Text.assemble((segment.name, segment.side.name.lower())),
                f"{segment.prompt_tokens:,}",
                f"{segment.trained_tokens:,}{partly}",
                _run(segment.tokens[0].position, segment.tokens[-1].position),
                " and ".join(_run(*places) for places in segment.predictors),
                "; ".join(segment.uses),
            )
        for same in alike.values():
            side = same[0].side.name.lower()
            title = Text("\n" + ", ".join(segment.name for segment in same), f"bold {STYLES[side]}")
            lines = [title, *token_rows(same[0].tokens)]
            parts.append(Block(title.plain.strip(), lines[1:], kind=f"tokens {side}", instead=lines))
        loss, mode = self.method.preference_loss, self.method.context_mode
        reward = f"--preference-loss {loss} --context-mode {mode}; reward: {loss_class(loss).reward_text}"
        saved = (self.separate_tokens - self.pack_tokens) / self.separate_tokens
        pack = f"one pack of {many(self.pack_tokens, 'token')} with shared prompts"
        note = f"{pack} ({self.separate_tokens:,} apart, {saved:.0%} saved)"
        return Block("what the loss sees", [Text(reward, "soft"), *parts], note, "loss")


def token_rows(tokens: Sequence[Token]) -> Iterator[Text]:
    """Yields the rows of tokens, each behind the position of its first: shades part them (``|`` without colours), and
    what is not trained is in parentheses there."""
    row, used = Text(), 0
    for index, token in enumerate(tokens):
        # With line breaks and tabs to be seen.
        cell = Text(visible(token.text).replace("\n", "\u23ce").replace("\t", "\u21e5"))
        styles = ["token", "trained" if token.trained else "untrained"]
        styles += ["line"] * ("\n" in token.text)
        styles += ["end"] if token.end_of_turn else ["odd"] * (token.trained and index % 2)
        tooltip = f"position {token.position}, id {token.id}{'' if token.trained else ', not trained'}"
        for style in (*styles, attributes(title=tooltip)):
            cell.stylize(style)
        cells = cell.cell_len + (1 if token.trained else 3)
        if not row or used + cells > _ROW:
            yield from [row] * bool(row)
            row, used = Text.assemble((f"{token.position:>8,} ", "place")), 0
        row.append_text(cell)
        used += cells
    yield row


def _run(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def make_view(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    method: MethodConfig,
    seq_length: int | None = None,
    full: bool = False,
    stretch: Stretch | None = None,
) -> View:
    """Takes an example apart; the token ids are those that training makes of it with ``method``.

    Args:
        full: fold and cut nothing.
        stretch: how training stretches positions, which are shown as in its first epoch.
    """
    scored = all_scores(method) if example.group else frozenset()
    facts = measure(example, tokenizer, scored, seq_length)
    tokens = None
    if example.group is not None and facts.refused is None:
        tokens = token_group(example.group, tokenizer, scored)
        tokens = stretch.of_group(tokens, 0) if stretch else tokens
    jumps = {prompt.context.name.lower(): prompt.jumps for prompt in tokens.prompts} if tokens else {}
    contexts = [make_context(example, name, tokenizer, full, jumps.get(name, ())) for name in example.chats]
    view = View(example, facts, method, contexts)
    if tokens is None:
        return view
    pack = build_pack([tokens], [0])
    completions = [(prompt, one) for prompt in tokens.prompts for one in prompt.completions]
    for number, (prompt, completion) in enumerate(completions):
        loss_mask = [True] * len(completion.ids) if completion.loss_mask is None else completion.loss_mask
        view.segments.append(
            Segment(
                prompt.context,
                completion.side,
                completion.response,
                len(prompt.ids),
                [
                    Token(i, token_text(tokenizer, i), prompt.end + k, loss_mask[k], i == tokenizer.eos_token_id)
                    for k, i in enumerate(completion.ids)
                ],
                _runs(pack.predictors[pack.segments == number].tolist()),
                int(pack.scored.lengths[number]),
                uses(prompt.context, completion.side, method),
            )
        )
    return replace(view, pack_tokens=len(pack.tokens), separate_tokens=tokens.separate_tokens())


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for _, members in runs for run in [list(members)]]


def uses(context: Context, side: Side, method: MethodConfig) -> list[str]:
    """Returns the terms of the loss that a segment's log-prob enters, in words."""
    terms = []
    if (context, side) in policy_scores(method):
        if context == pair_context(method):
            terms.append(f"preference loss: {side.name.lower()}")
            held = loss_class(method.preference_loss).holds_likelihood or adds_likelihood(method)
            if side == Side.CHOSEN and held:
                terms.append("likelihood term")
        if side in aligned_sides(method):
            stopped = context == Context.SHORT and method.alignment_stop_short_gradient
            terms.append(f"alignment: {context.name.lower()} side" + (", no gradient" if stopped else ""))
    if (context, side) in reference_scores(method):
        terms.append("reference log-prob")
    return terms


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as it is in a text, its leading space included; the vocabulary's spelling where it is part of a
    character."""
    spelled, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if "\ufffd" in text or not text:
        return spelled
    return " " + text if spelled.startswith("\u2581") and not text.startswith(" ") else text


def answer_pattern(answers: Sequence[str]) -> re.Pattern[str] | None:
    """Matches any answer in a text, in any case and punctuation; None where there is none to look for."""
    words = [r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", answer))) for answer in answers]
    words = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(words), re.IGNORECASE) if words else None


def highlighted(text: str, counted: Sequence[tuple[int, int]], pattern: re.Pattern[str] | None = None) -> Text:
    """Returns the text with answers in the style "answer", and in "other" those that do not count.

    An answer that does not count is part of a longer word, or in a response outside its answer part.

    Args:
        counted: start and end of those that count.
        pattern: `answer_pattern`, which the others match.
    """
    marked = Text(visible(text))
    for start, end in counted:
        marked.stylize("answer", start, end)
    for match in pattern.finditer(text) if pattern else ():
        if not any(match.start() < end and start < match.end() for start, end in counted):
            marked.stylize("other", *match.span())
    return marked
