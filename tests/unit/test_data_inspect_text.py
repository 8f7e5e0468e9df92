"""What inspect-data prints: folded around the evidence, answers marked, prompts as the template renders them."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from inspected import WORDS, groups, tokenizer_folder, view_of
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import find_in_document
from megatron_solopo.data.inspection.blocks import Block, console, stretches
from megatron_solopo.data.inspection.view import View, answer_pattern, highlighted
from megatron_solopo.data.schema import Paragraph
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.prompt import PromptFormat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


class Screen(io.StringIO):
    """A terminal to write on."""

    def isatty(self) -> bool:
        return True


def printed(view: View, out: io.StringIO | None = None) -> str:
    out = out or io.StringIO()
    console(out).print(*view.printed("groups.jsonl"), sep="\n")
    return out.getvalue()


def test_colours_on_a_terminal_and_plain_marks_elsewhere(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = groups(1)
    view = view_of(record, tokenizer, tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    coloured = printed(view, out=Screen())
    assert re.search(r"\x1b\[[\d;]*3\dm", coloured) and "[[" not in coloured
    plain = printed(view)
    monkeypatch.setenv("NO_COLOR", "1")
    without = printed(view, out=Screen())
    assert not re.search(r"\x1b\[[\d;]*[34]\dm", without)
    for text in (plain, without):
        assert "[[Harbour0x]]" in text and ">> evidence" in text and "|<|im_end|>|" in text
    assert "\x1b" not in plain
    assert all(len(line) <= 110 for line in plain.splitlines())


def test_long_contexts_are_folded_around_the_evidence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1)
    view = view_of(record, tokenizer, tmp_path)
    folded, full = printed(view), printed(view_of(record, tokenizer, tmp_path, full=True))
    content = record["long_messages"][-1]["content"]
    for start, end, gold in record["long_spans"]:
        title = content[start:end].splitlines()[0]
        assert (f"\n> {title}\n" in folded) == gold and title in full
    hidden = sum(not gold for name in ("short", "long") for _, _, gold in record[f"{name}_spans"])
    assert sum(int(n) for n in re.findall(r"tokens of (\d+) distractors? \.\.\.", folded)) == hidden
    assert record["question"] in folded and "..." not in full
    depths = [f"{depth:.2f}" for depth in view.contexts[1].depths]
    assert f"evidence at depth {', '.join(depths)}\n" in folded


def test_without_spans_the_text_is_folded_around_the_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    noise = " ".join(random.Random(0).choices(WORDS, k=800))
    record = {"id": "t", "prompt": f"{noise} old HARBOUR  Town! {noise}", "chosen": "a", "rejected": "b"}
    view = view_of(record | {"answers": ["Harbour town"]}, tokenizer, tmp_path, context_mode="short")
    text = printed(view)
    assert "[[HARBOUR  Town]]" in text and "the places of its documents are not recorded" in text
    assert len(re.findall(r"\.\.\. [\d,]+ tokens \.\.\.", text)) == 2
    pieces = (
        view_of({**record, "answers": ["Harbour town"]}, tokenizer, tmp_path, True, context_mode="short")
        .contexts[0]
        .pieces
    )
    parts = [p.parts[0].parts[0] if isinstance(p, Block) else p for p in pieces]
    assert "".join(part.plain for part in parts) == record["prompt"]
    folded = [int(p.title.removesuffix(" tokens").replace(",", "")) for p in pieces if isinstance(p, Block)]
    assert view.contexts[0].tokens > sum(folded) > 500
    assert [segment.name for segment in view.segments] == ["short_chosen", "short_rejected"]
    refused = view_of(record, tokenizer, tmp_path)  # solo needs a long context
    assert refused.facts.flags == ("refused",) and "--context-mode short" in printed(refused)


def test_answers_inside_other_words_are_marked_differently() -> None:
    text = "It was with it, IT! 19 in 1919. \u4e2d\u56fd\u4eba"
    answers = ["it", "19", "\u56fd"]
    parts = list(stretches(highlighted(text, find_in_document(text, answers), answer_pattern(answers))))
    assert "".join(part for part, _, _ in parts) == text
    assert [(part, *names) for part, names, _ in parts if names] == [
        ("It", "answer"),
        ("it", "other"),
        ("it", "answer"),
        ("IT", "answer"),
        ("19", "answer"),
        ("19", "other"),
        ("19", "other"),
        ("\u56fd", "answer"),
    ]
    assert answer_pattern(["?", ""]) is None and list(stretches(highlighted(text, []))) == [(text, [], {})]


def test_control_characters_do_not_reach_the_terminal(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1)
    record |= {"chosen": "red \x1b[31m and\x07 \r x", "id": "\x1b]0;title\x07", "question": "\x9b?"}
    text = printed(view_of(record, tokenizer, tmp_path))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) and "red \u241b[31m and\u2407 \u240d x" in text


NUMBERED = {
    "default": "Document {number}: {title}\n{text}",
    "brackets": "[{number}] {title}\n{text}",
    "first": "{number}. {text}",
    "behind the title": "{title} ({number})\n{text}",
    "at both ends": "<doc {number}>{text}</doc {number}>",
    "none": "{title}: {text}",
}


@pytest.mark.parametrize("template", NUMBERED)
@pytest.mark.parametrize("last", [5, 22])
def test_the_number_of_a_document_is_no_answer(
    template: str, last: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Neither in what is counted nor in what is marked; the same number in a document's text is one."""
    prompt_format = PromptFormat(document_template=NUMBERED[template])
    paragraphs = [Paragraph(f"T{chr(64 + n)}", f"x{n * 100}y it was", n == 2) for n in range(1, last + 1)]
    (record,) = groups(1)
    for name, kept in (("short", paragraphs[:3]), ("long", paragraphs)):
        messages, spans = prompt_format.messages_and_spans(f"{last}?", kept)
        record |= {f"{name}_messages": messages, f"{name}_spans": spans}
    record |= {"answers": [str(last), "3"], "chosen": f"Answer: {last}", "rejected": f"See document {last}. Answer: 9"}
    view = view_of(record, tokenizer, tmp_path)
    flags = {"short_answer", "answer_not_in_short", "answer_not_in_long", "answer_not_in_evidence"}
    assert set(view.facts.flags) == flags and view.contexts[1].answers_in == []
    text = printed(view_of(record, tokenizer, tmp_path, full=True))
    assert "[[" not in text.partition("== chosen")[0] and f"Answer: [[{last}]]" in text
    content = record["long_messages"][-1]["content"]
    there = content.rindex("it was")  # in the last document's text
    record["long_messages"][-1]["content"] = content[:there] + f"{last:<6}" + content[there + 6 :]
    view = view_of(record, tokenizer, tmp_path)
    assert view.contexts[1].answers_in == [last] and "answer_in_distractor" in view.facts.flags
    folded = printed(view)
    assert f"an answer found in document {last} ==" in folded
    assert re.search(rf"    an answer in document {last}: \.\.\. .*\[\[{last}\]\]", folded)


