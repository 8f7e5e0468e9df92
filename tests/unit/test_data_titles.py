"""Documents without a title: each is distinct, in any script, and is written without a title's line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from word_tokenizer import save_word_tokenizer

from megatron_solopo.data.building.contexts import build_contexts, read_contexts
from megatron_solopo.data.building.pool import Candidate, DistractorPool
from megatron_solopo.data.building.prepare_data import main
from megatron_solopo.data.building.sources import LeftOut, read_pool, read_questions
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.text.prompt import DEFAULT_DOCUMENT_TEMPLATE, PromptFormat


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_untitled_documents_are_distinguished_by_their_texts() -> None:
    gold = Paragraph("", "This text is from the archive of the town. Its answer is Ada.", True)
    others = [Paragraph(" " * (i % 2), f"This text is from the archive of the town. Sheet {i}.") for i in range(4)]
    question = Question("q", "?", "Ada", (), (gold, others[0]))
    pool = DistractorPool.of(
        [gold, *others, Paragraph("", "this text is from archive of the town, sheet 3")], PromptFormat()
    )
    (context,) = build_contexts(question, pool, [5], prompt_format=PromptFormat(), seed=0)
    assert gold in context.paragraphs
    assert {" ".join(p.text.split()[-2:]) for p in context.paragraphs} - {"sheet 3"} >= {
        "is Ada.",
        "Sheet 0.",
        "Sheet 1.",
    }
    assert len({Candidate(p, 1).title_key for p in context.paragraphs}) == 5
    # A title is never mistaken for an untitled document's text.
    assert Candidate(Paragraph("Sheet", "x"), 1).title_key != Candidate(Paragraph("", "Sheet"), 1).title_key


def test_sources_leave_documents_untitled(tmp_path: Path) -> None:
    documents = [
        "河水向东流。",
        {"text": "河水向西流。", "title": None},
        {"text": "x", "title": "T", "is_supporting": True},
    ]
    path = write(tmp_path / "q.jsonl", {"question": "?", "answer": "x", "documents": documents})
    (question,) = read_questions("jsonl", [path], LeftOut())
    assert [paragraph.title for paragraph in question.paragraphs] == ["", "", "T"]
    pool = write(tmp_path / "p.jsonl", {"text": "a"}, {"text": "b", "title": ""}, {"text": "c", "title": "C"})
    assert list(read_pool([pool])) == [Paragraph("", "a"), Paragraph("", "b"), Paragraph("C", "c")]


@pytest.mark.parametrize(
    ("template", "titled", "untitled"),
    [
        (DEFAULT_DOCUMENT_TEMPLATE, "Document 3: {T}\n{title} x", "Document 3\n{title} x"),
        ("{title}\n{text}", "{T}\n{title} x", "{title} x"),
        ("<{number}>\n{title}\n{text}", "<3>\n{T}\n{title} x", "<3>\n{title} x"),
        ("{title}: {text}", "{T}: {title} x", "{title} x"),
        ("[{number}] {title} | {text}", "[3] {T} | {title} x", "[3] | {title} x"),
        ("{number} – {title}\n{text}", "3 – {T}\n{title} x", "3\n{title} x"),
        ("{text}", "{title} x", "{title} x"),
    ],
)
def test_an_untitled_document_has_no_line_for_it(template: str, titled: str, untitled: str) -> None:
    prompt_format = PromptFormat(document_template=template)
    assert prompt_format.document(Paragraph("{T}", "{title} x"), 3) == titled
    assert prompt_format.document(Paragraph("", "{title} x"), 3) == untitled


def test_untitled_documents_fill_contexts(tmp_path: Path) -> None:
    """Questions, pool and prompts of the command: Chinese documents without spaces or titles."""
    documents = [{"text": "巴金出生在四川。", "is_supporting": True}, "第0条河水向东流。", "第1条河水向东流。"]
    record = {"id": "q", "question": "谁？", "answer": "巴金", "documents": documents}
    pool = [{"title": "", "text": f"第{i}座山很高。"} for i in range(20)]
    argv = [
        "--source",
        "jsonl",
        "--data",
        str(write(tmp_path / "q.jsonl", record)),
        "--output",
        str(tmp_path / "c.jsonl"),
    ]
    argv += [
        "--pool",
        str(write(tmp_path / "p.jsonl", *pool)),
        "--tokenizer",
        str(save_word_tokenizer(tmp_path / "model")),
    ]
    main([*argv, "--short-documents", "3", "--long-documents", "23"])
    (pair,) = read_contexts(tmp_path / "c.jsonl")
    content = pair.long_messages[-1]["content"]
    texts = [document if isinstance(document, str) else document["text"] for document in [*documents, *pool]]
    assert all(content.count(text) == 1 for text in texts)
    assert sorted(content[start:end] for start, end, _ in pair.short_spans)[0].startswith("Document 1\n")
