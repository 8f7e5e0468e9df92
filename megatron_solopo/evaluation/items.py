"""What is asked: questions with their prompts at every context length, made of documents and distractors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.building.contexts import build_contexts
from megatron_solopo.data.building.pool import DistractorPool
from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.building.sources import DEFAULT, LeftOut, read_pool, read_questions
from megatron_solopo.data.schema import Message, Paragraph, Question
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar


@dataclass(frozen=True)
class Item:
    """One question at every length: ``prompts[i]`` are the token ids of its prompt at the i-th length.

    Attributes:
        depth: share of the distractors before the evidence, in [0, 1]; None: random places. A question has one item
            for each depth of --depths.
        choices: token ids of the answers to choose from; (): the model writes its answer.
        chats: the messages of each prompt; []: prompts that are more than a chat's, or none.
        gold: token ids of the first gold answer, whose log-prob after the prompt is wanted; []: it is not.
    """

    id: str
    question: str
    answers: list[str]
    prompts: list[list[int]]
    depth: float | None = None
    choices: tuple[list[int], ...] = ()
    chats: list[list[Message]] = field(default_factory=list)
    gold: list[int] = field(default_factory=list)


Depths = tuple[float | None, ...]
"""The depths that each question is asked at; (None,): once, with its evidence at random places."""


def build_items(
    data: Sequence[str | Path],
    sizes: Sequence[int],
    unit: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seed: int = 0,
    pool: Sequence[str | Path] = (),
    limit: int | None = None,
    source: str = DEFAULT,
    depths: Depths = (None,),
) -> tuple[list[Item], Counter[str]]:
    """Returns the questions that can be asked at every size, with their prompts; the others are counted by reason.

    The context of a larger size holds that of a smaller one, so lengths differ in distractors only.

    Args:
        sizes: ascending, in ``unit``: ``documents`` (gold ones included) or ``tokens`` (of the whole prompt).
        pool: further files of distractors; the paragraphs of all questions are always used.
        limit: the first so many questions (the distractors still come from all).
    """
    left_out = LeftOut()
    questions: list[Question] = []
    counted = None  # entries of `left_out` up to the last question of the limit
    reading = ProgressBar(read_questions(source, data, left_out), desc="reading", unit="question", leave=False)
    for question in reading:
        questions.append(question)
        if len(questions) == limit:
            counted = len(left_out.entries)
    counts = Counter(reason for _, reason in left_out.entries[:counted])
    paragraphs = [*(paragraph for question in questions for paragraph in question.paragraphs), *read_pool(pool)]
    return items_of(questions[:limit], paragraphs, sizes, unit, tokenizer, prompt_format, seed, depths, counts), counts


def items_of(
    questions: Iterable[Question],
    paragraphs: Iterable[Paragraph],
    sizes: Sequence[int],
    unit: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    seed: int,
    depths: Depths,
    counts: Counter[str],
    max_new_tokens: int = 0,
) -> list[Item]:
    """Returns the items of questions; those that cannot be asked at every size and depth are added to ``counts``.

    Args:
        paragraphs: the distractors.
        max_new_tokens: tokens of a size that are left for the response.

    Raises:
        UserError: no question is left.
    """
    counter, in_tokens = TokenCounter(tokenizer), unit == "tokens"
    distractors = DistractorPool.of(paragraphs, prompt_format, counter.texts if in_tokens else None)
    items = []
    for question in ProgressBar(list(questions), desc="contexts", unit="question", leave=False):
        try:
            of_question = [
                build_contexts(
                    question,
                    distractors,
                    [size - max_new_tokens for size in sizes],
                    prompt_format=prompt_format,
                    seed=seed,
                    count_tokens=counter.chat if in_tokens else None,
                    gold_depth=depth,
                )
                for depth in depths
            ]
        except CannotBuild as reason:
            counts[str(reason)] += 1
            continue
        for depth, contexts in zip(depths, of_question, strict=True):
            chats = [context.messages for context in contexts]
            prompts = [prompt_ids(tokenizer, chat) for chat in chats]
            items.append(Item(question.id, question.question, list(question.answers), prompts, depth, chats=chats))
    return items


def check_some(items: Sequence[Item], counts: Counter[str], where: str = "") -> None:
    """Raises `UserError` where no question is left; ``where`` is the start of the message."""
    if not items:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common()) or "the input is empty"
        raise UserError(
            "questions-unusable",
            f"{where}no question can be asked at every length ({reasons}); change the lengths, the data or --pool",
        )
