"""Questions of an evaluation that the training data contains too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_solopo.data.answers import normalise
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.evaluation.items import Item
from megatron_solopo.progress import ProgressBar

IN_TRAINING_DATA = "its question is in --training-data"

_SHORTEST = 4
"""Words of a question from which on it is searched in prompts; a shorter one must be a training question itself."""


class TrainedQuestions:
    """Questions of training data, for a search of the same text in an evaluation.

    Texts are compared as `answers.normalise` writes them, so that case, punctuation, articles and spaces do not count.

    Args:
        files: question sets (``question``), contexts (``question``), preference groups and conversations, of which
            the users' messages are searched: ``short_messages``, ``prompt``, ``messages``, ``conversations``.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._questions: set[str] = set()
        prompts: list[str] = []
        for _, record in ProgressBar(read_records(files), desc="training data", unit="record", leave=False):
            question = record.get("question")
            if isinstance(question, str):
                self._questions.add(normalise(question))
                continue
            for name in ("short_messages", "prompt", "messages", "conversations"):
                texts = list(_texts(record.get(name)))
                self._questions.update(normalise(text) for text in texts)
                prompts += texts
        # One long text is searched much faster than thousands; no question spans two prompts of it.
        self._prompts = "\n".join(f" {normalise(text)} " for text in dict.fromkeys(prompts))

    def contain(self, question: str) -> bool:
        """Whether a question is one of the training data, or part of a prompt there."""
        text = normalise(question)
        return text in self._questions or (len(text.split()) >= _SHORTEST and f" {text} " in self._prompts)

    def without(self, items: Sequence[Item], counts: Counter[str]) -> list[Item]:
        """Returns the items of other questions; questions of the training data are added to ``counts``."""
        trained = {item.id for item in items if self.contain(item.question)}
        if trained:
            counts[IN_TRAINING_DATA] += len(trained)
        return [item for item in items if item.id not in trained]


def _texts(value: object) -> Iterable[str]:
    """Yields the texts of a prompt, of which assistants' messages are no questions."""
    if isinstance(value, str):
        yield value
    for message in value if isinstance(value, list) else ():
        if isinstance(message, dict) and message.get("role", message.get("from")) in ("user", "human"):
            content = message.get("content", message.get("value"))
            if isinstance(content, str):
                yield content
