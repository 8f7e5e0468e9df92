"""Laws of contexts: the same gold in both, clean distractors, sizes, uniform depth, determinism."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from refusals import refused

from megatron_solopo.data.answers import golds, mentions
from megatron_solopo.data.building import selection
from megatron_solopo.data.building.contexts import Context, build_contexts
from megatron_solopo.data.building.pool import DistractorPool, PoolWriter, open_writer, write_pool
from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.building.sources import LeftOut, read_questions
from megatron_solopo.data.schema import Message, Paragraph, Question
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.prompt import PromptFormat

FORMAT = PromptFormat(document_template="{number} {title} : {text}", prompt_template="{documents} ? {question}")
WORDS = [f"w{index}" for index in range(500)]


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def count_chat(messages: list[Message]) -> int:
    return sum(len(message["content"].split()) + 3 for message in messages)  # 3: tokens of a template


def corpus(questions: int = 60, seed: int = 0) -> list[Question]:
    """Questions with 2 gold paragraphs and 6 others, of 8 to 40 words each."""
    rng = random.Random(seed)

    def text(extra: str = "") -> str:
        return " ".join([*rng.choices(WORDS, k=rng.randint(8, 40)), extra]).strip()

    return [
        Question(
            f"q{i}",
            f"what is {i}",
            f"Answer{i}x",
            (f"Alias{i}x",),
            tuple(
                Paragraph(f"Title {i} {j}", text(f"answer{i}x" if j == 3 else ""), is_supporting=j in (3, 5))
                for j in range(8)
            ),
        )
        for i in range(questions)
    ]


def pool_of(questions: list[Question], extra: tuple[Paragraph, ...] = ()) -> DistractorPool:
    return DistractorPool.of([*(p for q in questions for p in q.paragraphs), *extra], FORMAT, count_words)


def build(
    question: Question, pool: DistractorPool, sizes: list[int], seed: int = 1, tokens: bool = True, **how: float
) -> list[Context]:
    return build_contexts(
        question, pool, sizes, prompt_format=FORMAT, seed=seed, count_tokens=count_chat if tokens else None, **how
    )


def gold_of(question: Question) -> list[Paragraph]:
    return [paragraph for paragraph in question.paragraphs if paragraph.is_supporting]


@pytest.mark.parametrize(("sizes", "tokens"), [([180, 400, 1500], True), ([4, 12, 60], False), ([8, 8], False)])
def test_laws_of_every_context(sizes: list[int], tokens: bool) -> None:
    questions = corpus()
    pool = pool_of(questions)
    for question in questions:
        smaller: set[tuple[str, str]] = set()
        for size, context in zip(sizes, build(question, pool, sizes, tokens=tokens), strict=True):
            actual = count_chat(context.messages) if tokens else len(context.paragraphs)
            assert 0.98 * size <= actual <= size if tokens else actual == size
            assert [context.paragraphs[i] for i in context.gold_positions] == gold_of(question)  # in order
            titles = [paragraph.title for paragraph in context.paragraphs]
            assert len(set(titles)) == len(titles)
            others = {(p.title, p.text) for p in context.paragraphs if not p.is_supporting}
            assert len(others) == len(context.paragraphs) - 2
            assert not any(re.search(rf"(answer|alias){question.id[1:]}x", text, re.I) for _, text in others)
            assert smaller <= others
            smaller = others
            of_question = {(p.title, p.text) for p in question.paragraphs if not p.is_supporting}
            if not tokens:  # the question's distractors come first
                assert len(others & of_question) == min(len(of_question), size - 2)


def test_the_messages_hold_the_documents_in_order() -> None:
    question, *rest = corpus(8)
    (context,) = build(question, pool_of([question, *rest]), [9], tokens=False)
    expected = "\n\n".join(f"{n} {p.title} : {p.text}" for n, p in enumerate(context.paragraphs, 1))
    assert context.messages == [{"role": "user", "content": f"{expected} ? {question.question}"}]


def test_forbidden_distractors_are_never_taken() -> None:
    gold = Paragraph("The Gold", "The capital of it is Old-Town!", True)
    first_hop = Paragraph("Hop", "A country has a capital.", True)
    forbidden = [
        Paragraph("gold", "another text under the title of the gold paragraph"),
        Paragraph("Copy", "A country has a capital."),
        Paragraph("Answer", "once it was called oldtown, by everyone"),
        Paragraph("An old town", "its title holds an alias"),
    ]
    fine = [
        Paragraph("Fine", "nothing"),
        Paragraph("fine", "the same title, other case"),
        Paragraph("Good", "also nothing"),
    ]
    question = Question("q", "?", "Old-Town", ("Old Town", "the"), (first_hop, gold, *forbidden[:2]))
    pool = DistractorPool.of([*forbidden, *fine], FORMAT)
    for seed in range(20):
        (context,) = build(question, pool, [4], seed=seed, tokens=False)
        assert {p.title.lower() for p in context.paragraphs} == {"hop", "the gold", "fine", "good"}
    with pytest.raises(CannotBuild, match="too few distractors for 5 documents"):
        build(question, pool, [5], tokens=False)


def test_contexts_do_not_depend_on_the_order_of_the_input() -> None:
    questions = corpus()
    pools = [pool_of(questions), pool_of(questions[::-1])]
    for question in questions[::7]:
        one, other = (build(question, pool, [200, 900]) for pool in pools)
        assert one == other
    # The short context does not depend on the long size; with another seed it is another context.
    assert build(questions[0], pools[0], [200, 600])[0] == build(questions[0], pools[0], [200])[0]
    assert build(questions[0], pools[0], [200], seed=2) != build(questions[0], pools[0], [200], seed=3)


def test_equal_sizes_have_the_same_context() -> None:
    questions = corpus()
    for tokens, size in ((True, 300), (False, 7)):
        short, long = build(questions[0], pool_of(questions), [size, size], tokens=tokens)
        assert short == long


def test_gold_depth_is_uniform() -> None:
    """Chi-squared over the positions of the gold paragraphs in 10 documents (9 degrees of freedom, p = 0.001)."""
    questions = corpus()
    pool = pool_of(questions)
    seen: Counter[int] = Counter()
    for seed in range(25):
        for question in questions:
            seen.update(build(question, pool, [10], seed=seed, tokens=False)[0].gold_positions)
    expected = seen.total() / 10
    assert sum((seen[i] - expected) ** 2 / expected for i in range(10)) < 27.9


def test_the_reason_is_named_where_no_context_can_be_built() -> None:
    questions = corpus(3)
    pool = pool_of(questions)
    for sizes, tokens, reason in (
        ([20, 100], True, "gold paragraphs alone are longer than 20 tokens"),
        ([200, 5000], True, "too few distractors for 5000 tokens"),
        ([1, 5], False, "more gold paragraphs than the 1 documents"),
    ):
        with pytest.raises(CannotBuild, match=reason):
            build(questions[0], pool, sizes, tokens=tokens)
    same_length = [Paragraph(f"t{i}", "x " * 57) for i in range(50)]  # 60 words each: 2 % of 140 is never hit
    question = Question("q", "?", "yes", (), (Paragraph("g", "yes " * 10, True),))
    with pytest.raises(CannotBuild, match="no choice of distractors comes within 2%"):
        build(question, DistractorPool.of(same_length, FORMAT, count_words), [120])


@pytest.mark.parametrize("how", [{}, {"gold_depth": 0.5}, {"drop_gold_fraction": 0.5}])
def test_spans_are_the_documents_as_written(how: dict[str, float]) -> None:
    questions = corpus(20)
    prompt_format = PromptFormat(
        document_template="<{number}> {title}\n{text}", prompt_template="Of {question}:\n{documents}\n{question}?"
    )
    pool = pool_of(questions)
    for question in questions[::5]:
        for context in build_contexts(question, pool, [3, 9], prompt_format=prompt_format, seed=0, **how):
            content = context.messages[-1]["content"]
            assert len(context.spans) == len(context.paragraphs)
            for number, (start, end, gold) in enumerate(context.spans, 1):
                title, text = content[start:end].split("\n")
                assert title.startswith(f"<{number}> ")
                written = Paragraph(title.removeprefix(f"<{number}> "), text, gold)
                assert gold == (written in gold_of(question)) and (gold or written in paragraphs_of(questions))
            between = [content[a[1] : b[0]] for a, b in zip(context.spans, context.spans[1:], strict=False)]
            assert set(between) == {"\n\n"}
            assert content[context.spans[-1][1] :] == f"\n{question.question}?"


def paragraphs_of(questions: Sequence[Question]) -> set[Paragraph]:
    return {Paragraph(p.title, p.text) for question in questions for p in question.paragraphs}


@pytest.mark.parametrize("tokens", [True, False])
def test_a_chosen_depth(tokens: bool) -> None:
    questions = corpus(20)
    pool = pool_of(questions)
    for depth in (0.0, 0.25, 1.0):
        for context in build(questions[3], pool, [200, 700] if tokens else [4, 12], tokens=tokens, gold_depth=depth):
            first, second = context.gold_positions
            assert second == first + 1 and first == round(depth * (len(context.paragraphs) - 2))


@pytest.mark.parametrize("tokens", [True, False])
def test_imperfect_compression_drops_gold_from_the_short_context_alone(tokens: bool) -> None:
    questions = corpus()
    pool = pool_of(questions)
    kept, firsts = Counter(), set()
    for question in questions:
        sizes = [200, 700] if tokens else [4, 12]
        short, long = build(question, pool, sizes, tokens=tokens, drop_gold_fraction=0.25)
        assert [p for p in long.paragraphs if p.is_supporting] == gold_of(question)
        here = [p for p in short.paragraphs if p.is_supporting]
        assert here and set(here) <= set(gold_of(question))
        kept[len(here)] += 1
        firsts.add(gold_of(question).index(here[0]))
        # What was dropped does not come back as a distractor, and the long context holds the short one's.
        others = {(p.title, p.text) for p in short.paragraphs if not p.is_supporting}
        assert not others & {(p.title, p.text) for p in gold_of(question)}
        assert others <= {(p.title, p.text) for p in long.paragraphs}
        if tokens:
            for size, context in zip(sizes, (short, long), strict=True):
                assert 0.98 * size <= count_chat(context.messages) <= size
    # A quarter of 2 paragraphs is half a paragraph: one of them in half of the questions (60, p = 0.001).
    assert 17 <= kept[1] <= 43 and kept[1] + kept[2] == len(questions)
    assert firsts == {0, 1}  # either may go
    # However much is dropped, one paragraph stays.
    assert len(build(questions[0], pool, [4], tokens=False, drop_gold_fraction=0.99)[0].gold_positions) == 1


def test_short_answers_count_as_words_and_yes_and_no_not_at_all() -> None:
    us, five, year = golds(["us", "5", "1960"])
    assert mentions("us army of 5", us) and mentions("us army of 5", five) and mentions("in 1960s", year)
    assert not mentions("a status of 15", us) and not mentions("a status of 15", five)
    band = Question("q", "?", "The The", (), (Paragraph("g", "The The played", True),))
    names = [Paragraph("t", "so the  THE came"), *(Paragraph(f"t{i}", f"the theatre {i}") for i in range(3))]
    (context,) = build(band, DistractorPool.of(names, FORMAT), [4], tokens=False)
    assert {p.title for p in context.paragraphs} == {"g", "t0", "t1", "t2"}
    documents = [Paragraph(f"t{i}", f"it is yes or no {i}") for i in range(5)]
    question = Question("q", "?", "Yes", ("no",), (Paragraph("g", "gold", True),))
    assert len(build(question, DistractorPool.of(documents, FORMAT), [6], tokens=False)[0].paragraphs) == 6


def test_a_pool_on_disk_is_the_pool_in_memory(tmp_path: Path) -> None:
    questions = corpus(20)
    paragraphs = [Paragraph("Zoë \u2028", 'line\nbreak "quoted"'), *(p for q in questions for p in q.paragraphs)]
    writer = open_writer(tmp_path)
    for paragraph in [*reversed(paragraphs), *paragraphs]:  # twice, in another order
        writer.add(paragraph)
    assert write_pool(tmp_path, writer, FORMAT, count_words) == len(paragraphs)
    here, there = DistractorPool.open(tmp_path, FORMAT), DistractorPool.of(paragraphs, FORMAT, count_words)
    assert [here[i] for i in range(len(here))] == [there[i] for i in range(len(there))]
    assert {here[i].paragraph for i in range(len(here))} == {Paragraph(p.title, p.text) for p in paragraphs}
    for candidate in here.candidates_for(paragraphs):
        text = FORMAT.document(candidate.paragraph, 10) + FORMAT.document_separator
        assert candidate.tokens == len(text.split())
    lengths = [here[row].tokens for row in here.of_length(20, 30)]
    assert lengths == sorted(t for t in (here[i].tokens for i in range(len(here))) if 20 <= t <= 30) and lengths
    stranger = Paragraph("not", "in the pool")
    assert [c.tokens for c in there.candidates_for([stranger])] == [len(f"10 not : {stranger.text}".split())]


def test_memory_of_a_paragraph_does_not_grow_with_its_text(tmp_path: Path) -> None:
    with (tmp_path / "texts").open("w+b") as file:
        writer = PoolWriter(file)
        for index in range(50):
            writer.add(Paragraph(str(index), "x" * 10_000))
        rows = writer.index(FORMAT, None)
        assert rows.nbytes == 24 * 50 and file.seek(0, 2) > 500_000


def test_an_impossible_question_reads_little_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    whole = DistractorPool.__getitem__
    monkeypatch.setattr(DistractorPool, "__getitem__", lambda pool, row: reads.append(row) or whole(pool, row))
    question = Question("q", "?", "yes sir", (), (Paragraph("g", "gold " * 100, True),))
    here = count_chat(FORMAT.messages("?", question.paragraphs))
    pool = DistractorPool.of([Paragraph(f"t{i}", "x " * (40 + i % 20)) for i in range(1000)], FORMAT, count_words)
    with pytest.raises(CannotBuild, match="no choice of distractors"):  # the gap is shorter than any paragraph
        build(question, pool, [here + 20])
    assert len(reads) < 20
    monkeypatch.setattr(selection, "_MOST_READ", 50)
    pool = DistractorPool.of([Paragraph(f"t{i}", "x yes sir " * 9) for i in range(1000)], FORMAT, count_words)
    for size, tokens in ((600, True), (here + 30, True), (9, False)):  # the answer is in every paragraph
        reads.clear()
        with pytest.raises(CannotBuild) as reason:
            build(question, pool, [size], tokens=tokens)
        assert 0 < len(reads) < 60
        # Near the end of a context only paragraphs of the right length are looked at.
        assert ("among the 50 paragraphs looked at" in str(reason.value)) == (size != here + 30)


def test_values_with_braces_are_not_templates() -> None:
    paragraphs = [Paragraph("{question}", "{number} {documents}")]
    content = FORMAT.messages("{documents}", paragraphs)[0]["content"]
    assert content == "1 {question} : {number} {documents} ? {documents}"


@pytest.mark.parametrize(
    ("fields", "flag", "placeholder"),
    [
        ({"document_template": "{title}"}, "--document-template: ", "{text}"),
        ({"prompt_template": "{documents}"}, "--prompt-template: ", "{question}"),
        ({"prompt_template": "{documents} {question} {documents}"}, "--prompt-template: ", "{documents}"),
    ],
)
def test_a_template_without_its_placeholder_is_refused(fields: dict[str, str], flag: str, placeholder: str) -> None:
    with refused("template-placeholder", flag, placeholder):
        PromptFormat(**fields)


def test_real_musique_at_1k_and_8k(solopo_data: Path) -> None:
    """Ten questions with the Qwen2 tokenizer: within 2 %, gold complete, no answer among the distractors."""
    template = Path(__file__).parents[2] / "examples" / "chat_templates" / "chatml.jinja"
    tokenizer = load_tokenizer(solopo_data / "tokenizers" / "qwen2", template)
    path = solopo_data / "musique" / "musique_ans_train_subset.jsonl"
    questions = list(read_questions("musique", [path], LeftOut()))[:120]
    prompt_format = PromptFormat()

    counter = TokenCounter(tokenizer)
    pool = DistractorPool.of((p for q in questions for p in q.paragraphs), prompt_format, counter.texts)
    failed = 0
    for question in questions[::12]:
        try:
            contexts = build_contexts(
                question,
                pool,
                [1024, 8192],
                prompt_format=prompt_format,
                seed=0,
                count_tokens=counter.chat,
            )
        except CannotBuild:
            failed += 1
            continue
        for size, context in zip((1024, 8192), contexts, strict=True):
            ids = tokenizer.apply_chat_template(context.messages, add_generation_prompt=True, return_dict=False)
            assert len(ids) == context.tokens == len(prompt_ids(tokenizer, context.messages))
            assert 0.98 * size <= len(ids) <= size
            content = context.messages[-1]["content"]
            assert all(gold.text in content for gold in gold_of(question))
            kept = [p for p in context.paragraphs if not p.is_supporting]
            for answer in question.answers:
                edge = r"\b" if len(answer) <= 3 else ""  # "hi" is part of nearly every document's words
                words = r"\W*".join(re.escape(word) for word in re.findall(r"\w+", answer))
                pattern = re.compile(f"{edge}{words}{edge}", re.I)
                assert not any(pattern.search(f"{p.title} {p.text}") for p in kept), (question.id, answer)
            assert not {p.title for p in kept} & {p.title for p in gold_of(question)}
    assert failed <= 1
