"""Groups and conversations as token ids, ready to be packed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.chat import conversation_ids, prompt_ids, response_ids
from megatron_solopo.data.schema import Conversation, PreferenceGroup, read_conversations, read_groups
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt: token ids, and which of them are learnt (a response: all)."""

    role: str
    ids: Sequence[int]
    learnt: Sequence[bool] | None = None

    @property
    def learnt_count(self) -> int:
        return len(self.ids) if self.learnt is None else sum(self.learnt)


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids and the continuations that are scored after it."""

    ids: Sequence[int]
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class TokenGroup:
    """One example of the training set; it never splits over packs."""

    id: str
    prompts: tuple[Prompt, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one continuation."""
        return max(len(p.ids) + len(c.ids) for p in self.prompts for c in p.continuations)

    def with_roles(self, roles: Sequence[str]) -> TokenGroup:
        """The same example with these roles only; see `TokenDataset.with_roles`."""
        kept = (Prompt(p.ids, tuple(c for c in p.continuations if c.role in roles)) for p in self.prompts)
        return TokenGroup(self.id, tuple(prompt for prompt in kept if prompt.continuations))

    def tokens(self, share_prompts: bool, multiple_of: int = 1) -> int:
        """Tokens that one forward pass computes for this group (the last of a continuation is only predicted), each
        piece padded to a multiple."""

        def slot(length: int) -> int:
            return -(-length // multiple_of) * multiple_of

        if share_prompts:
            return sum(slot(len(p.ids)) + sum(slot(len(c.ids) - 1) for c in p.continuations) for p in self.prompts)
        return sum(slot(len(p.ids) + len(c.ids) - 1) for p in self.prompts for c in p.continuations)

    def separate_tokens(self) -> int:
        """Tokens of every prompt with every continuation, the count that sharing saves on."""
        return self.tokens(share_prompts=False)


@dataclass(frozen=True)
class TokenDataset:
    """Tokenised examples in file order.

    Attributes:
        groups: the examples.
        dropped: (id, tokens) of those beyond the length limit.
        fingerprint: sha256 over all ids and roles; equal data, tokenizer and template give equal fingerprints.
    """

    groups: list[TokenGroup]
    dropped: list[tuple[str, int]]
    fingerprint: str

    def chosen_rejected_lengths(self) -> list[tuple[int, int]]:
        """Tokens of the chosen and the rejected answer of every group that has both on one context."""
        found = []
        for group in self.groups:
            for prompt in group.prompts:
                lengths = {c.role.partition("_")[2]: len(c.ids) for c in prompt.continuations}
                if lengths.keys() == {"chosen", "rejected"}:
                    found.append((lengths["chosen"], lengths["rejected"]))
                    break
        return found

    def with_roles(self, roles: Sequence[str]) -> TokenDataset:
        """The same examples with these roles only; a prompt without any of them goes too.

        Policy and reference can score different roles of one data set, and then number its examples alike.
        """
        groups = [group.with_roles(roles) for group in self.groups]
        if groups == self.groups:
            return self
        digest = hashlib.sha256()
        for group in groups:
            _update(digest, group)
        return TokenDataset(groups, self.dropped, digest.hexdigest())


def tokenize(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    roles: tuple[str, ...],
    seq_length: int,
    overlong: str = "refuse",
) -> TokenDataset:
    """Reads and tokenises a JSONL file of groups, or of conversations when ``roles`` is ("response",).

    Args:
        roles: which (context, response) pairs the method scores, e.g. ("short_chosen", "short_rejected",
            "long_chosen").
        seq_length: the longest prompt plus continuation, in tokens.
        overlong: ``refuse`` or ``drop`` what is longer.

    Raises:
        UserError: a malformed record, a group without long context where one is needed, an example beyond
            seq_length with ``refuse``, or no example at all.
    """
    groups, dropped, digest = [], [], hashlib.sha256()
    for group in _examples(path, tokenizer, roles):
        if group.longest > seq_length:
            if overlong == "refuse":
                raise UserError(
                    f"{path}: example {group.id!r} has {group.longest} tokens, above --seq-length "
                    f"{seq_length}; raise it, or drop such examples with --overlong drop"
                )
            dropped.append((group.id, group.longest))
            continue
        _update(digest, group)
        groups.append(group)
    if not groups:
        why = f"; all {len(dropped)} are longer than --seq-length {seq_length}" if dropped else ""
        raise UserError(f"{path}: no usable example{why}")
    return TokenDataset(groups, dropped, digest.hexdigest())


def _examples(path: str | Path, tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> Iterator[TokenGroup]:
    if roles == ("response",):
        for conversation in read_conversations(path):
            try:
                yield tokenize_conversation(conversation, tokenizer)
            except UserError as error:
                raise UserError(f"{path}: conversation {conversation.id!r}: {error}") from None
        return
    for group in read_groups(path):
        try:
            yield tokenize_group(group, tokenizer, roles)
        except UserError as error:
            raise UserError(f"{path}: group {group.id!r}: {error}") from None


def tokenize_conversation(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> TokenGroup:
    """The first turns as the prompt, everything after as one continuation."""
    prompt, ids, learnt = conversation_ids(tokenizer, conversation.messages)
    continuation = Continuation("response", array("i", ids), None if all(learnt) else learnt)
    return TokenGroup(conversation.id, (Prompt(array("i", prompt), (continuation,)),))


def tokenize_group(group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> TokenGroup:
    """The prompts and continuations that ``roles`` name.

    Raises:
        UserError: a long role is asked for and the group has no long context, or the chosen and rejected
            responses have the same token ids.
    """
    prompts = []
    for context, messages in (("short", group.short_messages), ("long", group.long_messages)):
        wanted = [role for role in roles if role.startswith(context)]
        if not wanted:
            continue
        if messages is None:
            raise UserError("no long_messages; give long contexts, or train with --context-mode short")
        ids = prompt_ids(tokenizer, messages)
        responses = (getattr(group, role.split("_")[1]) for role in wanted)
        continuations = tuple(
            Continuation(role, array("i", response_ids(tokenizer, messages, response)))
            for role, response in zip(wanted, responses, strict=True)
        )
        if len(continuations) == 2 and continuations[0].ids == continuations[1].ids:
            raise UserError("chosen and rejected are the same token ids; such a pair teaches nothing, remove it")
        prompts.append(Prompt(array("i", ids), continuations))
    return TokenGroup(group.id, tuple(prompts))


def _update(digest: hashlib._Hash, group: TokenGroup) -> None:
    for prompt in group.prompts:
        digest.update(len(prompt.ids).to_bytes(8, "little") + array("i", prompt.ids).tobytes())
        for continuation in prompt.continuations:
            digest.update(continuation.role.encode() + len(continuation.ids).to_bytes(8, "little"))
            digest.update(array("i", continuation.ids).tobytes())
            if continuation.learnt is not None:
                digest.update(bytes(continuation.learnt))
