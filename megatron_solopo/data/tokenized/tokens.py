"""Groups and conversations as token ids, ready to be packed."""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.schema import Conversation, DocumentSpan, Message, PreferenceGroup
from megatron_solopo.data.text.chat import (
    conversation_and_places,
    open_thought,
    prompt_and_places,
    prompt_ids,
    prompt_length,
    response_ids,
    turns_ids,
)
from megatron_solopo.data.text.control import control_tokens
from megatron_solopo.data.text.tokenizer import encode_batch
from megatron_solopo.data.tokenized.overlong import Cut, cut_context
from megatron_solopo.data.tokenized.stretch import Jump, Stretch, boundary_places
from megatron_solopo.data.validation import Answer
from megatron_solopo.errors import UserError
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


def _within(places: Iterable[int], tokens: int) -> Sequence[int]:
    """Returns the places behind the first token of a prompt, in order and each once."""
    return tuple(sorted({place for place in places if 0 < place < tokens}))


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


NO_LONG_CONTEXT = "no long_messages; add long contexts, or train with --context-mode short"


def no_example(path: str | Path, dropped: int, seq_length: int | None) -> str:
    """Returns the message for a file without a usable example."""
    return f"{path}: no usable example" + (
        f"; all {dropped} are longer than --seq-length {seq_length}" if dropped else ""
    )


def _check_distinct(completions: Sequence[Completion]) -> None:
    """Refuses two responses of the same ids: a pair of them has a constant loss, and on one side they are one.

    Raises:
        UserError: there are two.
    """
    seen: dict[bytes, str] = {}
    for completion in completions:
        name = completion.side.name.lower() + (f"_{completion.response}" if completion.response else "")
        other = seen.setdefault(np.asarray(completion.ids, np.int32).tobytes(), name)
        if other != name:
            raise UserError(
                "responses-equal",
                f"{other} and {name} are the same token ids, so their loss is constant; remove it",
            )


