"""inspect-data: what is shown is what training computes, what is counted is there, and nothing in the data runs."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import weakref
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.building.contexts import PromptFormat
from megatron_solopo.data.files.parquet import write_groups
from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.inspection import text as terminal
from megatron_solopo.data.inspection.charts import Series, bins
from megatron_solopo.data.inspection.examples import FLAGS, Example, Reservoir, measure, read_examples
from megatron_solopo.data.inspection.statistics import Distribution, Repeats, Statistics
from megatron_solopo.data.inspection.view import View, answer_pattern, make_view, marked, token_text, uses
from megatron_solopo.data.schema import Paragraph, read_groups
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import reference_roles, roles, solopo_loss
from megatron_solopo.training.health import length_bias

TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "chat_templates" / "chatml.jinja"
WORDS = "the river town was founded near a bridge by settlers who sold wool and salt in spring fairs every year".split()
FORMAT = PromptFormat()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with ChatML."""
    where = tmp_path_factory.mktemp("tokenizer")
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


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def groups(count: int, seed: int = 0, sizes: tuple[int, int] = (4, 24)) -> list[dict[str, Any]]:
    """Groups of invented questions: two documents are evidence, the contexts differ in the others."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(12, 40)))

    made = []
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
        made.append(record)
    return made


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def view_of(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, **method: Any) -> View:
    example = next(read_examples(write(tmp_path / "one.jsonl", [record])))
    return make_view(example, tokenizer, MethodConfig(**method))


METHODS = [
    dict(),
    dict(alignment_reference="short"),
    dict(alignment_target="both", alignment_stop_short_gradient=True),
    dict(context_mode="short", preference_loss="simpo", sft_weight=0.5),
    dict(context_mode="long", preference_loss="ipo"),
    dict(preference_loss="orpo"),
    dict(context_mode="long", preference_loss="longpo"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: " ".join(map(str, method.values())) or "default")
def test_the_loss_depends_on_exactly_what_is_said(method: dict[str, Any]) -> None:
    """`uses` against the gradient of the loss with respect to every log-prob."""
    loss, weight = method.get("preference_loss", "dpo"), 0.7
    config = MethodConfig(**{"beta": 0.3, "alignment_weight": weight, **method})
    draw = torch.Generator().manual_seed(1)
    names = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")

    def leaves(wanted: Any) -> dict[str, torch.Tensor]:
        return {name: (-5 - torch.rand(1, generator=draw).double()).requires_grad_() for name in wanted}

    policy, reference = leaves(names), leaves(reference_roles(config))
    lengths = {name: torch.tensor([4.0], dtype=torch.float64) for name in names}

    def gradients(**change: Any) -> dict[str, float]:
        changed = MethodConfig(**{**vars(config), **change})
        given = {role: policy[role] for role in roles(config)}
        total = solopo_loss(given, lengths, reference or None, changed).loss.sum()
        found = torch.autograd.grad(total, [*policy.values(), *reference.values()], allow_unused=True)
        keys = [*policy, *(f"reference {name}" for name in reference)]
        return {key: 0.0 if g is None else g.item() for key, g in zip(keys, found, strict=True)}

    whole, without_alignment = gradients(), gradients(alignment_weight=0.0)
    for role in names:
        said = " | ".join(uses(role, config))
        assert bool(said) == bool(whole[role] or whole.get(f"reference {role}"))
        preferred = "preference loss" in said
        assert preferred == (without_alignment[role] != 0)
        if preferred:
            # A higher log-prob of chosen lowers the loss.
            assert (without_alignment[role] < 0) == ("preference loss: chosen" in said), (role, loss)
        if "alignment" in said:
            assert (whole[role] == without_alignment[role]) == ("no gradient" in said)
        else:
            assert whole[role] == without_alignment[role]
        assert ("reference log-prob" in said) == (f"reference {role}" in whole)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (dict(), ["short_chosen", "short_rejected", "long_chosen"]),
        (dict(alignment_target="both"), ["short_chosen", "short_rejected", "long_chosen", "long_rejected"]),
        (dict(context_mode="long", preference_loss="orpo"), ["long_chosen", "long_rejected"]),
    ],
)
def test_segments_are_the_sequences_of_transformers(
    method: dict[str, Any], expected: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (record,) = groups(1)
    record["rejected"] = "Na\u00efve \U0001f600 <b>\n no"
    view = view_of(record, tokenizer, tmp_path, **method)
    assert [segment.role for segment in view.segments] == expected
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for segment in view.segments:
        context, response = segment.role.split("_")
        chat = [*record[f"{context}_messages"], {"role": "assistant", "content": record[response]}]
        full = tokenizer.apply_chat_template(chat)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        last = len(prompt) + full[len(prompt) :].index(end)
        assert segment.prompt_tokens == len(prompt)
        assert [(token.position, token.id) for token in segment.tokens] == [
            (place, full[place]) for place in range(len(prompt), last + 1)
        ]
        assert [token.end_of_turn for token in segment.tokens].index(True) == last - len(prompt)
        assert segment.learnt == len(segment.tokens) == sum(last - first + 1 for first, last in segment.predictors)
        assert not any("\ufffd" in token.text or not token.text for token in segment.tokens)
        if response == "chosen":  # every token is a text of its own
            assert "".join(token.text for token in segment.tokens[:-1]) == record[response]


def test_tokens_keep_their_leading_space_with_metaspace_too() -> None:
    """As in SentencePiece vocabularies, where a token decoded alone loses it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator([" ".join(WORDS)] * 2, trainers.BpeTrainer(vocab_size=200))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = made.encode("the river town sold wool")
    assert len(ids) > 4 and "".join(token_text(made, i) for i in ids) == " the river town sold wool"


