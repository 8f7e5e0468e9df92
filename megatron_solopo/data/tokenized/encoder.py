"""Records to token groups: prompts and responses through the tokenizer and its chat template, within a length."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
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
from megatron_solopo.data.tokenized.stretch import boundary_places
from megatron_solopo.data.tokenized.tokens import Completion, Dropped, Prompt, Report, Shortened, TokenGroup
from megatron_solopo.data.validation import Answer
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored, Side


def _within(places: Iterable[int], tokens: int) -> Sequence[int]:
    """Returns the places behind the first token of a prompt, in order and each once."""
    return tuple(sorted({place for place in places if 0 < place < tokens}))


NO_LONG_CONTEXT = "no long_messages; add long contexts, or train with --context-mode short"


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
