"""Token ids in a folder that ``solopo tokenize-data`` wrote: Megatron's IndexedDataset, opened by mmap.

    tokens.bin, tokens.idx   megatron-core's files: int32, one document a group, its sequences in the order of `LAYOUTS`
    digests.bin              sha256 of every sequence, 32 bytes each
    ids.jsonl                the group's id, one JSON text a line
    overlong.jsonl           what was dropped or cut for its length
    manifest.json            what it was made from and with, and the size and sha256 of the other files

A sequence of length 0 is absent; where the long prompt is there, an absent long response is the short one. A group is
made when it is looked at, and its ids are read, and compared with their digest, when they are looked at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.inputs import holds_data
from megatron_solopo.data.text.text_facts import TEXT_FACTS, text_differences
from megatron_solopo.data.tokenized.tokens import (
    CONVERSATION,
    Continuation,
    Dropped,
    Prompt,
    Report,
    Shortened,
    TokenDataset,
    TokenGroup,
    fingerprint,
    no_example,
)
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored, Side, segment_name

FORMAT = 2
"""Raised when the meaning of a file changes."""

MANIFEST = "manifest.json"
DIGEST_BYTES = 32

PAIR = (Side.CHOSEN, Side.REJECTED)
SHORT_PAIR: Scored = frozenset((Context.SHORT, side) for side in PAIR)
BOTH_PAIRS: Scored = frozenset((context, side) for context in Context for side in PAIR)

LAYOUTS: dict[str, tuple[str, ...]] = {
    "preference": tuple(
        name
        for context in Context
        for name in (f"{context.name.lower()}_prompt", *(segment_name(context, side) for side in PAIR))
    ),
    "sft": ("prompt", segment_name(Context.SHORT, Side.PLAIN), "learnt"),
}
"""Objective -> the sequences of a document; see `prompt_place` and `response_place`. ``learnt``: lengths of the learnt
and the other stretches of the response by turns, learnt first; absent where all of it is learnt."""

LEARNT = 2


def prompt_place(context: Context) -> int:
    """The place of a prompt in its document; a conversation's is the first."""
    return context * (1 + len(PAIR))


def response_place(context: Context, side: Side) -> int:
    """The place of a response in its document; a conversation's is behind its prompt."""
    return prompt_place(context) + 1 + (0 if side == Side.PLAIN else side)


def learnt_stretches(learnt: Sequence[bool]) -> list[int]:
    """The lengths of the stretches of True and False by turns, True first."""
    stretches, now = [0], True
    for mark in learnt:
        if mark is not now:
            stretches.append(0)
            now = mark
        stretches[-1] += 1
    return stretches


def learnt_marks(stretches: Iterable[int]) -> list[bool]:
    """The inverse of `learnt_stretches`."""
    marks: list[bool] = []
    for number, length in enumerate(stretches):
        marks += [number % 2 == 0] * length
    return marks


def sequences_of(group: TokenGroup, objective: str) -> list[Sequence[int]]:
    """A group's sequences in the order of `LAYOUTS`; absent ones are empty."""
    found: list[Sequence[int]] = [()] * len(LAYOUTS[objective])
    for prompt in group.prompts:
        found[prompt_place(prompt.context)] = prompt.ids
        for continuation in prompt.continuations:
            place = response_place(prompt.context, continuation.side)
            if found[place]:
                raise ValueError(f"group {group.id!r}: the format has room for one response of a side")
            found[place] = continuation.ids
            if continuation.learnt is not None:
                found[LEARNT] = learnt_stretches(continuation.learnt)
    if objective == "preference":
        for side in PAIR:
            short, long = (response_place(context, side) for context in Context)
            if found[long] == found[short]:
                found[long] = ()
    return found


class StoredIds(Sequence[int]):
    """Token ids that are read when they are looked at; their number is known before.

    Reading raises UserError where the bytes are not those that were written.
    """

    def __init__(self, store: _Store, row: int, place: int) -> None:
        self._store, self._row, self._place = store, row, place
        self._number = row * len(store.layout) + place

    def __len__(self) -> int:
        return int(self._store.lengths[self._number])

    @property
    def digest(self) -> bytes:
        """sha256 of the ids as 32-bit integers."""
        return self._store.digests[self._number].tobytes()

    @cached_property
    def ids(self) -> array[int]:
        data = self._store.tokens[self._number].tobytes()
        if hashlib.sha256(data).digest() != self.digest:
            raise UserError(
                f"{self._store.folder}: {self._store.layout[self._place]} of group "
                f"{self._store.ids[self._row]!r} is not what was written; the disk or a copy "
                "damaged tokens.bin: copy it again, or delete the folder and tokenise again"
            )
        ids = array("i")
        ids.frombytes(data)
        return ids

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and self.ids == array("i", other)

    __hash__ = None


