"""The second pass: contexts of many questions, in one process or several, in the same order and bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import golds
from megatron_solopo.data.building.contexts import ContextPair, build_contexts
from megatron_solopo.data.building.evidence import LogProbFinder, Rank, mark, rank_by_bm25
from megatron_solopo.data.building.first_pass import QuestionFile
from megatron_solopo.data.building.pool import DistractorPool
from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.building.sources import CannotUse
from megatron_solopo.data.hf_model import load_model
from megatron_solopo.data.options import TokenizerOptions
from megatron_solopo.data.schema import Question
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.data.workers import Work, map_in_order

TRAIN, VALIDATION, LEFT_OUT = "contexts.jsonl", "validation.jsonl", "left_out.jsonl"
"""The files of a work folder that hold the questions' contexts, and the questions that are not used."""

_BATCH = 16
RECALL_AT = (2, 3, 4, 5)


@dataclass(frozen=True)
class BuildSettings:
    """What decides the contexts of a question, and where its tokenizer is."""

    tokenizer: TokenizerOptions
    prompt_format: PromptFormat
    sizes: tuple[int, int]
    in_tokens: bool
    source: str
    seed: int = 0
    gold_depth: float | None = None
    drop_gold_fraction: float = 0.0
    evidence: str = "labels"
    evidence_documents: int = 0
    evidence_model: str | None = None
    device: str = "auto"


@dataclass
class Spread:
    """Count, sum, least and greatest of numbers that need not be kept."""

    count: int = 0
    total: float = 0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, value: float) -> None:
        self.merge(Spread(1, value, value, value))

    def merge(self, other: Spread) -> None:
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def text(self, digits: int = 0, mean_digits: int = 1) -> str:
        mean = self.total / self.count
        return f"mean {mean:.{mean_digits}f} (min {self.low:.{digits}f}, max {self.high:.{digits}f})"


