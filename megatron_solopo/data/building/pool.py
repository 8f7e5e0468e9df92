"""Distractors on disk: their texts are in one file, memory holds only the place and length of each.

A paragraph takes 28 bytes on disk that processes map and share, and 12 in the memory of each, however long it is;
its text is read when it is drawn. The files are read with ``pread`` and not mapped, so that what the system
caches of them is not counted as the process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_solopo.data.answers import Keep, normalise
from megatron_solopo.data.schema import Paragraph
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.progress import ProgressBar

CountTexts = Callable[[list[str]], list[int]]
"""Token counts of a list of texts."""

_TEXTS, _INDEX, _BY_LENGTH = "paragraphs.jsonl", "paragraphs.npy", "by_length.npy"
_ROW = np.dtype([("digest", "<u8"), ("offset", "<i8"), ("size", "<i4"), ("tokens", "<i4")])
_BATCH = 2000


@dataclass(frozen=True)
class Candidate:
    """A paragraph with what the checks compare, and its length as a document in tokens."""

    paragraph: Paragraph
    tokens: int

    @cached_property
    def title_key(self) -> str:
        """The normalised title; titles of punctuation or articles alone ("!!!", "The The") keep their spelling.

        Documents without a title differ by their texts.
        """
        title = self.paragraph.title
        return normalise(title) or title.strip().lower() or f"\n{normalise(self.paragraph.text)}"  # no title has a \n

    @cached_property
    def text_key(self) -> str:
        """Title and text, normalised."""
        return normalise(f"{self.paragraph.title} {self.paragraph.text}")

    def key(self, keep: Keep) -> str:
        """Title and text, normalised so that a gold answer of that ``keep`` can be searched for."""
        if keep == "words":
            return self.text_key
        return normalise(f"{self.paragraph.title} {self.paragraph.text}", keep=keep)


class PoolWriter:
    """Collects paragraphs in a binary file that can be written and read; gold flags are dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0
        self._digests, self._sizes = array("Q"), array("i")

    def add(self, paragraph: Paragraph) -> None:
        line = json.dumps([paragraph.title, paragraph.text], ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._digests.append(_digest(paragraph))
        self._sizes.append(len(line))

    def index(self, prompt_format: PromptFormat, count: CountTexts | None) -> np.ndarray:
        """One row a distinct paragraph, in the order of digests, which the input's order does not change."""
        self._file.flush()
        digests = np.frombuffer(self._digests, np.uint64) if self._digests else np.empty(0, np.uint64)
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.empty(0, np.int32)
        offsets = np.cumsum(sizes, dtype=np.int64) - sizes
        # 64 bits: among ten million paragraphs two share a digest with a probability of 3 in a million.
        distinct, first = np.unique(digests, return_index=True)
        rows = np.zeros(len(distinct), _ROW)
        rows["digest"], rows["offset"], rows["size"] = distinct, offsets[first], sizes[first]
        if count:
            _count_tokens(self._file, rows, prompt_format, count)
        return rows


def _count_tokens(file: BinaryIO, rows: np.ndarray, prompt_format: PromptFormat, count: CountTexts) -> None:
    order = np.argsort(rows["offset"])  # as the file lies
    with ProgressBar(total=len(rows), desc="lengths", unit="paragraph", leave=False) as bar:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            texts = [_length_text(_read(file.fileno(), rows, row), prompt_format) for row in batch]
            rows["tokens"][batch] = count(texts)
            bar.update(len(batch))


class DistractorPool:
    """Paragraphs to fill contexts with, each kept once and in an order that the input's order does not change.

    Args:
        file: what a `PoolWriter` wrote.
        rows: its index.
        by_length: row numbers in the order of (tokens, digest).
        prompt_format: how a paragraph is written, for its length.
        count: for the lengths of paragraphs that are not in the pool; None for sizes in documents.
    """

    def __init__(
        self,
        file: BinaryIO,
        rows: np.ndarray,
        by_length: np.ndarray,
        prompt_format: PromptFormat,
        count: CountTexts | None = None,
    ) -> None:
        self._file = file
        self._rows = rows
        self._by_length = by_length
        self._lengths = rows["tokens"][by_length]
        self._digests = np.ascontiguousarray(rows["digest"])
        self._format = prompt_format
        self._count = count

    @classmethod
    def of(
        cls, paragraphs: Iterable[Paragraph], prompt_format: PromptFormat, count: CountTexts | None = None
    ) -> DistractorPool:
        """Returns a pool in a temporary file that is deleted with it."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the pool reads it as long as it lives
        writer = PoolWriter(file)
        for paragraph in paragraphs:
            writer.add(paragraph)
        rows = writer.index(prompt_format, count)
        return cls(file, rows, _order_by_length(rows), prompt_format, count)

    @classmethod
    def open(cls, folder: Path, prompt_format: PromptFormat, count: CountTexts | None = None) -> DistractorPool:
        """Returns the pool that `write_pool` left in a folder."""
        file = (folder / _TEXTS).open("rb")
        # As plain arrays: every access to a memmap makes another object.
        rows, by_length = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in (_INDEX, _BY_LENGTH))
        return cls(file, rows, by_length, prompt_format, count)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Candidate:
        return Candidate(_read(self._file.fileno(), self._rows, row), int(self._rows["tokens"][row]))

    def typical_lengths(self) -> tuple[int, int] | None:
        """Returns the tokens that 5 % and 75 % of the paragraphs stay below; None where there are none."""
        total = len(self._lengths)
        return (int(self._lengths[total // 20]), int(self._lengths[3 * total // 4])) if total else None

    def of_length(self, low: int, high: int) -> np.ndarray:
        """Returns the rows of the paragraphs of ``low`` to ``high`` tokens, the shortest first."""
        first = np.searchsorted(self._lengths, low, "left")
        return self._by_length[first : np.searchsorted(self._lengths, high, "right")]

    def candidates_for(self, paragraphs: Iterable[Paragraph]) -> list[Candidate]:
        """Returns the candidates of any paragraphs; those in the pool are not measured again."""
        candidates: dict[Paragraph, Candidate] = {}
        plain = [Paragraph(paragraph.title, paragraph.text) for paragraph in paragraphs]
        for paragraph in plain:
            row = int(np.searchsorted(self._digests, np.uint64(_digest(paragraph))))
            stored = self[row] if row < len(self) and self._digests[row] == _digest(paragraph) else None
            if stored and stored.paragraph == paragraph:
                candidates[paragraph] = stored
        new = [paragraph for paragraph in dict.fromkeys(plain) if paragraph not in candidates]
        lengths = self._count([_length_text(p, self._format) for p in new]) if self._count and new else [0] * len(new)
        candidates |= {paragraph: Candidate(paragraph, length) for paragraph, length in zip(new, lengths, strict=True)}
        return [candidates[paragraph] for paragraph in plain]


def open_writer(folder: Path) -> PoolWriter:
    """Returns a writer for `write_pool`."""
    return PoolWriter((folder / _TEXTS).open("w+b"))


def write_pool(folder: Path, writer: PoolWriter, prompt_format: PromptFormat, count: CountTexts | None) -> int:
    """Writes the index of a writer's paragraphs beside them; returns how many are distinct."""
    rows = writer.index(prompt_format, count)
    np.save(folder / _INDEX, rows)
    np.save(folder / _BY_LENGTH, _order_by_length(rows))
    return len(rows)


def _order_by_length(rows: np.ndarray) -> np.ndarray:
    return np.argsort(rows["tokens"], kind="stable").astype(np.int32)


def _length_text(paragraph: Paragraph, prompt_format: PromptFormat) -> str:
    # A two-digit number represents all; the separator belongs to the document because tokenizers merge it with
    # the last character.
    return prompt_format.document(paragraph, 10) + prompt_format.document_separator


def _digest(paragraph: Paragraph) -> int:
    text = f"{paragraph.title}\0{paragraph.text}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _read(descriptor: int, rows: np.ndarray, row: int) -> Paragraph:
    return Paragraph(*json.loads(os.pread(descriptor, int(rows["size"][row]), int(rows["offset"][row]))))
