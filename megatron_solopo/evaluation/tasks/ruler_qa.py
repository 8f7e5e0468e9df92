"""RULER's question answering (arXiv 2404.06654): SQuAD and HotpotQA among other documents of the file.

Template and documents are those of scripts/data/synthetic/qa.py: the question's documents, then those of the same
article (SQuAD), then others of the file, shuffled. As there, other documents may happen to answer too. A length is of
prompt and response together.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.evaluation.items import Item
from megatron_solopo.evaluation.tasks._documents import HOTPOTQA, SQUAD, read_hotpotqa, read_squad
from megatron_solopo.evaluation.tasks._task import Setting, Task

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
QUESTION = f"{_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{_ASK}\n\nQuestion: {{query}}"
ANSWER = " Answer:"


def _text(paragraph: Paragraph) -> str:
    return f"{paragraph.title}\n{paragraph.text}" if paragraph.title else paragraph.text


def _items(questions: list[Question], whole: bool, setting: Setting, counts: Counter[str]) -> list[Item]:
    """Returns the items of questions.

    Args:
        whole: all paragraphs of a question are its documents (HotpotQA's ten), and not the supporting one alone.
    """
    documents = sorted({_text(paragraph) for question in questions for paragraph in question.paragraphs})
    items = []
    for question in questions[: setting.limit]:
        try:
            prompts = _prompts(question, whole, documents, setting)
        except CannotBuild as reason:
            counts[str(reason)] += 1
            continue
        items.append(Item(question.id, question.question, list(question.answers), prompts))
    return items


def _prompts(question: Question, whole: bool, documents: Sequence[str], setting: Setting) -> list[list[int]]:
    rng = random.Random(f"{setting.seed}\0{question.id}")
    first = [_text(paragraph) for paragraph in question.paragraphs if whole or paragraph.is_supporting]
    near = [text for paragraph in question.paragraphs if (text := _text(paragraph)) not in first]
    rng.shuffle(near)
    known = {*first, *near}
    far = [text for text in documents if text not in known]
    rng.shuffle(far)
    ordered = [*first, *near, *far]

    def build(count: int) -> tuple[str, str]:
        chosen = ordered[:count]
        random.Random(f"{setting.seed}\0{question.id}\0order").shuffle(chosen)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
        return QUESTION.format(context=context, query=question.question), ANSWER

    return setting.prompts(build, len(first), len(ordered))


def _squad(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    return _items(read_squad(file), False, setting, counts)


def _hotpotqa(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    return _items(read_hotpotqa(file, counts), True, setting, counts)


METRICS = ("ruler_part", "sub_em_plain", "em", "f1")
TASKS = [
    Task("ruler_qa_squad", METRICS, 32, _squad, file=SQUAD),
    Task("ruler_qa_hotpotqa", METRICS, 32, _hotpotqa, file=HOTPOTQA),
]
