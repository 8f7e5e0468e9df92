"""Invented groups with known evidence, their tokenizer, and what inspect-data makes of them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.building.contexts import PromptFormat
from megatron_solopo.data.inspection.examples import read_examples
from megatron_solopo.data.inspection.view import View, make_view
from megatron_solopo.data.schema import Paragraph

TEMPLATE = Path(__file__).resolve().parents[1] / "examples" / "chat_templates" / "chatml.jinja"
WORDS = "the river town was founded near a bridge by settlers who sold wool and salt in spring fairs every year".split()
FORMAT = PromptFormat()


def tokenizer_folder(where: Path) -> Path:
    """A byte-level BPE tokenizer with ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [FORMAT.prompt_template, FORMAT.document_template, " ".join(WORDS)]
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special).save_pretrained(where)
    shutil.copy(TEMPLATE, where / "chat_template.jinja")
    return where


def groups(count: int, seed: int = 0, sizes: tuple[int, int] = (4, 24)) -> list[dict[str, Any]]:
    """Groups of invented questions: two documents are evidence, the contexts differ in the others."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(12, 40)))

    records = []
    for i in range(count):
        record: dict[str, Any] = {"id": f"q{i}", "question": f"where is thing {i}", "answers": [f"Harbour{i}x"]}
        gold = [Paragraph(f"Thing {i}", f"{text()} Harbour{i}x {text()}", True), Paragraph(f"Place {i}", text(), True)]
        for name, size in zip(("short", "long"), sizes, strict=True):
            paragraphs = [Paragraph(f"Other {i} {j}", text()) for j in range(size - 2)]
            for paragraph, place in zip(gold, sorted(draw.sample(range(size), 2)), strict=True):
                paragraphs.insert(place, paragraph)
            messages = FORMAT.messages(record["question"], paragraphs)
            content, spans, at = messages[-1]["content"], [], 0
            for number, paragraph in enumerate(paragraphs, 1):
                document = FORMAT.document(paragraph, number)
                at = content.index(document, at)
                spans.append([at, at + len(document), paragraph.is_supporting])
                at += len(document)
            record |= {f"{name}_messages": messages, f"{name}_spans": spans}
        record |= {
            "chosen": f"It stands near the bridge.\nAnswer: Harbour{i}x",
            "rejected": f"No document says it, q{i}.",
            "scores": {"chosen": 1.0, "rejected": 0.0, "share_right": draw.randint(1, 31) / 32},
            "source": "test",
        }
        records.append(record)
    return records


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def view_of(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, full: bool = False, **method: Any
) -> View:
    example = next(read_examples(write(tmp_path / "one.jsonl", [record])))
    return make_view(example, tokenizer, MethodConfig(**method), full=full)
