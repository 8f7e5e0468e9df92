"""Token stores: folders of token ids that training opens by mmap, and `datasets.load_from_disk` reads.

    data-00000-of-00001.arrow       the ids, one row an example (token_table.py)
    dataset_info.json, state.json   what `datasets` needs beside it
    manifest.json                   source and settings of the store, counts, and what was dropped or cut

`tokenize-data` writes one to --output; training makes one of a data file at first use, in a cache
(make_store.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from megatron_solopo import template_kwargs
from megatron_solopo.data.files.inputs import holds_data
from megatron_solopo.data.text.text_facts import TEXT_FACTS, text_differences
from megatron_solopo.data.tokenized.encoder import NO_LONG_CONTEXT
from megatron_solopo.data.tokenized.stretch import Stretch, stretched_scores
from megatron_solopo.data.tokenized.token_table import BOUNDARIES, COLUMNS, TokenTable
from megatron_solopo.data.tokenized.tokens import CONVERSATION, Dropped, Report, TokenDataset, TokenGroup, no_example
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored, Side, names_of_scored

FORMAT = 5
"""Raised when the meaning of a file changes."""

MANIFEST = "manifest.json"
DATA = "data-00000-of-00001.arrow"

_STATE = {
    **{"_data_files": [{"filename": DATA}], "_fingerprint": "", "_format_columns": None, "_format_kwargs": {}},
    **{"_format_type": None, "_output_all_columns": False, "_split": None},
}
DATASETS_FILES = {"dataset_info.json": {"description": "token ids, see manifest.json"}, "state.json": _STATE}
"""The files that `datasets` reads beside the data, and what is in them."""

PAIR = (Side.CHOSEN, Side.REJECTED)
SHORT_PAIR: Scored = frozenset((Context.SHORT, side) for side in PAIR)
BOTH_PAIRS: Scored = frozenset((context, side) for context in Context for side in PAIR)


@dataclass(frozen=True, eq=False)
class _StoredGroups(Sequence[TokenGroup]):
    """Groups of a store with the scored ones of their segments, each built when it is read."""

    table: TokenTable
    rows: np.ndarray
    scored: Scored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenGroup:
        return self.table.group(int(self.rows[index]), self.scored)


@dataclass(frozen=True, eq=False)
class StoredTokens(TokenDataset):
    """The examples of a store.

    Attributes:
        largest_token: (the largest token id of the store, an example that has it).
    """

    largest_token: tuple[int, str] = (-1, "")

    @classmethod
    def of(cls, groups: _StoredGroups, report: Report, largest_token: tuple[int, str]) -> StoredTokens:
        fingerprint = groups.table.fingerprint(groups.rows, groups.scored)
        return cls(groups, report.dropped, fingerprint, report, largest_token=largest_token)

    def segment_counts(self) -> Tensor:
        groups: _StoredGroups = self.groups
        counts = torch.zeros(len(groups), len(Context), len(Side), dtype=torch.int64)
        for context, side in groups.scored:
            each = groups.table.of_responses(context, side, groups.table.counts)[groups.rows]
            counts[:, context, side] = torch.from_numpy(each)
        return counts

    def chosen_rejected_lengths(self) -> list[tuple[int, int]]:
        groups: _StoredGroups = self.groups
        context = next((context for context in Context if {(context, side) for side in PAIR} <= groups.scored), None)
        if context is None:
            return []
        if self.segment_counts().max() > 1 or groups.table.masked(groups.rows):
            return super().chosen_rejected_lengths()
        pair = (groups.table.of_responses(context, side, groups.table.lengths)[groups.rows] for side in PAIR)
        return list(zip(*(lengths.tolist() for lengths in pair), strict=True))

    def only(self, scored: Scored) -> StoredTokens:
        """Returns the same examples with these segments only; a prompt without any of them goes too.

        Policy and reference can score different segments of one data set, and then number its examples alike.
        """
        kept = self.groups.scored & scored
        if kept == self.groups.scored:
            return self
        stored = self.of(replace(self.groups, scored=kept), self.report, self.largest_token)
        return stored if self.stretch is None else stored._with(self.stretch)

    def stretched(self, stretch: Stretch, where: str | Path) -> StoredTokens:
        """Returns the same examples with stretched positions.

        Args:
            where: the data, for messages.

        Raises:
            UserError: an example is longer than all its positions may span, or none has a place to jump at.
        """
        groups: _StoredGroups = self.groups
        table, rows = groups.table, groups.rows
        longest = _longest(table, stretched_scores(groups.scored), where)[rows]
        if longest.max() > stretch.length:
            row = int(longest.argmax())
            raise UserError(
                "stretch-too-short",
                f"{where}: example {table.id(int(rows[row]))!r} has {longest[row]} tokens, above --stretch-positions "
                f"{stretch.length}, which prompt and response are stretched to; raise it, or leave longer examples out "
                f"with --seq-length {stretch.length} --overlong drop",
            )
        without = rows[table.counts[BOUNDARIES[table.objective]][rows] == 0]
        if len(without) == len(rows):
            raise UserError(
                "stretch-without-boundaries",
                f"{where}: no example has a document or paragraph at which --stretch-positions could jump; record the "
                "documents in long_spans (build-pairs does), separate paragraphs by blank lines, or leave it out",
            )
        report = replace(self.report, without_boundary=[table.id(int(row)) for row in without])
        return replace(self, report=report)._with(stretch)

    def _with(self, stretch: Stretch) -> StoredTokens:
        """Returns the same examples with stretched positions, where these segments have any."""
        groups: _StoredGroups = self.groups
        if not stretched_scores(groups.scored):
            return self
        boundaries = groups.table.digests[BOUNDARIES[groups.table.objective]][groups.rows]
        fingerprint = hashlib.sha256(self.fingerprint.encode() + boundaries.tobytes()).hexdigest()
        return replace(self, stretch=stretch, fingerprint=fingerprint)


def is_store(path: str | Path) -> bool:
    """Whether a path names a store, or a folder that holds no data that could be read otherwise."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    tokens = any((folder / name).exists() for name in (MANIFEST, "tokens.bin"))  # the latter of earlier versions
    unfinished = folder.suffix in (".partial", ".work")
    return tokens or unfinished or not holds_data(folder)