def test_without_spans_numbers_and_the_question_are_no_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    record = {
        "id": "t",
        "prompt": "Document 7: A\nrain\n\nDocument 8: B\nsun\n\nQuestion: 8 or 9?",
        "question": "8 or 9?",
    }
    record |= {"answers": ["8", "9"], "chosen": "8", "rejected": "7"}
    view = view_of(record, tokenizer, tmp_path, context_mode="short")
    assert view.contexts[0].answers_in == [] and "answer_not_in_short" in view.facts.flags


SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


RENDERED = {
    "as it is": ("m['content']", 1),
    "trimmed": ("m['content'].strip()", 1),
    "rewritten": ("m['content'] | replace('the', 'THE')", 0),
}


@pytest.mark.parametrize("case", RENDERED)
@pytest.mark.parametrize("spans", [True, False])
def test_prompts_are_shown_as_the_template_renders_them(
    case: str, spans: bool, folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Every character of it in order: the template's, control tokens marked, and the messages'."""
    written, shown = RENDERED[case]
    template = tmp_path / "template.jinja"
    template.write_text(SYSTEM.replace("CONTENT", written))
    with_template = load_tokenizer(folder, template)
    (record,) = groups(1)
    if not spans:
        record |= {"short_spans": None, "long_spans": None}
    for name in ("short", "long"):  # a message that contains what the template writes
        record[f"{name}_messages"][-1]["content"] += "\nassistant <|im_end|> system\n"
    view = view_of(record, with_template, tmp_path)
    for context in view.contexts:
        rendered, messages = context.rendered, record[f"{context.name}_messages"]
        prompt = with_template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered.text == prompt and len(rendered.shown) == shown
        frames = [frame.plain for frame in rendered.frames]
        if not shown:
            assert frames == [prompt]
            continue
        content = messages[-1]["content"].strip() if case == "trimmed" else messages[-1]["content"]
        assert frames == [
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ]
        assert frames[0] + content + frames[1] == prompt and prompt[slice(*rendered.content)] == content
        assert [text for frame in rendered.frames for text, names, _ in stretches(frame) if names == ["control"]] == [
            "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"
        ]  # fmt: skip
        assert context.pieces
    text = printed(view_of(record, with_template, tmp_path, full=True))
    assert "| {<|im_start|>}system\n| You help.{<|im_end|>}\n| {<|im_start|>}user\n" in text
    assert "| {<|im_end|>}\n| {<|im_start|>}assistant\n" in text and "[[Harbour0x]]" in text
    system = [{"role": "system", "content": "user"}, *record["short_messages"]]
    view = view_of({**record, "short_messages": system}, with_template, tmp_path)
    if shown:
        assert "| {<|im_start|>}system\nuser\n| {<|im_end|>}\n| {<|im_start|>}user\n" in printed(view)
        assert "You help" not in printed(view).partition("== long context")[0]
    assert "rewrites the messages" in printed(view) or shown


def test_a_response_marks_what_counts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1)
    record |= {"answers": ["no"], "chosen": "No document says no.\nAnswer: No, they are", "rejected": "no. Answer: yes"}
    view = view_of(record, tokenizer, tmp_path)
    text = printed(view)
    assert "\nNo document says no.\nAnswer: [[No]], they are\n" in text and re.search(
        r"== chosen  \d+ tokens, an answer is found", text
    )
    assert "\nno. Answer: yes\n" in text and "no answer is found in it" in text
    assert "answers not searched for in documents" in text
