"""NIAH-Plus (LongAgent, arXiv 2402.11550): question answering whose evidence lies at a chosen depth of a long context.

Single: SQuAD's paragraph in one long document of other paragraphs. Multi: HotpotQA's two paragraphs, together, among
other documents. No filler contains an answer (`selection.Distractors`). The original's filler and prompts are not
published with its paper: filler is of the same file here, and prompts are this package's, without a chain of thought.
"""

from __future__ import annotations

from collections import Counter

from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.evaluation.items import Item, items_of
from megatron_solopo.evaluation.tasks._documents import HOTPOTQA, SQUAD, read_hotpotqa, read_squad
from megatron_solopo.evaluation.tasks._task import Setting, Task

_ASK = "Answer the question in as few words as possible.\n\nQuestion: {question}"
SINGLE = f"Read the document.\n\n{{documents}}\n\n{_ASK}"
MULTI = f"Read the documents. Most of them have nothing to do with the question.\n\n{{documents}}\n\n{_ASK}"


def _items(
    questions: list[Question], paragraphs: list[Paragraph], prompt: PromptFormat, setting: Setting, counts: Counter[str]
) -> list[Item]:
    tokenizer, sizes, seed, depths = setting.tokenizer, setting.sizes, setting.seed, setting.depths
    return items_of(
        questions, paragraphs, sizes, "tokens", tokenizer, prompt, seed, depths, counts, setting.max_new_tokens
    )


def _single(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    questions = read_squad(file)
    paragraphs = [paragraph for question in questions for paragraph in question.paragraphs]
    prompt = PromptFormat("{text}", "\n\n", SINGLE, setting.system_prompt)
    return _items(questions[: setting.limit], paragraphs, prompt, setting, counts)


def _multi(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    assert file is not None
    questions = read_hotpotqa(file, counts)
    paragraphs = [paragraph for question in questions for paragraph in question.paragraphs]
    prompt = PromptFormat(prompt_template=MULTI, system_prompt=setting.system_prompt)
    return _items(questions[: setting.limit], paragraphs, prompt, setting, counts)


METRICS = ("sub_em_plain", *(name for name in SCORERS if name != "sub_em_plain"))
TASKS = [
    Task("niah_plus_single", METRICS, 64, _single, file=SQUAD, by_depth=True),
    Task("niah_plus_multi", METRICS, 64, _multi, file=HOTPOTQA, by_depth=True),
]