def test_documents_stand_at_the_positions_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1, sizes=(5, 30))
    view = view_of(record, tokenizer, tmp_path)
    for context in view.contexts:
        chat = record[f"{context.name}_messages"]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert context.tokens == len(ids)
        spans = record[f"{context.name}_spans"]
        for document, (start, end, gold) in zip(context.documents, spans, strict=True):
            found = tokenizer.decode(ids[document.first_token : document.first_token + document.tokens])
            # A token may reach over the border of a document.
            assert document.text[2:-2] in found and len(found) - len(document.text) <= 4
            assert document.text == chat[-1]["content"][start:end] and document.gold == gold
        starts = [start for start, _, _ in spans]
        expected = [np.interp(start, [starts[0], starts[-1]], [0, 1]) for start, _, gold in spans if gold]
        assert context.depths == pytest.approx(expected) and len(expected) == 2
        folds = [piece for piece in context.pieces if piece.kind == "fold"]
        assert [document.number for piece in context.pieces for document in piece.documents] == [
            *range(1, len(spans) + 1)
        ]
        for fold in folds:  # from the first token of its first document to the last of its last
            first, last = fold.documents[0], fold.documents[-1]
            assert fold.tokens == last.first_token + last.tokens - first.first_token


class Screen(io.StringIO):
    """A terminal to write on."""

    def isatty(self) -> bool:
        return True


def printed(view: View, full: bool = False, out: io.StringIO | None = None) -> str:
    out = out or io.StringIO()
    terminal.Printer(terminal.console(out), full).print(view, "groups.jsonl", MethodConfig())
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
    folded, full = printed(view), printed(view, full=True)
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
    record = {"id": "t", "prompt": f"{noise} old HARBOUR-town {noise}", "chosen": "a", "rejected": "b"}
    view = view_of(record | {"answers": ["Harbour town"]}, tokenizer, tmp_path, context_mode="short")
    text = printed(view)
    assert "[[HARBOUR-town]]" in text and "where its documents stand is not recorded" in text
    assert len(re.findall(r"\.\.\. [\d,]+ tokens \.\.\.", text)) == 2
    assert "".join(p.text or p.documents[0].text for p in view.contexts[0].pieces) == record["prompt"]
    assert view.contexts[0].tokens > sum(piece.tokens for piece in view.contexts[0].pieces) > 500
    assert [segment.role for segment in view.segments] == ["short_chosen", "short_rejected"]
    refused = view_of(record, tokenizer, tmp_path)  # solo needs a long context
    assert refused.facts.flags == ("refused",) and "--context-mode short" in printed(refused)


