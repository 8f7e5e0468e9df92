"""The page of inspect-data: what is counted is there, and nothing in the data runs."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import weakref
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected import groups, tokenizer_folder, write
from segment_names import scored
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.inspection.blocks import html
from megatron_solopo.data.inspection.charts import Chart
from megatron_solopo.data.inspection.examples import Example, read_examples, sample
from megatron_solopo.data.inspection.facts import FLAGS, measure
from megatron_solopo.data.inspection.statistics import Repeats, Statistics
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.training.monitoring import length_bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


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
    assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), "--output", str(out), *more]) == 0
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
    assert len(page.shown()) == 5 and "what the loss sees" not in page.text
    assert "oddities: 1 recorded length of a context" in capsys.readouterr().out
    assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), "--id", "q3"]) == 0
    output = capsys.readouterr().out
    assert "question  where is thing 3\n" in output and "[[Harbour3x]]" in output and "what the loss" not in output


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
    statistics, wanted = Statistics(), scored("short_chosen", "short_rejected", "long_chosen")
    for example in read_examples(write(tmp_path / "groups.jsonl", records)):
        facts = measure(example, tokenizer, wanted, longest + 100)
        assert set(facts.flags) == expected[example.id], example.id
        statistics.add(example, facts)
    assert {key: n for key, _, n in statistics.checks() if n} == Counter(f for fs in expected.values() for f in fs)
    assert set(FLAGS) - set(statistics.flags) == {"other_length"}
    assert statistics.without_long == 1 and statistics.refusals.total() == 1


def chart_of(values: Any, style: str = "chosen", **more: Any) -> Chart:
    return Chart("Words", [("chosen", style, np.array(values, dtype=float))], "words", **more)


def test_distributions_are_exact() -> None:
    draw = np.random.default_rng(0)
    for values in (draw.integers(-40, 900, 777), draw.integers(5, 6, 9), draw.normal(50, 400, 301).round()):
        chart = chart_of(values)
        low, median, high = (f"{np.quantile(values, share, method='inverted_cdf'):,.0f}" for share in (0.05, 0.5, 0.95))
        assert chart.figures(0) == (median, f"{values.mean():,.1f}", f"{low} to {high}")
        start, width, (counts,) = chart.bins
        assert sum(counts) == len(values)  # nothing is lost with any tails
        inner = np.histogram(values, [start + i * width - 0.5 for i in range(1, len(counts))])[0]
        assert counts[1:-1] == inner.tolist()


def test_one_far_value_does_not_flatten_a_chart() -> None:
    chart = chart_of([*range(100)] * 3 + [100_000])
    start, width, (counts,) = chart.bins
    assert start + width * len(counts) <= 120 and sum(counts) == 301 and chart.beyond


def test_ticks_are_round_numbers_at_their_places() -> None:
    for values, more in (([754, 764], {}), ([0.1, 0.9], {"digits": 3, "limits": (0, 1)}), ([-28, 17], {})):
        chart = chart_of(values, **more)
        start, width, (counts,) = chart.bins
        ticks = [(place, float(text)) for place, text in chart.ticks()]
        assert 2 <= len(ticks) <= 7 and (0 in dict(map(reversed, ticks))) == (values[0] < 1)
        for place, value in ticks:
            middle = 0.5 if not more and width == 1 else 0
            assert start + width * (place / 100 * len(counts) - middle) == pytest.approx(value)


def test_a_sample_is_uniform_and_in_order() -> None:
    examples = [Example(i, str(i), "", [], "", {}, {}) for i in range(20)]
    drawn: Counter[int] = Counter()
    for seed in range(600):
        kept = [example.index for example in sample(iter(examples), 5, seed)]
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
        ([(30, 10)] * 22 + [(10, 30)] * 18, False, "chosen longer in 55.0% of the pairs, shorter in 45.0%"),
        ([(30, 10)] * 4 + [(10, 30)] * 1, False, "With so few groups"),
        ([(10, 10)] * 40, False, "No length bias"),
        ([(24, 12)] * 30 + [(10, 12)] * 10, True, "75% of the pairs"),
        ([(11, 10)] * 28 + [(9, 10)] * 12, False, "No length bias"),
    ],
)
def test_the_length_bias_in_words(pairs: list[tuple[int, int]], warned: bool, words: str) -> None:
    """It is that of build-pairs and of training."""
    statistics = Statistics()
    for chosen, rejected in pairs:
        statistics.lengths.add(chosen, rejected)
    sentence, lopsided = statistics.length_bias()
    assert lopsided == warned == (length_bias(pairs) is not None) and words in sentence


def test_repeated_texts() -> None:
    repeats = Repeats()
    for text in ["a", "b", "a", "c", "a", "b", "x" * 500]:
        repeats.add(text)
    assert repeats.repeated == 3 and repeats.most(5) == [("a", 3), ("b", 2)]


def test_numbers_of_any_size_are_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the sum nor the difference of such scores is finite."""
    records = groups(12, sizes=(3, 4))
    for index, record in enumerate(records):
        record["scores"] = {"wild": (-1) ** index * 1e308, "tiny": index * 1e-320, "most": 1e308, "endless": 10**400}
    records[0]["scores"]["most"] = 0.5
    path = write(tmp_path / "groups.jsonl", records)
    page = make_page(path, folder, tmp_path / "page.html")
    output = capsys.readouterr().out
    assert re.search(r"Score: wild +-1e\+300 +█ +█ +1\.1e\+300 +-1e\+308 +0\.000 +-1e\+308 to", output), output
    assert re.search(r"Score: most +0 +▁ +█ .* 1e\+308 +9\.167e\+307 ", output), output
    assert "median -1e+308" in page.text and "endless" not in page.text
    assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder)]) == 0
    assert "scores    wild 1e+308, tiny 0, most 0.5\n" in capsys.readouterr().out


def test_the_terminal_and_the_page_show_the_same_bars() -> None:
    chart = chart_of([3] * 8 + [5] * 4 + [10])
    page = Page(str(html(chart.bars(0))))
    bars = {a["title"]: (a["class"], a["style"]) for tag, a in page.elements if tag == "span"}
    heights = {"chosen, 3 words: 8 (61.5%)": "100.0%", "chosen, 5 words: 4 (30.8%)": "50.0%"}
    assert {title: ("chosen", f"height: {height}") for title, height in heights.items()}.items() <= bars.items()
    assert chart.bars(0).plain == "\u2588 \u2584    \u2581" == page.text
    assert chart.words(0) == "median 3, mean 4.2, middle 90 % from 3 to 10"
    signs = [a["class"] for _, a in Page(str(html(chart_of([-1, 0, 1], "signed").bars(0)))).elements[1:]]
    assert signs[1:4] == ["rejected", "neutral", "chosen"]