@dataclass(frozen=True, eq=False)
class _Store:
    """The open files of a folder."""

    folder: Path
    manifest: dict[str, Any]
    tokens: Any
    digests: np.ndarray
    ids: list[str]

    @cached_property
    def layout(self) -> tuple[str, ...]:
        return LAYOUTS[self.manifest["objective"]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[sequences] int32."""
        return self.tokens.sequence_lengths

    def table(self) -> np.ndarray:
        """[groups, sequences of a group] int32: lengths, those of shared responses filled in."""
        table = self.lengths.reshape(-1, len(self.layout)).copy()
        if self.layout == LAYOUTS["preference"]:
            long_prompt = prompt_place(Context.LONG)
            short, long = table[:, 1:long_prompt], table[:, long_prompt + 1 :]
            shared = (table[:, long_prompt, None] > 0) & (long == 0)
            long[shared] = short[shared]
        return table

    def group(self, row: int, scored: Scored) -> TokenGroup:
        marks = None
        if self.layout == LAYOUTS["sft"] and len(learnt := StoredIds(self, row, LEARNT)):
            marks = learnt_marks(learnt.ids)
        prompts = []
        for context in Context:
            continuations = tuple(
                Continuation(side, self._response(row, context, side), marks)
                for side in Side
                if (context, side) in scored
            )
            if continuations:
                prompts.append(Prompt(context, StoredIds(self, row, prompt_place(context)), continuations))
        return TokenGroup(self.ids[row], tuple(prompts))

    def _response(self, row: int, context: Context, side: Side) -> StoredIds:
        own = StoredIds(self, row, response_place(context, side))
        return own if len(own) else StoredIds(self, row, response_place(Context.SHORT, side))


@dataclass(frozen=True, eq=False)
class _StoredGroups(Sequence[TokenGroup]):
    """Groups of a folder with some of their segments, made when they are looked at."""

    store: _Store
    rows: np.ndarray
    scored: Scored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenGroup:
        return self.store.group(int(self.rows[index]), self.scored)


@dataclass(frozen=True, eq=False)
class StoredTokens(TokenDataset):
    """A data set whose groups are a `_StoredGroups`."""

    def largest_token(self) -> tuple[int, str]:
        """(the largest token id of the folder, a group that has it)."""
        found = self.groups.store.manifest["largest_token"]
        return found["id"], found["group"]

    def segment_counts(self) -> Tensor:
        counts = torch.zeros(len(self.groups), len(Context), len(Side), dtype=torch.int64)
        for context, side in self.groups.scored:
            counts[:, context, side] = 1
        return counts

    def only(self, scored: Scored) -> TokenDataset:
        kept = self.groups.scored & scored
        if kept == self.groups.scored:
            return self
        groups = replace(self.groups, scored=kept)
        return replace(self, groups=groups, fingerprint=fingerprint(groups))


def is_store(path: str | Path) -> bool:
    """Whether a path names a folder of token ids, or one that holds no data that could be read otherwise."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    tokens = any((folder / name).exists() for name in (MANIFEST, "tokens.bin", "tokens.idx"))
    unfinished = folder.suffix in (".partial", ".work")
    return tokens or unfinished or not holds_data(folder)


def open_tokens(
    folder: str | Path, facts: Mapping[str, Any], scored: Scored, seq_length: int, overlong: str = "refuse"
) -> TokenDataset:
    """The examples of a folder; nothing but lengths, digests and ids is read.

    Args:
        facts: `text_facts` of the run.
        scored: what the method scores.
        seq_length: the longest prompt plus continuation of these segments, in tokens.
        overlong: what is longer: ``refuse`` or ``drop``; ``cut`` needs the texts, and is refused where it is needed.

    Raises:
        UserError: the folder is not complete, damaged, made for another objective or with another tokenizer or
            template, lacks a context, or holds an example beyond seq_length.
    """
    store = _open(Path(folder))
    manifest = store.manifest
    objective = "sft" if scored == CONVERSATION else "preference"
    if manifest["objective"] != objective:
        raise UserError(f"{folder}: holds data of --objective {manifest['objective']}, the run has {objective}")
    told = text_differences(manifest["text"], facts)
    if told:
        raise UserError(
            f"{folder}: made with {'; '.join(told)}; train with what it was made with, or tokenise again "
            "(solopo tokenize-data)"
        )
    table, report = store.table(), _report(store)
    longest = np.zeros(len(table), dtype=np.int64)
    for context, side in sorted(scored):
        prompt = table[:, prompt_place(context)]
        if not prompt.all():
            raise UserError(
                f"{folder}: group {store.ids[int(prompt.argmin())]!r}: no long_messages; give long contexts, or train "
                "with --context-mode short"
            )
        longest = np.maximum(longest, prompt + table[:, response_place(context, side)])
    too_long = longest > seq_length
    for row in np.flatnonzero(too_long):
        if overlong != "drop":
            way = (
                f"cut when the texts are tokenised: tokenize-data --seq-length {seq_length} --overlong cut"
                if overlong == "cut"
                else "drop such examples with --overlong drop"
            )
            raise UserError(
                f"{folder}: example {store.ids[row]!r} has {longest[row]} tokens, above --seq-length {seq_length}; "
                f"raise it, or {way}"
            )
        report.dropped.append(Dropped(store.ids[row], int(longest[row])))
    rows = np.flatnonzero(~too_long)
    if not len(rows):
        raise UserError(no_example(folder, len(report.dropped), seq_length))
    groups = _StoredGroups(store, rows, scored)
    return StoredTokens(groups, report.dropped, fingerprint(groups), report)


def _report(store: _Store) -> Report:
    """What tokenize-data reported."""
    counts = store.manifest["counts"]
    report = Report(ids_used=counts["ids_used"], ids_mismatched=counts["ids_mismatched"])
    with (store.folder / "overlong.jsonl").open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["what"] == "dropped":
                report.dropped.append(Dropped(record["id"], record["tokens"], record["reason"]))
            else:
                report.cut.append(Shortened(record["id"], record["context"], record["before"], record["after"]))
    return report


def overlong_records(report: Report) -> Iterator[dict[str, Any]]:
    """A report's lists as the records of overlong.jsonl."""
    for dropped in report.dropped:
        yield {"what": "dropped", **dropped._asdict()}
    for cut in report.cut:
        yield {"what": "cut", **cut._asdict()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        UserError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: a folder without {MANIFEST}; give a JSONL or Parquet file, or a folder that "
            "solopo tokenize-data completed"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        complete = found != FORMAT or (
            manifest["objective"] in LAYOUTS
            and set(TEXT_FACTS) == manifest["text"].keys() - {template_kwargs.DATE}
            and {"ids_used", "ids_mismatched", "groups"} <= manifest["counts"].keys()
            and {"id", "group"} <= manifest["largest_token"].keys()
            and {"tokens.bin", "tokens.idx", "digests.bin", "ids.jsonl", "overlong.jsonl"} == manifest["files"].keys()
            and all({"bytes", "sha256"} == facts.keys() for facts in manifest["files"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: not a manifest of solopo tokenize-data, or damaged; tokenise again")
    if found != FORMAT:
        raise UserError(f"{path}: of format {found}, this version reads {FORMAT}; tokenise again")
    return manifest


def indexed_dataset() -> ModuleType:
    """megatron-core's module, imported without its warnings of absent CUDA extensions; they matter to nobody here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron.core.datasets import indexed_dataset as module
    return module


def _open(folder: Path) -> _Store:
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes, {facts['bytes']:,} were written"
            raise UserError(f"{path}: {found}; copy it again, or delete the folder and tokenise again")
        if name == "tokens.bin":
            continue  # it may be large; each sequence is compared with its digest when it is read
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise UserError(
                    f"{path}: not what was written (its sha256 differs from {MANIFEST}'s); copy it again, or delete "
                    "the folder and tokenise again"
                )
    digests = np.memmap(folder / "digests.bin", dtype=np.uint8, mode="r").reshape(-1, DIGEST_BYTES)
    with (folder / "ids.jsonl").open(encoding="utf-8") as lines:
        ids = [json.loads(line) for line in lines]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core")  # it misses a rank, where none is needed
        tokens = indexed_dataset().IndexedDataset(str(folder / "tokens"))
    return _Store(folder, manifest, tokens, digests, ids)