def open_tokens(
    folder: str | Path,
    facts: Mapping[str, Any],
    scored: Scored,
    seq_length: int,
    overlong: str = "refuse",
    source: str | Path | None = None,
) -> StoredTokens:
    """Returns the examples of a store; nothing but lengths, digests and names is read.

    Args:
        facts: `text_facts` of the run.
        scored: what the method scores.
        seq_length: the longest prompt plus completion of these segments, in tokens.
        overlong: what is longer: ``refuse`` or ``drop``; ``cut`` needs the texts, and is refused where it is needed.
        source: the data file of a store in a cache, for messages.

    Raises:
        UserError: the store is not complete, damaged, written for another objective or with another tokenizer or
            template, lacks a context, or holds an example beyond seq_length.
    """
    manifest, where = read_manifest(Path(folder)), source or folder
    objective = "sft" if scored == CONVERSATION else "preference"
    if manifest["objective"] != objective:
        raise UserError(
            "token-store-mismatch",
            f"{where}: holds data of --objective {manifest['objective']}, the run has {objective}",
        )
    if differing := text_differences(manifest["text"], facts):
        raise UserError(
            "token-store-mismatch",
            f"{where}: written with {'; '.join(differing)}; train with the same, or tokenize again "
            "(solopo tokenize-data)",
        )
    if only := manifest["options"]["scored"]:
        if names_of_scored(scored) != only:
            raise UserError(
                "token-store-mismatch",
                f"{where}: holds {only} alone, the run scores {names_of_scored(scored)}; tokenize again",
            )
    table, report = _open(Path(folder), manifest), Report.of(manifest["report"])
    longest = _longest(table, scored, where)
    too_long = longest > seq_length
    if too_long.any() and overlong != "drop":
        row = int(too_long.argmax())
        raise UserError(
            "example-too-long",
            f"{where}: example {table.id(row)!r} has {longest[row]} tokens, above --seq-length {seq_length}; raise it, "
            + _ways(objective, seq_length, overlong, source is not None),
        )
    left_out = [Dropped(table.id(row), int(longest[row])) for row in np.flatnonzero(too_long)]
    names = {one.id for one in left_out}
    report.dropped += left_out
    report.spelled, report.open = ([n for n in those if n not in names] for those in (report.spelled, report.open))
    rows = np.flatnonzero(~too_long)
    if not len(rows):
        raise UserError("data-empty", no_example(where, len(report.dropped), seq_length))
    largest = manifest["largest_token"]
    return StoredTokens.of(_StoredGroups(table, rows, scored), report, (largest["id"], largest["example"]))


