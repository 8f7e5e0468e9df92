"""Groups and conversations as token ids, ready to be packed."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.data.tokenized.stretch import Jump, Stretch
from megatron_solopo.pack import Context, Scored, Side

CONVERSATION: Scored = frozenset({(Context.SHORT, Side.PLAIN)})
"""What is scored of a conversation."""


@dataclass(frozen=True)
class Completion:
    """What follows a prompt: its token ids, and a loss mask that is true where a token is trained (None: all are).

    ``response`` numbers the responses of its side in its group from 0; on another prompt the same response has the same
    number.
    """

    side: Side
    ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None
    response: int = 0

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that the loss mask selects."""
        return len(self.ids) if self.loss_mask is None else int(np.count_nonzero(np.asarray(self.loss_mask)))


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids and the completions that are scored after it.

    Attributes:
        boundaries: tokens, not the first, at which positions may jump: each begins a document or paragraph; of long
            prompts and those of conversations alone.
        jumps: where positions do jump, in order.
    """

    context: Context
    ids: Sequence[int]
    completions: tuple[Completion, ...]
    boundaries: Sequence[int] = ()
    jumps: tuple[Jump, ...] = ()

    @property
    def end(self) -> int:
        """The position of a completion's first token."""
        return len(self.ids) + sum(jump.gap for jump in self.jumps)

    def positions(self) -> np.ndarray:
        """Returns [tokens] int64."""
        positions = np.arange(len(self.ids))
        for token, gap in self.jumps:
            positions[token:] += gap
        return positions


