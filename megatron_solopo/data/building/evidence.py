"""Finding the evidence of a question among its documents where nobody marked it.

A finder ranks the documents, the likeliest evidence first; `mark` makes the first of them the gold paragraphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from megatron_solopo.data.answers import UNSPACED, mentions, normalise, stated_golds
from megatron_solopo.data.building.sources import CannotUse
from megatron_solopo.data.hf_model import check_rows, reach
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.text.chat import prompt_ids, response_ids
from megatron_solopo.data.text.prompt import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINDERS = ("labels", "bm25", "log-prob")
"""Values of ``--evidence``; ``labels`` are those of the data."""

Rank = Callable[[Question], list[int]]
"""Indices of a question's paragraphs, the likeliest evidence first."""

# The words of the best document count this much beside those of question and answer: the next hop of a question
# often shares words with the first hop alone. 0.1 to 0.3 were tried on MuSiQue, HotpotQA and 2WikiMultihopQA.
_EXPANSION = 0.3

# bm25s's words of two characters and more, and the single characters of scripts that do not part words.
_TOKENS = rf"[{UNSPACED}]|[^\W{UNSPACED}]{{2,}}"


def rank_by_bm25(question: Question) -> list[int]:
    """Ranks the paragraphs by BM25 of question and answers; words of the best paragraph count a little too."""
    import bm25s  # not at the top: every worker would import it, and --evidence labels does not use it

    texts = [f"{paragraph.title}. {paragraph.text}" for paragraph in question.paragraphs]
    asked = " ".join([question.question, *question.answers])
    tokenized = bm25s.tokenize([asked, *texts], token_pattern=_TOKENS, return_ids=False, show_progress=False)
    query, *documents = cast(list[list[str]], tokenized)  # words, without `return_ids`
    if not any(documents):
        return list(range(len(texts)))
    index = bm25s.BM25()
    index.index(documents, show_progress=False)

    def scores(words: list[str]) -> np.ndarray:
        return index.get_scores(words) if words else np.zeros(len(texts), np.float32)

    scored = scores(query)
    best = int(scored.argmax())
    asked_words = set(query)
    scored = scored + _EXPANSION * scores([word for word in dict.fromkeys(documents[best]) if word not in asked_words])
    return [best, *(int(row) for row in np.argsort(-scored, kind="stable") if row != best)]


class LogProbFinder:
    """Ranks a document by how much the answer's log-prob falls when the document is taken out of the context.

    Each context is one forward pass, without padding, so that a score does not depend on the others.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> None:
        self._model, self._tokenizer, self._format = model, tokenizer, prompt_format
        self._positions = reach(str(model.name_or_path))

    def __call__(self, question: Question) -> list[int]:
        drops = self.drops(question)
        return sorted(range(len(drops)), key=lambda index: (-drops[index], index))

    def drops(self, question: Question) -> list[float]:
        """For each paragraph log p(answer | all) - log p(answer | all but it), in nats.

        Raises:
            CannotUse: the context of all paragraphs is longer than the model's positions.
        """
        paragraphs = list(question.paragraphs)
        complete = self._log_prob(question, paragraphs)
        return [
            complete - self._log_prob(question, paragraphs[:index] + paragraphs[index + 1 :])
            for index in range(len(paragraphs))
        ]

    def _log_prob(self, question: Question, paragraphs: Sequence[Paragraph]) -> float:
        messages = self._format.messages(question.question, paragraphs)
        prompt = prompt_ids(self._tokenizer, messages)
        response = response_ids(self._tokenizer, messages, question.answer)
        if self._positions is not None and len(prompt) + len(response) > self._positions:
            raise CannotUse(f"all its documents go beyond the {self._positions:,} positions of --evidence-model")
        check_rows(self._model, prompt + response, f"question {question.id!r}, --evidence log-prob")
        with torch.inference_mode():
            ids = torch.tensor([prompt + response], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1]
            scores = logits.float().log_softmax(-1)
            return scores.gather(1, ids[0, -len(response) :, None]).sum().item()


def mark(question: Question, ranking: Sequence[int], documents: int) -> Question:
    """Marks the first ``documents`` of the ranking as the question's only gold paragraphs.

    Where none of them contains an answer, the best one that does replaces the last one.

    Raises:
        CannotUse: no document contains an answer, and the answer is not yes or no.
    """
    answers = stated_golds(question.answers)

    def has_answer(index: int) -> bool:
        paragraph = question.paragraphs[index]
        text = f"{paragraph.title} {paragraph.text}"
        return any(mentions(normalise(text, keep=gold.keep), gold) for gold in answers)

    gold = list(ranking[:documents])
    if answers and not any(map(has_answer, gold)):
        holder = next((index for index in ranking[documents:] if has_answer(index)), None)
        if holder is None:
            raise CannotUse("no document contains the answer, so its evidence cannot be found")
        gold[-1] = holder
    paragraphs = tuple(
        dataclasses.replace(paragraph, is_supporting=index in gold)
        for index, paragraph in enumerate(question.paragraphs)
    )
    return dataclasses.replace(question, paragraphs=paragraphs)