def _longest(table: TokenTable, scored: Scored, where: str | Path) -> np.ndarray:
    """Returns [rows] tokens of the longest prompt with one response of these segments."""
    longest = np.zeros(len(table), dtype=np.int64)
    for context, side in sorted(scored):
        prompt = table.of_prompts(context, table.lengths)
        if not prompt.all():
            raise UserError(
                "long-context-missing", f"{where}: group {table.id(int(prompt.argmin()))!r}: {NO_LONG_CONTEXT}"
            )
        longest = np.maximum(longest, prompt + table.of_responses(context, side, table.lengths))
    return longest


def _ways(objective: str, seq_length: int, overlong: str, has_texts: bool) -> str:
    """Returns what else than a larger --seq-length helps."""
    if overlong == "cut":
        return f"or cut when the texts are tokenized: tokenize-data --seq-length {seq_length} --overlong cut"
    if has_texts and objective == "preference":
        return "drop such examples with --overlong drop, or shorten their distractors with --overlong cut"
    return "or drop such examples with --overlong drop"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a store.

    Raises:
        UserError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            "not-a-token-store",
            f"{folder}: a folder without {MANIFEST}; set a JSONL or Parquet file, or a folder that "
            "solopo tokenize-data completed",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        complete = version != FORMAT or (
            manifest["objective"] in COLUMNS
            and set(TEXT_FACTS) == manifest["text"].keys() - {template_kwargs.DATE}
            and {"scored"} <= manifest["options"].keys()
            and {"examples", "tokens"} <= manifest["counts"].keys()
            and {"id", "example"} <= manifest["largest_token"].keys()
            and {"bytes", "index_sha256"} <= manifest["data"].keys()
            and bool(Report.of(manifest["report"]))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError("file-damaged", f"{path}: not a manifest of solopo tokenize-data, or damaged; tokenize again")
    if version != FORMAT:
        raise UserError(
            "token-store-format", f"{path}: of format {version}, this version reads {FORMAT}; tokenize again"
        )
    return manifest


def _open(folder: Path, manifest: Mapping[str, Any]) -> TokenTable:
    path, written = folder / DATA, manifest["data"]
    size = path.stat().st_size if path.is_file() else None
    if size != written["bytes"]:
        problem = "is missing" if size is None else f"has {size:,} bytes, {written['bytes']:,} were written"
        raise UserError("file-damaged", f"{path}: {problem}; copy it again, or delete the folder and tokenize again")
    try:
        table = TokenTable(path, manifest["objective"])
        same = table.index_sha256() == written["index_sha256"]
    except (pa.ArrowException, OSError, LookupError, ValueError, AttributeError, TypeError):  # what its bytes raise
        same = False
    if not same:
        raise UserError(
            "file-damaged",
            f"{path}: not what was written (its index differs from {MANIFEST}'s); copy it again, or delete the folder "
            "and tokenize again",
        )
    return table
