"""LongBench's English question answering (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204), from their files.

Prompts, lengths of responses and scores are the benchmarks' (config/dataset2prompt.json, config/dataset2maxlen.json,
metrics.py; prompts/0shot.txt and pred.py of v2). A prompt beyond a length of --context-tokens is cut in the middle, as
there; the length is the prompt's alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field, TypeAdapter

from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.data.validation import Text, validated
from megatron_solopo.evaluation.items import Item
from megatron_solopo.evaluation.tasks._task import Setting, Task

_QUESTION = "\n\nQuestion: {input}\n\nAnswer:"
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_SEVERAL = (
    f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
)
PROMPTS = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_STORY}{_QUESTION}",
        128,
    ),
    "qasper": (
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}\n\nArticle: {{context}}"
        f"\n\n Answer the question based on the above article {_ARTICLE}{_QUESTION}",
        128,
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
    ),
    "hotpotqa": (_SEVERAL, 32),
    "2wikimqa": (_SEVERAL, 32),
    "musique": (_SEVERAL, 32),
}
"""Data set -> (prompt, tokens of a response at most)."""

PROMPT_V2 = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\nWhat is the "
    "correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n"
    '(D) {choice_D}\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
)


@dataclass(frozen=True)
class _Record:
    id: Annotated[str, Field(validation_alias="_id")]
    input: Text
    context: Text
    answers: list[str]


@dataclass(frozen=True)
class _RecordV2:
    id: Annotated[str, Field(validation_alias="_id")]
    context: Text
    question: Text
    choice_A: str  # noqa: N815  # the benchmark's names
    choice_B: str  # noqa: N815
    choice_C: str  # noqa: N815
    choice_D: str  # noqa: N815
    answer: Text


_RECORD, _RECORD_V2 = TypeAdapter(_Record), TypeAdapter(_RecordV2)


def cut_in_the_middle(setting: Setting, content: str, most: int) -> tuple[str, list[int]]:
    """Returns a message and its prompt; where that is beyond ``most`` tokens, the middle is left out.

    Raises:
        CannotBuild: the chat template alone is as long.
    """
    ids = setting.ids(content)
    tokens = encode(setting.tokenizer, content) if len(ids) > most else []
    kept = len(tokens) - (len(ids) - most)
    while len(ids) > most:
        half = kept // 2
        if half < 1:
            raise CannotBuild(f"no text fits into {most} tokens")
        start, end = tokens[:half], tokens[-half:]
        content = "".join(str(setting.tokenizer.decode(part, skip_special_tokens=True)) for part in (start, end))
        ids = setting.ids(content)
        kept -= max(2, len(ids) - most)
    return content, ids


def _asked(setting: Setting, entries: list[tuple[str, str, list[str], str]], counts: Counter[str]) -> list[Item]:
    """Returns the items of (id, question, answers, message) entries."""
    items = []
    for name, question, answers, content in entries[: setting.limit]:
        try:
            asked = [cut_in_the_middle(setting, content, size) for size in setting.sizes]
        except CannotBuild as reason:
            counts[str(reason)] += 1
            continue
        chats = [setting.chat(content) for content, _ in asked]
        items.append(Item(name, question, answers, [ids for _, ids in asked], chats=chats))
    return items


def _fill(template: str, **values: str) -> str:
    """Replaces placeholders in one pass, so that braces of a context stay."""
    parts = re.split(r"\{(\w+)\}", template)
    return "".join(values[part] if number % 2 else part for number, part in enumerate(parts))


def _v1(template: str, setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    entries = []
    for where, record in read_records([file]):
        read = validated(_RECORD, record, where)
        entries.append((read.id, read.input, read.answers, _fill(template, context=read.context, input=read.input)))
    return _asked(setting, entries, counts)


def _v2(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    entries = []
    for where, record in read_records([file]):
        read = validated(_RECORD_V2, record, where)
        texts = {name: value.strip() for name, value in vars(read).items() if name != "id"}
        entries.append((read.id, read.question, [read.answer], _fill(PROMPT_V2, **texts)))
    return _asked(setting, entries, counts)


FILE = "LongBench's {name}.jsonl"
TASKS = [
    *(
        Task(
            f"longbench_{name}",
            ("longbench_f1", "sub_em_plain"),
            new_tokens,
            partial(_v1, template),
            file=FILE.format(name=name),
        )
        for name, (template, new_tokens) in PROMPTS.items()
    ),
    Task("longbench_v2", ("longbench_v2",), 128, _v2, file="LongBench v2's data.json"),
]