@dataclass(frozen=True)
class TokenGroup:
    """One example of the training set; it never splits over packs."""

    id: str
    prompts: tuple[Prompt, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one completion."""
        return max(len(p.ids) + len(c.ids) for p in self.prompts for c in p.completions)

    @property
    def shortest_response(self) -> int:
        """Trained tokens of the shortest response on the first context that has chosen and rejected ones."""
        for prompt in self.prompts:
            if {Side.CHOSEN, Side.REJECTED} <= {completion.side for completion in prompt.completions}:
                return min(completion.trained_tokens for completion in prompt.completions)
        raise ValueError(f"group {self.id!r} has no pair on one context")

    def sequences(self) -> Iterator[Sequence[int]]:
        """Yields the ids of every prompt and completion."""
        for prompt in self.prompts:
            yield prompt.ids
            for completion in prompt.completions:
                yield completion.ids

    def segments(self) -> Iterator[tuple[Context, Completion]]:
        """Returns every completion with the context it follows, in the order of the packs."""
        return ((prompt.context, completion) for prompt in self.prompts for completion in prompt.completions)

    def only(self, scored: Scored) -> TokenGroup:
        """Returns the same example with these segments only; a prompt without any of them goes too."""
        kept = (
            replace(p, completions=tuple(c for c in p.completions if (p.context, c.side) in scored))
            for p in self.prompts
        )
        return TokenGroup(self.id, tuple(prompt for prompt in kept if prompt.completions))

    def tokens(self, share_prompts: bool, multiple_of: int = 1, prompt_multiple_of: int | None = None) -> int:
        """Returns the tokens that one forward pass computes for this group (the last of a completion is only
        predicted), each piece padded to a multiple; see `build_pack`."""

        def slot(length: int, multiple: int) -> int:
            return -(-length // multiple) * multiple

        of_prompts = prompt_multiple_of or multiple_of
        if share_prompts:
            continued = (c for p in self.prompts for c in p.completions)
            prompts = sum(slot(len(p.ids), of_prompts) for p in self.prompts)
            return prompts + sum(slot(len(c.ids) - 1, multiple_of) for c in continued)
        return sum(slot(len(p.ids) + len(c.ids) - 1, of_prompts) for p in self.prompts for c in p.completions)

    def separate_tokens(self) -> int:
        """Returns the tokens of every prompt with every completion, the count that sharing saves on."""
        return self.tokens(share_prompts=False)


class Dropped(NamedTuple):
    """An example that was left out for its length."""

    id: str
    tokens: int
    reason: str = ""


class Shortened(NamedTuple):
    """A context that lost distractor text: tokens of the prompt before and after."""

    id: str
    context: str
    before: int
    after: int


@dataclass
class Report:
    """What became of the examples, and of the token ids that came with their responses.

    Attributes:
        ids_used: responses whose sampled token ids are trained on.
        ids_mismatched: responses whose token ids are not this tokenizer's for their text, which was tokenized instead.
        spelled: ids of the examples whose texts spell control tokens, which were tokenized as text.
        open: ids of the examples with a response that does not close the thought which the chat template opens.
        without_boundary: ids of the examples whose positions cannot be stretched; of a run with --stretch-positions.
    """

    dropped: list[Dropped] = field(default_factory=list)
    cut: list[Shortened] = field(default_factory=list)
    ids_used: int = 0
    ids_mismatched: int = 0
    spelled: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    without_boundary: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Report:
        """Returns the inverse of `dataclasses.asdict`, also after a way through JSON."""
        lists = {
            "dropped": [Dropped(*one) for one in fields["dropped"]],
            "cut": [Shortened(*one) for one in fields["cut"]],
        }
        return cls(**{**fields, **lists})

    def overlong(self) -> Iterator[dict[str, Any]]:
        """Yields what was dropped and what was cut, as the records of an overlong.jsonl."""
        for dropped in self.dropped:
            yield {"what": "dropped", **dropped._asdict()}
        for cut in self.cut:
            yield {"what": "cut", **cut._asdict()}

    def add(self, other: Report) -> None:
        self.dropped += other.dropped
        self.cut += other.cut
        self.ids_used += other.ids_used
        self.ids_mismatched += other.ids_mismatched
        self.spelled += other.spelled
        self.open += other.open

    def lines(self, seq_length: int | None) -> list[str]:
        """Returns the counts for a person, with the first ten examples of each list."""
        lines = []
        if self.dropped:
            names = _first_ten([f"{d.id} ({d.tokens}{', ' + d.reason if d.reason else ''})" for d in self.dropped])
            lines.append(f"dropped {len(self.dropped)} examples longer than {seq_length} tokens: {names}")
        if self.cut:
            names = _first_ten([f"{c.id} {c.context} ({c.before} to {c.after})" for c in self.cut])
            lines.append(f"cut distractors of {len(self.cut)} contexts to fit {seq_length} tokens: {names}")
        if self.ids_mismatched:
            lines.append(
                f"token ids of {self.ids_mismatched} responses are not this tokenizer's for their text, which was "
                f"tokenized instead ({self.ids_used} used as sampled)"
            )
        if self.spelled:
            lines.append(
                f"control tokens in the texts of {len(self.spelled)} examples, which are tokenized as text: "
                + _first_ten(self.spelled)
            )
        if self.open:
            lines.append(
                f"responses of {len(self.open)} examples do not close the thought that the chat template opens, and "
                "are trained inside it; for answers without thoughts set a template that opens none: "
                + _first_ten(self.open)
            )
        if self.without_boundary:
            lines.append(
                f"{len(self.without_boundary)} examples have no document or paragraph at which positions could jump, "
                "and keep theirs: " + _first_ten(self.without_boundary)
            )
        return lines


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")


@dataclass(frozen=True)
class TokenDataset:
    """Tokenized examples in file order.

    Attributes:
        groups: the examples; those of a store (token_store.py) are built when they are read, and the length of
            their ids is known without reading them.
        dropped: those beyond the length limit.
        fingerprint: sha256 over all ids and what they are; equal data, tokenizer and template have equal fingerprints.
        report: what else became of the examples.
        stretch: how training stretches the positions of long prompts; None: it does not.
    """

    groups: Sequence[TokenGroup]
    dropped: list[Dropped]
    fingerprint: str
    report: Report = field(default_factory=Report, compare=False)
    stretch: Stretch | None = None

    def of_epoch(self, index: int, epoch: int) -> TokenGroup:
        """Returns an example as an epoch trains on it."""
        group = self.groups[index]
        return group if self.stretch is None else self.stretch.of_group(group, epoch)

    def chosen_rejected_lengths(self) -> list[tuple[int, int]]:
        """Returns the tokens of the chosen and the rejected answer of every pair on one context of its group."""
        pairs = []
        for group in self.groups:
            for prompt in group.prompts:
                chosen, rejected = (
                    [c.trained_tokens for c in prompt.completions if c.side == side]
                    for side in (Side.CHOSEN, Side.REJECTED)
                )
                if chosen and rejected:
                    pairs += itertools.product(chosen, rejected)
                    break
        return pairs

    def segment_counts(self) -> Tensor:
        """Returns [examples, contexts, sides] int64: how many responses each example has of each side on each context.

        Raises:
            ValueError: the responses of a side are not numbered from 0.
        """
        counts = torch.zeros(len(self.groups), len(Context), len(Side), dtype=torch.int64)
        for row, group in enumerate(self.groups):
            numbers: dict[tuple[Context, Side], list[int]] = defaultdict(list)
            for context, completion in group.segments():
                numbers[context, completion.side].append(completion.response)
            for (context, side), each in numbers.items():
                if sorted(each) != list(range(len(each))):
                    raise ValueError(f"responses {each} of one side of group {group.id!r} are not numbered from 0")
                counts[row, context, side] = len(each)
        return counts


def no_example(path: str | Path, dropped: int, seq_length: int | None) -> str:
    """Returns the message for a file without a usable example."""
    if dropped:
        return f"{path}: no usable example; all {dropped} are longer than --seq-length {seq_length}"
    return f"{path}: holds no example; set a file of build-pairs or another with preference groups or conversations"