def test_answers_inside_other_words_are_told_apart() -> None:
    text = "It was with it, IT! 19 in 1919. \u4e2d\u56fd\u4eba"
    parts = list(marked(text, answer_pattern(["it", "19", "\u56fd"])))
    assert "".join(part for part, _ in parts) == text
    assert [found for found in parts if found[1]] == [
        ("It", "word"),
        ("it", "inside"),
        ("it", "word"),
        ("IT", "word"),
        ("19", "word"),
        ("19", "inside"),
        ("19", "inside"),
        ("\u56fd", "word"),
    ]
    assert answer_pattern(["?", ""]) is None and list(marked(text, None)) == [(text, "")]


def test_control_characters_do_not_reach_the_terminal(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1)
    record |= {"chosen": "red \x1b[31m and\x07 \r x", "id": "\x1b]0;title\x07", "question": "\x9b?"}
    text = printed(view_of(record, tokenizer, tmp_path))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) and r"red \x1b[31m and\x07 \x0d x" in text


class Page(HTMLParser):
    """What a browser makes of a page: elements, attributes, text, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data
        elif not self._inside:
            self.text += data

    def shown(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "article"]


def make_page(path: Path, folder: Path, out: Path, *more: str) -> Page:
    assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), "--html", str(out), *more]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_nothing_in_the_data_becomes_part_of_the_page(folder: Path, tmp_path: Path) -> None:
    attack = '</script></style>--><script>alert(1)</script><img src=x onerror=alert(1)>"\' onclick="x {{ 7*7 }} &amp;'
    records = groups(3)
    for record in records:
        for name in ("short", "long"):  # a document with HTML
            message, spans = record[f"{name}_messages"][-1], record[f"{name}_spans"]
            message["content"] += attack
            spans.append([spans[-1][1], len(message["content"]), True])
        for key in ("id", "question", "chosen", "rejected", "source"):
            record[key] += attack
        record["answers"].append(attack)
        record["scores"][attack] = random.random()
    out = tmp_path / "page.html"
    page = make_page(write(tmp_path / "groups.jsonl", records), folder, out)
    kinds = Counter(tag for tag, _ in page.elements)
    assert kinds["script"] == kinds["style"] == 1 and kinds["article"] == 3 and not kinds["img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(attack) >= 3 * 8 and "alert" not in page.script
    # A browser runs the one script whose digest the page names, and fetches nothing.
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert not [a for _, a in page.elements if {"src", "href", "srcset", "data"} & a.keys()]
    assert "url(" not in out.read_text(encoding="utf-8") and "@import" not in out.read_text(encoding="utf-8")


def test_the_page_is_the_same_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "groups.jsonl", groups(24, sizes=(3, 6)))
    pages = {}
    for workers, seed in (("1", "0"), ("3", "0"), ("1", "1")):
        out = tmp_path / f"{workers}-{seed}.html"
        page = make_page(path, folder, out, "--samples", "7", "--seed", seed, "--workers", workers)
        pages[workers, seed] = out.read_bytes()
        assert len(page.shown()) == 7 and "24 groups counted, 7 shown" in " ".join(page.text.split())
    assert pages["1", "0"] == pages["3", "0"] != pages["1", "1"]


def test_contexts_without_responses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    records = groups(5)
    for record in records:
        for name in ("short", "long"):
            chat = record[f"{name}_messages"]
            record[f"{name}_tokens"] = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        del record["chosen"], record["rejected"], record["scores"]
    records[1]["long_tokens"] += 1
    path = write(tmp_path / "contexts.jsonl", records)
    page = make_page(path, folder, tmp_path / "page.html")
    assert len(page.shown()) == 5 and "What the loss sees" not in page.text
    assert "oddities: 1 recorded length of a context" in capsys.readouterr().out
    assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), "--id", "q3"]) == 0
    said = capsys.readouterr().out
    assert "question  where is thing 3\n" in said and "[[Harbour3x]]" in said and "what the loss" not in said


def test_every_oddity_is_counted_where_it_is(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def change(record: dict[str, Any], name: str, gold: bool, old: str, new: str) -> None:
        """Replaces text of equal length in the documents of one kind."""
        content = record[f"{name}_messages"][-1]["content"]
        for start, end, is_gold in record[f"{name}_spans"]:
            if is_gold == gold:
                content = content[:start] + content[start:end].replace(old, new) + content[end:]
        record[f"{name}_messages"][-1]["content"] = content

    records = groups(11)
    expected: dict[str, set[str]] = {record["id"]: set() for record in records}
    change(records[1], "long", True, "Harbour1x", "elsewhere")
    expected["q1"] = {
        "answer_not_in_long",
        "answer_not_in_evidence",
        "less_evidence_in_short",
        "evidence_only_in_short",
    }
    change(records[2], "short", True, "Harbour2x", "elsewhere")
    expected["q2"] = {
        "answer_not_in_short",
        "answer_not_in_evidence",
        "less_evidence_in_short",
        "evidence_only_in_short",
    }
    start, end, _ = next(span for span in records[3]["long_spans"] if not span[2])
    content = records[3]["long_messages"][-1]["content"]
    records[3]["long_messages"][-1]["content"] = content[: end - 9] + "Harbour3x" + content[end:]
    expected["q3"] = {"answer_in_distractor"}
    records[4]["rejected"] += " HARBOUR4X!"
    expected["q4"] = {"rejected_has_answer"}
    records[5]["chosen"] = "I do not know."
    expected["q5"] = {"chosen_lacks_answer"}
    records[6] |= {"long_messages": records[6]["short_messages"], "long_spans": records[6]["short_spans"]}
    expected["q6"] = {"long_not_longer"}
    records[7]["chosen_ids"] = tokenizer.encode(records[7]["chosen"], add_special_tokens=False)
    records[7]["rejected_ids"] = tokenizer.encode("something else", add_special_tokens=False)
    expected["q7"] = {"other_ids"}
    records[8]["long_messages"] = records[8]["long_spans"] = None
    expected["q8"] = {"refused"}
    first = next(i for i, span in enumerate(records[9]["short_spans"]) if span[2] and i)
    records[9]["short_spans"][first][2] = False  # imperfect compression: one gold document less
    expected["q9"] = {"less_evidence_in_short"}
    answer_there = (
        "Harbour9x" in records[9]["short_messages"][-1]["content"][slice(*records[9]["short_spans"][first][:2])]
    )
    expected["q9"] |= {"answer_not_in_evidence", "answer_in_distractor"} if answer_there else set()
    records[10]["chosen"] += " and more" * 300
    expected["q10"] = {"too_long"}
    records[0]["answers"].append("By!")
    expected["q0"] = {"short_answer", "answer_in_distractor"}  # "by" is one of the words of all documents
    longest = max(
        len(tokenizer.apply_chat_template(r["long_messages"], add_generation_prompt=True)["input_ids"])
        for r in records
        if r["long_messages"]
    )
    statistics, wanted = Statistics(), ("short_chosen", "short_rejected", "long_chosen")
    for example in read_examples(write(tmp_path / "groups.jsonl", records)):
        facts = measure(example, tokenizer, wanted, longest + 100)
        assert set(facts.flags) == expected[example.id], example.id
        statistics.add(example, facts)
    assert {key: n for key, _, n in statistics.checks() if n} == Counter(f for fs in expected.values() for f in fs)
    assert set(FLAGS) - set(statistics.flags) == {"other_length"}
    assert statistics.without_long == 1 and statistics.refusals.total() == 1


def test_distributions_are_exact() -> None:
    draw = np.random.default_rng(0)
    for values in (draw.integers(-40, 900, 777), draw.integers(5, 6, 9), draw.normal(50, 400, 301).round()):
        counted = Distribution()
        for value in values:
            counted.add(value)
        assert counted.total == len(values) and counted.mean == pytest.approx(values.mean())
        for share in (0.05, 0.5, 0.95, 1):
            assert counted.quantile(share) == np.quantile(values, share, method="inverted_cdf")
        start, width, (counts,) = bins([Series("x", "x", counted)], None)
        assert sum(counts) == len(values)  # nothing is lost, whatever the tails
        inner = np.histogram(values, [start + i * width - 0.5 for i in range(1, len(counts))])[0]
        assert counts[1:-1] == inner.tolist()


def test_one_far_value_does_not_flatten_a_chart() -> None:
    counted = Distribution()
    for value in [*range(100)] * 3 + [100_000]:
        counted.add(value)
    start, width, (counts,) = bins([Series("x", "x", counted)], None)
    assert start + width * len(counts) <= 120 and sum(counts) == 301


def test_a_sample_is_uniform_and_in_order() -> None:
    examples = [Example(i, str(i), "", [], "", {}, {}) for i in range(20)]
    drawn: Counter[int] = Counter()
    for seed in range(600):
        reservoir = Reservoir(5, seed)
        for example in examples:
            reservoir.add(example)
        kept = [example.index for example in reservoir.examples()]
        assert kept == sorted(set(kept)) and len(kept) == 5
        drawn.update(kept)
    # 600 x 5 / 20 = 150 times each, with a standard deviation of 10.6.
    assert all(abs(drawn[i] - 150) < 4.5 * 10.6 for i in range(20))


def test_no_more_examples_live_than_the_sample_and_a_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, most, alive = write(tmp_path / "groups.jsonl", groups(120, sizes=(3, 4))), 0, weakref.WeakSet()

    def watched(data: str) -> Any:
        nonlocal most
        for example in read_examples(data):
            alive.add(example)
            most = max(most, len(alive))
            yield example

    monkeypatch.setattr(inspect_data, "read_examples", watched)
    # A frozen dataclass is hashed by its fields, and lists have no hash.
    monkeypatch.setattr("megatron_solopo.data.inspection.examples.Example.__hash__", object.__hash__)
    make_page(path, folder, tmp_path / "page.html", "--samples", "5", "--workers", "1")
    assert 5 < most <= 5 + 2 * 8 + 3


@pytest.mark.parametrize(
    ("answer", "text", "flagged"),
    [("no", "Nobody knows.", False), ("US", "It must be.", False), ("US", "In the US.", True), ("Oslo", "Oslos", True)],
)
def test_answers_in_distractors_are_those_that_prepare_data_keeps_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, answer: str, text: str, flagged: bool
) -> None:
    (record,) = groups(1)
    record |= {
        "answers": [answer],
        "chosen": answer,
        "long_messages": [{"role": "user", "content": f"{answer} {text}"}],
    }
    record["long_spans"] = [[0, len(answer), True], [len(answer) + 1, len(answer) + 1 + len(text), False]]
    [example] = read_examples(write(tmp_path / "groups.jsonl", [record]))
    assert ("answer_in_distractor" in measure(example, tokenizer).flags) == flagged


@pytest.mark.parametrize(
    ("pairs", "warned", "words"),
    [
        ([(30, 10)] * 40 + [(10, 30)] * 10, True, "Chosen answers have 26.0 tokens, rejected ones 14.0"),
        ([(10, 30)] * 40 + [(30, 10)] * 10, True, "the model may learn length"),
        ([(30, 10)] * 22 + [(10, 30)] * 18, False, "chosen longer in 55.0% of the groups, shorter in 45.0%"),
        ([(30, 10)] * 4 + [(10, 30)] * 1, False, "With so few groups"),
        ([(10, 10)] * 40, False, "No length bias"),
        ([(24, 12)] * 30 + [(10, 12)] * 10, True, "75% of the groups"),
        ([(11, 10)] * 28 + [(9, 10)] * 12, False, "No length bias"),
    ],
)
def test_the_length_bias_in_words(pairs: list[tuple[int, int]], warned: bool, words: str) -> None:
    """It is that of build-pairs and of training."""
    statistics = Statistics()
    for chosen, rejected in pairs:
        statistics.lengths.add(chosen, rejected)
    said, lopsided = statistics.length_bias()
    assert lopsided == warned == (length_bias(pairs) is not None) and words in said


def test_repeated_texts() -> None:
    repeats = Repeats()
    for text in ["a", "b", "a", "c", "a", "b", "x" * 500]:
        repeats.add(text)
    assert repeats.repeated == 3 and repeats.most(5) == [("a", 3), ("b", 2)]


def test_choosing_an_example(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "groups.jsonl", groups(6, sizes=(3, 4)))

    def shown(*more: str) -> str:
        assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), *more]) == 0
        return re.match(r"\n== (\w+)  \(index", capsys.readouterr().out)[1]

    assert shown() == "q0" and shown("--index", "4") == "q4" and shown("--id", "q2") == "q2"
    assert shown("--random", "--seed", "3") == shown("--random", "--seed", "3")
    assert len({shown("--random", "--seed", str(seed)) for seed in range(9)}) > 2


WRONG = {
    "missing": ([], None, "no such file; give the path of a JSONL file"),
    "empty": ([], [], "holds no record; give groups of build-pairs or contexts of prepare-data"),
    "half a line": ([], ['{"id": "a", "chosen'], "groups.jsonl:1: not valid JSON"),
    "questions": ([], [{"id": "a", "paragraphs": []}], "groups.jsonl:1: this file holds questions; give what"),
    "responses": ([], [{"id": "a", "responses": []}], "groups.jsonl:1: this file holds responses; give what"),
    "conversations": ([], [{"messages": []}], "groups.jsonl:1: this file holds conversations for --objective sft"),
    "something else": ([], [{"a": 1}], "groups.jsonl:1: neither a preference group nor contexts (fields found: a)"),
    "broken later": ([], lambda g: [*g, {"chosen": "x"}], "groups.jsonl:4: the field 'short_messages' is missing"),
    "span outside": (
        ["--id", "q1"],
        lambda g: [g[0], g[1] | {"long_spans": [[0, 10**6, True]]}],
        "groups.jsonl:2: long_spans[0] is 0 to 1000000; spans must follow each other within the",
    ),
    "unknown id": (["--id", "q11"], lambda g: g, "no such id among the 3 of"),
    "index beyond": (["--index", "3"], lambda g: g, "holds 3 examples, 0 to 2"),
    "index below": (["--index", "-1"], lambda g: g, "--index -1: examples are counted from 0"),
    "two choices": (["--id", "q1", "--random"], lambda g: g, "--id and --random: give one of them"),
    "samples without page": (["--samples", "3"], lambda g: g, "--samples has no effect without --html"),
    "no samples": (["--html", "page.html", "--samples", "0"], lambda g: g, "--samples 0: give a number of at least 1"),
    "seed of nothing": (["--seed", "1"], lambda g: g, "--seed has no effect without --random or --html"),
    "unknown loss": (["--preference-loss", "dpoo"], lambda g: g, "'dpoo' is not one of dpo, ipo"),
    "unused option": (
        ["--context-mode", "short", "--alignment-target", "both"],
        lambda g: g,
        "--alignment-target",
    ),
    "longpo on short": (["--preference-loss", "longpo"], lambda g: g, "give --context-mode long"),
    "loss of contexts": (
        ["--context-mode", "short"],
        [{"short_messages": [], "short_tokens": 1}],
        "holds contexts without responses, so no loss sees them",
    ),
    "page over the data": (["--html", "groups.jsonl"], lambda g: g, "is the file of --data too; give another"),
    "no tokenizer": (["--tokenizer", "nowhere"], lambda g: g, "nowhere: no such folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, records, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    good = groups(3, sizes=(3, 4))
    if records is not None:
        found = records(good) if callable(records) else records
        lines = (record if isinstance(record, str) else json.dumps(record) for record in found)
        Path("groups.jsonl").write_text("".join(f"{line}\n" for line in lines))
    page = [] if "--html" in arguments or case != "broken later" else ["--html", "page.html"]
    with pytest.raises(UserError) as error:
        inspect_data.main(["--data", "groups.jsonl", "--tokenizer", str(folder), *arguments, *page])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("page.html").exists()


def test_a_runs_configuration_decides_what_is_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "groups.jsonl", groups(2, sizes=(3, 6)))
    run = tmp_path / "run.yaml"
    run.write_text(
        "method: {preference_loss: simpo, context_mode: long}\ntraining: {train_iters: 3}\ndata: {seq_length: 100}\n"
    )
    base = ["--data", str(path), "--tokenizer", str(folder), "--config", str(run)]
    assert inspect_data.main(base) == 0
    said = capsys.readouterr().out
    assert "--preference-loss simpo --context-mode long" in said and "! longer than --seq-length" in said
    assert re.findall(r"^(\w+_\w+) +\w", said, re.MULTILINE) == ["long_chosen", "long_rejected"]
    assert inspect_data.main([*base, "--context-mode", "short", "--seq-length", "5000"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+_\w+) +\w", said, re.MULTILINE) == ["short_chosen", "short_rejected"]
    assert "! longer" not in said
    run.write_text("method: {objective: sft}\ntraining: {train_iters: 3}\n")
    with pytest.raises(UserError, match="--objective sft has no preference groups"):
        inspect_data.main(base)


def test_new_special_tokens_of_a_run_are_shown_as_training_has_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = groups(1)
    path = write(tmp_path / "groups.jsonl", [{**record, "chosen": f"<think>{record['chosen']}"}])
    run = tmp_path / "run.yaml"
    run.write_text("model: {add_special_tokens: <think>}\ntraining: {train_iters: 3}\n")
    base = ["--data", str(path), "--tokenizer", str(folder)]
    for more, whole in ([], False), (["--config", str(run)], True), (["--add-special-tokens", "<think>"], True):
        assert inspect_data.main([*base, *more]) == 0
        assert ("|<think>|" in capsys.readouterr().out) == whole, more


def test_every_position_of_the_pack_is_accounted_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The places that predict lie in the pack, and no two tokens of a response share one."""
    (record,) = groups(1)
    view = view_of(record, tokenizer, tmp_path)
    prompts = {segment.role.split("_")[0]: segment.prompt_tokens for segment in view.segments}
    responses = sum(len(segment.tokens) - 1 for segment in view.segments)
    assert view.pack_tokens == sum(prompts.values()) + responses
    for segment in view.segments:
        places = list(itertools.chain(*(range(first, last + 1) for first, last in segment.predictors)))
        assert len(set(places)) == len(segment.tokens) and max(places) < view.pack_tokens


def test_parquet_shows_what_jsonl_shows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write(tmp_path / "groups.jsonl", groups(3))
    assert write_groups(tmp_path / "groups.parquet", read_groups(lines)) == 3
    said = []
    for path in (lines, tmp_path / "groups.parquet"):
        assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), "--id", "q2"]) == 0
        said.append(capsys.readouterr().out.replace(str(path), "FILE"))
    assert said[0] == said[1] and "[[Harbour2x]]" in said[0]
