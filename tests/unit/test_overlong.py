"""A context that is too long loses distractor text from its middle, and nothing else."""

import random

import pytest
from refusals import refused
from segment_names import scored
from tiny_models import write_lines, write_model
from token_data import tokenize

from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized.overlong import cut_context
from megatron_solopo.data.tokenized.tokens import Shortened

SCORED = scored("short_chosen", "short_rejected", "long_chosen")


def count_texts(texts):
    return [len(text.split()) for text in texts]


def count_prompt(messages):
    return 3 + sum(count_texts([message["content"] for message in messages]))


def draw_context(seed):
    """(chat, spans) of random documents between an instruction and a question; every word is another one."""
    draw = random.Random(seed)
    number = iter(range(10**6))

    def text(words):
        return " ".join(f"w{next(number)}" for _ in range(words))

    content, spans = text(draw.randint(1, 9)) + draw.choice(["\n\n", "\n"]), []
    for index in range(draw.randint(1, 12)):
        content += draw.choice(["\n\n", " -- ", "\n"]) if index else ""
        document = f"Document {index}: " + text(draw.randint(1, 40))
        spans.append((len(content), len(content) + len(document), draw.random() < 0.3))
        content += document
    return [
        {"role": "system", "content": text(3)},
        {"role": "user", "content": f"{content}\n\nQuestion: {text(draw.randint(1, 9))}"},
    ], spans


def documents(messages, spans):
    return [messages[-1]["content"][start:end] for start, end, _ in spans]


@pytest.mark.parametrize("block", range(8))
def test_only_distractors_shrink_and_no_more_than_needed(block):
    slack = []
    for seed in range(block * 50, block * 50 + 50):
        chat, spans = draw_context(seed)
        full = count_prompt(chat)
        limit = random.Random(seed).randint(5, full - 1)
        before = documents(chat, spans)
        cut = cut_context(chat, spans, limit, count_prompt, count_texts)
        least = full - sum(count_texts([t])[0] for t, (_, _, gold) in zip(before, spans, strict=True) if not gold)
        if cut is None:
            assert least > limit
            continue
        assert cut.tokens == count_prompt(cut.messages) <= limit and cut.messages[:-1] == chat[:-1]
        after = documents(cut.messages, cut.spans)
        # Every document that is left is one of the old ones, in order; evidence whole.
        place = -1
        shortened = []
        for text, (_, _, gold) in zip(after, cut.spans, strict=True):
            place = next(i for i in range(place + 1, len(before)) if before[i].startswith(text) and spans[i][2] == gold)
            if text != before[place]:
                assert not gold and before[place][len(text)].isspace()  # whole words
                shortened.append(place)
        assert len(shortened) <= 1
        assert [t for t, s in zip(after, cut.spans, strict=True) if s[2]] == [
            t for t, s in zip(before, spans, strict=True) if s[2]
        ]
        # Instruction and question as they were.
        old, new = chat[-1]["content"], cut.messages[-1]["content"]
        assert new.startswith(old[: spans[0][0]]) and new.endswith(old[spans[-1][1] :])
        slack.append(limit - cut.tokens)
        assert slack[-1] < max(count_texts([t for t, span in zip(before, spans, strict=True) if not span[2]]))
    assert sum(slack) / len(slack) < 3  # a document is shortened by its share of characters, which is not exact


@pytest.mark.parametrize("seed", range(60))
def test_documents_go_from_the_middle_outward(seed):
    chat, spans = draw_context(seed)
    middle = len(chat[-1]["content"]) / 2
    before = documents(chat, spans)
    cut = cut_context(chat, spans, count_prompt(chat) * 2 // 3, count_prompt, count_texts)
    if cut is None:
        return
    left = documents(cut.messages, cut.spans)
    distance = {text: abs((start + end) / 2 - middle) for text, (start, end, _) in zip(before, spans, strict=True)}
    touched = [t for t, (_, _, gold) in zip(before, spans, strict=True) if not gold and t not in left]
    whole = [t for t, (_, _, gold) in zip(before, spans, strict=True) if not gold and t in left]
    assert touched and max(map(distance.get, touched)) <= min(map(distance.get, whole), default=middle)
    assert cut_context(chat, spans, count_prompt(chat) * 2 // 3, count_prompt, count_texts) == cut


def test_a_text_without_spaces_is_cut_between_characters():
    text = "東" * 40 + "西" * 40
    chat, spans = [{"role": "user", "content": text + "問"}], [(0, 40, False), (40, 80, True)]

    def count(chat):
        return len(chat[-1]["content"])

    cut = cut_context(chat, spans, 60, count, lambda texts: [len(text) for text in texts])
    assert cut.messages[-1]["content"] == "東" * 19 + "西" * 40 + "問" and cut.tokens == 60
    assert cut.spans == [(0, 19, False), (19, 59, True)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tokenizer = load_tokenizer(write_model(folder / "hf"))
    gold, other = " ".join(["w1"] * 10), " ".join(["w2"] * 10)

    def chat(*parts):
        content, spans = "w9 ", []
        for part in parts:
            spans.append([len(content), len(content) + len(part), part is gold])
            content += part + " "
        return [{"role": "user", "content": content + "w8"}], spans

    groups = []
    for name, parts in (("fits", [gold]), ("cut", [other, gold, other, other]), ("gold", [gold] * 3)):
        long, spans = chat(*parts)
        short, short_spans = chat(gold)
        groups.append(
            {"id": name, "short_messages": short, "long_messages": long, "chosen": "w3 w3", "rejected": "w4"}
            | {"short_spans": short_spans, "long_spans": spans}
        )
    groups.append({**groups[1], "id": "blind", "long_spans": []})
    return write_lines(folder / "groups.jsonl", groups), tokenizer


def test_what_cannot_be_cut_is_dropped_with_its_reason(home):
    path, tokenizer = home
    dataset = tokenize(path, tokenizer, SCORED, 30, "cut")
    assert [group.id for group in dataset.groups] == ["fits", "cut"]
    # <user> w9, ten gold words, w8 <assistant>, and three tokens of the response: 13 words of distractors are left.
    assert dataset.report.cut == [Shortened("cut", "long", 44, 27)]
    words = tokenizer.convert_ids_to_tokens(dataset.groups[1].prompts[1].ids)
    assert words.count("w1") == 10 and words.count("w2") == 13 and words[0] == "<user>" and words[-2] == "w8"
    assert [(d.id, d.tokens, d.reason) for d in dataset.dropped] == [
        ("gold", 37, "the distractors of its long context are not enough"),
        ("blind", 47, "no long_spans mark its documents"),
    ]
    lines = dataset.report.lines(30)
    assert lines[0].startswith("dropped 2 examples longer than 30 tokens: gold (37, the distractors of its long")
    assert lines[1] == "cut distractors of 1 contexts to fit 30 tokens: cut long (44 to 27)"


def test_refusing_names_the_ways_out(home):
    path, tokenizer = home
    with refused(
        "example-too-long", "example 'cut' ", "47 tokens", "--seq-length 30", "--overlong drop", "--overlong cut"
    ):
        tokenize(path, tokenizer, SCORED, 30)