@dataclass
class Summary:
    """Counts and lengths of the questions, in tokens, chat template included. Parts merge in any order."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    spreads: dict[str, Spread] = field(default_factory=dict)

    def add(self, pair: ContextPair, validation: bool) -> None:
        self.counts["kept"] += 1
        self.counts["validation"] += validation
        self.counts["gold"] += len(pair.long_gold)
        self.counts["dropped_gold"] += pair.dropped_gold
        self.counts["without_some_gold"] += pair.dropped_gold > 0
        self.counts["yes_or_no"] += any(gold.yes_or_no for gold in golds(pair.answers[:1]))
        for name in ("short_tokens", "long_tokens", "short_documents", "long_documents"):
            self.spread(name, getattr(pair, name))
        self.spread("rho", pair.short_tokens / pair.long_tokens)

    def spread(self, name: str, value: float) -> None:
        self.spreads.setdefault(name, Spread()).add(value)

    def add_recall(self, ranking: list[int], gold: set[int]) -> None:
        """How much of the marked evidence the first documents of a ranking hold."""
        for first in RECALL_AT:
            hits = len(gold.intersection(ranking[:first]))
            self.spread(f"recall@{first}", hits / len(gold))
            self.spread(f"all@{first}", hits == len(gold))

    def merge(self, other: Summary) -> None:
        self.counts += other.counts
        self.left_out += other.left_out
        for name, spread in other.spreads.items():
            self.spreads.setdefault(name, Spread()).merge(spread)

    def lines(self) -> list[str]:
        """Returns the summary for a person."""
        counts, spreads = self.counts, self.spreads
        lines = [f"questions kept: {counts['kept']}, left out: {self.left_out.total()}"]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out.most_common()]
        if counts["validation"]:
            training = counts["kept"] - counts["validation"]
            lines.append(f"  {training} for training, {counts['validation']} for validation")
        if counts["yes_or_no"]:
            lines.append(f"  answer is yes or no, which distractors cannot be checked for: {counts['yes_or_no']}")
        if counts["kept"]:
            for name in ("short", "long"):
                tokens, documents = spreads[f"{name}_tokens"], spreads[f"{name}_documents"]
                lines.append(f"{name} contexts: {tokens.text()} tokens, {documents.text()} documents")
            lines.append(f"compression ratio rho = short / long: {spreads['rho'].text(3, 3)}")
        if counts["dropped_gold"]:
            lines.append(
                f"imperfect compression: {counts['dropped_gold']} of {counts['gold']} gold documents are missing from "
                f"the short contexts of {counts['without_some_gold']} questions"
            )
        if "recall@2" in spreads:
            cells = (
                f"@{first} {_mean(spreads[f'recall@{first}']):.3f} ({_mean(spreads[f'all@{first}']):.3f})"
                for first in RECALL_AT
            )
            lines.append(
                "evidence found, recall against the labels (share of questions with all of it), "
                f"{spreads['recall@2'].count} questions: {', '.join(cells)}"
            )
        return lines


SUMMARY = TypeAdapter(Summary)
"""To and from JSON."""


def _mean(spread: Spread) -> float:
    return spread.total / spread.count


@dataclass
class Batch:
    """Finished lines by file name, and their part of the summary."""

    stop: int
    parts: dict[str, bytes]
    summary: Summary


class Builder:
    """Builds the contexts of the questions that `ingest` left in a folder."""

    def __init__(self, folder: Path, settings: BuildSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._counter = TokenCounter(tokenizer)
        self._questions = QuestionFile(folder)
        count = self._counter.texts if settings.in_tokens else None
        self._pool = DistractorPool.open(folder, settings.prompt_format, count)
        self._rank: Rank | None = rank_by_bm25 if settings.evidence == "bm25" else None
        if settings.evidence == "log-prob":
            model = load_model(str(settings.evidence_model), settings.device, "auto", "--evidence-model")
            self._rank = LogProbFinder(model, tokenizer, settings.prompt_format)

    def build(self, start: int, stop: int) -> Batch:
        """Returns the contexts of the questions from ``start`` up to ``stop``, as lines."""
        summary = Summary()
        lines: dict[str, list[bytes]] = {TRAIN: [], VALIDATION: [], LEFT_OUT: []}
        for question, validation in self._questions.read(start, stop):
            try:
                pair = self._pair(question, summary)
            except (CannotBuild, CannotUse) as reason:
                summary.left_out[str(reason)] += 1
                lines[LEFT_OUT].append(left_out_line(question.id, str(reason)))
            else:
                summary.add(pair, validation)
                record = {name: value for name, value in vars(pair).items() if value is not None}
                lines[VALIDATION if validation else TRAIN].append(_line(record))
        return Batch(stop, {name: b"".join(parts) for name, parts in lines.items()}, summary)

    def _pair(self, question: Question, summary: Summary) -> ContextPair:
        settings = self._settings
        if self._rank:
            ranking = self._rank(question)
            if gold := {index for index, paragraph in enumerate(question.paragraphs) if paragraph.is_supporting}:
                summary.add_recall(ranking, gold)
            question = mark(question, ranking, settings.evidence_documents)
        short, long = build_contexts(
            question,
            self._pool,
            settings.sizes,
            prompt_format=settings.prompt_format,
            seed=settings.seed,
            count_tokens=self._counter.chat if settings.in_tokens else None,
            gold_depth=settings.gold_depth,
            drop_gold_fraction=settings.drop_gold_fraction,
        )
        return ContextPair(
            id=question.id,
            question=question.question,
            answers=list(dict.fromkeys(question.answers)),
            short_messages=short.messages,
            long_messages=long.messages,
            short_tokens=short.tokens or self._counter.chat(short.messages),
            long_tokens=long.tokens or self._counter.chat(long.messages),
            source=settings.source,
            short_documents=len(short.paragraphs),
            long_documents=len(long.paragraphs),
            short_gold=short.gold_positions,
            long_gold=long.gold_positions,
            short_spans=short.spans,
            long_spans=long.spans,
            dropped_gold=len(long.gold_positions) - len(short.gold_positions),
            chat_template_date=settings.tokenizer.chat_template_date,
        )


def left_out_line(question_id: str, reason: str) -> bytes:
    return _line({"id": question_id, "reason": reason})


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def build_all(
    folder: Path,
    settings: BuildSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: int,
    stop: int,
    workers: int,
) -> Iterator[Batch]:
    """Yields the batches from ``start`` up to ``stop`` in order, built here or by ``workers`` processes.

    Args:
        tokenizer: what the settings name, loaded.

    Raises:
        UserError: a worker was killed.
    """
    ranges = [(first, min(first + _BATCH, stop)) for first in range(start, stop, _BATCH)]
    yield from map_in_order(_build_with, (folder, settings, tokenizer), ranges, workers)


def _build_with(folder: Path, settings: BuildSettings, tokenizer: PreTrainedTokenizerBase) -> Work:
    return Builder(folder, settings, tokenizer).build