class Encoder:
    """Turns records into token groups within a length, and keeps count.

    Args:
        seq_length: the longest prompt plus completion, in tokens; None for no limit.
        overlong: what happens to longer ones: ``refuse``, ``drop`` or ``cut``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_length: int | None, overlong: str) -> None:
        self.tokenizer, self.seq_length, self.overlong = tokenizer, seq_length, overlong
        self._closing = open_thought(tokenizer)
        self.report = Report()

    def encode(self, record: PreferenceGroup | Conversation, scored: Scored) -> TokenGroup | None:
        """Returns the example with these segments, or None where it is too long and dropped.

        Raises:
            UserError: the long context is asked for and the group has none, chosen and rejected have the same token
                ids, the chat template refuses the messages, or the example is too long with ``refuse``.
        """
        is_group = isinstance(record, PreferenceGroup)
        cut: list[Shortened] = []
        whys: list[str] = []
        try:
            if is_group:
                answers: list[str] = []
                group = self._preference(record, scored, cut, whys, answers)
                contexts = {context.name.lower() for context, _ in scored}
                messages = [message for name in contexts for message in getattr(record, f"{name}_messages")]
            else:
                group = self._conversation(record)
                messages = record.messages
                answers = [message["content"] for message in messages if message["role"] == "assistant"]
        except UserError as error:
            kind = "group" if is_group else "conversation"
            raise error.at(f"{kind} {record.id!r}") from None
        if self.seq_length is None or group.longest <= self.seq_length:
            self.report.cut += cut
            spelled = control_tokens(self.tokenizer).spelled
            in_prompt = any(spelled(message["content"], message["role"]) for message in messages)
            if in_prompt or any(spelled(answer, "assistant") for answer in answers):
                self.report.spelled.append(record.id)
            if self._closing is not None and not all(self._closing in answer for answer in answers):
                self.report.open.append(record.id)
            return group
        if self.overlong == "refuse":
            ways = "drop such examples with --overlong drop" + (
                ", or shorten their distractors with --overlong cut" if is_group else ""
            )
            raise UserError(
                "example-too-long",
                f"example {record.id!r} has {group.longest} tokens, above --seq-length {self.seq_length}; raise it, "
                f"{ways}",
            )
        self.report.dropped.append(Dropped(record.id, group.longest, "; ".join(whys)))
        return None

    def _conversation(self, conversation: Conversation) -> TokenGroup:
        """Returns the first turns as the prompt, everything after as one completion."""
        prompt, places, ids, loss_mask = conversation_and_places(
            self.tokenizer, conversation.messages, lambda content: boundary_places(content, ())
        )
        completion = Completion(Side.PLAIN, array("i", ids), None if all(loss_mask) else loss_mask)
        boundaries = _within(places, len(prompt))
        return TokenGroup(conversation.id, (Prompt(Context.SHORT, array("i", prompt), (completion,), boundaries),))

    def _preference(
        self,
        group: PreferenceGroup,
        scored: Scored,
        cut: list[Shortened],
        whys: list[str],
        answers: list[str],
    ) -> TokenGroup:
        """Returns the prompts and completions that ``scored`` names; notes what was cut, why something could not be,
        and the responses whose texts were tokenized."""
        prompts = []
        sides = {side: side.name.lower() for side in (Side.CHOSEN, Side.REJECTED)}
        responses = {
            side: [
                (response, self._sampled(response, ids))
                for response, ids in zip(group.responses(name), group.sampled_ids(name), strict=True)
            ]
            for side, name in sides.items()
        }
        for context in Context:
            if not any((context, side) in scored for side in sides):
                continue
            name = context.name.lower()
            messages = getattr(group, f"{name}_messages")
            if messages is None:
                raise UserError("long-context-missing", NO_LONG_CONTEXT)
            completions = [
                self._completion(messages, side, number, *one, answers)
                for side in sides
                if (context, side) in scored
                for number, one in enumerate(responses[side])
            ]
            _check_distinct(completions)
            ids, boundaries = self._prompt(context, messages, getattr(group, f"{name}_spans"))
            if self.overlong == "cut" and self.seq_length is not None:
                limit = self.seq_length - max(len(completion.ids) for completion in completions)
                if len(ids) > limit:
                    shorter = self._cut(group, name, limit, whys)
                    if shorter is not None:
                        before = len(ids)
                        ids, boundaries = self._prompt(context, shorter.messages, shorter.spans)
                        cut.append(Shortened(group.id, name, before, len(ids)))
            prompts.append(Prompt(context, array("i", ids), tuple(completions), boundaries))
        return TokenGroup(group.id, tuple(prompts))

    def _completion(
        self,
        messages: list[Message],
        side: Side,
        number: int,
        response: Answer,
        sampled: list[int] | None,
        answers: list[str],
    ) -> Completion:
        """Returns a response after a prompt; notes the texts that were tokenized."""
        if sampled is not None:
            return Completion(side, array("i", sampled), None, number)
        if isinstance(response, str):
            answers.append(response)
            return Completion(side, array("i", response_ids(self.tokenizer, messages, response)), None, number)
        answers += [turn["content"] for turn in response if turn["role"] == "assistant"]
        ids, loss_mask = turns_ids(self.tokenizer, messages, response)
        return Completion(side, array("i", ids), None if all(loss_mask) else loss_mask, number)

    def _prompt(
        self, context: Context, messages: list[Message], spans: Sequence[DocumentSpan]
    ) -> tuple[list[int], Sequence[int]]:
        """Returns a prompt's token ids and the boundaries of a long one."""
        if context != Context.LONG:
            return prompt_ids(self.tokenizer, messages), ()
        ids, places = prompt_and_places(self.tokenizer, messages, boundary_places(messages[-1]["content"], spans))
        return ids, _within(places, len(ids))

    def _cut(self, group: PreferenceGroup, context: str, limit: int, whys: list[str]) -> Cut | None:
        """Returns the shortened context, or None, and why is noted."""
        spans = getattr(group, f"{context}_spans")
        if not spans:
            whys.append(f"no {context}_spans mark its documents")
            return None
        cut = cut_context(
            getattr(group, f"{context}_messages"),
            spans,
            limit,
            lambda messages: prompt_length(self.tokenizer, messages),
            lambda texts: [len(tokens) for tokens in encode_batch(self.tokenizer, texts)],
        )
        if cut is None:
            whys.append(f"the distractors of its {context} context are not enough")
        return cut

    def _sampled(self, text: Answer, ids: Sequence[int] | None) -> list[int] | None:
        """Returns the ids a response was sampled as, its end of turn once; None where they are not this tokenizer's."""
        if ids is None or not isinstance(text, str):
            return None
        end = self.tokenizer.eos_token_id
        body = list(ids[: ids.index(end)] if end in ids else ids)
        if body and max(body) < len(self.tokenizer):
            texts = (self.tokenizer.decode(body, skip_special_tokens=skip) for skip in (True, False))
            if text in texts:
                self.report.ids_used += 1
                return [*body, end]
        self.report.ids_mismatched += 1
        return None
