"""Reading question sets: what is yielded, what is left out and counted, and the place of every mistake."""

from __future__ import annotations

import itertools
import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from word_tokenizer import save_word_tokenizer

from megatron_solopo.data.building import prepare_data, sources
from megatron_solopo.data.building.contexts import read_contexts
from megatron_solopo.data.building.sources import LeftOut, read_pool, read_questions
from megatron_solopo.data.files import inputs
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.schema import Paragraph, Question, read_groups

MUSIQUE = {
    "id": "2hop__1",
    "question": "Who?",
    "answer": "Ada",
    "answer_aliases": ["Ada L."],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "T", "paragraph_text": "Ada was first.", "is_supporting": True},
        {"idx": 1, "title": "U", "paragraph_text": "Rain fell.", "is_supporting": False},
    ],
}
HOTPOT = {
    "_id": "5a7",
    "question": "Who?",
    "answer": "Ada",
    "supporting_facts": [["T", 0], ["T", 1]],
    "context": [["T", ["Ada was", " first."]], ["U", ["Rain fell."]]],
}
JSONL = {
    "id": "j1",
    "question": "Who?",
    "answers": ["Ada", "Ada L."],
    "documents": [{"title": "T", "text": "Ada was first.", "is_supporting": True}, "Rain fell."],
}
GOLD = [Paragraph("T", "Ada was first.", True)]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(source: str, *inputs: Any, **how: Any) -> list[Question]:
    return list(read_questions(source, inputs, LeftOut(), **how))


def musique(**fields: Any) -> dict:
    return {**MUSIQUE, **fields}


def paragraph(**fields: Any) -> dict:
    return musique(paragraphs=[MUSIQUE["paragraphs"][0], {**MUSIQUE["paragraphs"][1], **fields}])


def without(key: str, record: dict = MUSIQUE) -> dict:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("source", "record", "second"),
    [
        ("musique", MUSIQUE, Paragraph("U", "Rain fell.")),
        ("hotpotqa", HOTPOT, Paragraph("U", "Rain fell.")),
        ("2wiki", {**HOTPOT, "context": json.dumps(HOTPOT["context"])}, Paragraph("U", "Rain fell.")),
        (
            "hotpotqa",  # as the hub has it
            {
                **without("_id", HOTPOT),
                "id": "5a7",
                "context": {"title": ["T", "U"], "sentences": [["Ada was", "first."], ["Rain fell."]]},
                "supporting_facts": {"title": ["T"], "sent_id": [0]},
            },
            Paragraph("U", "Rain fell."),
        ),
        ("jsonl", JSONL, Paragraph("", "Rain fell.")),
    ],
)
def test_fields_of_every_source_are_read(tmp_path: Path, source: str, record: dict, second: Paragraph) -> None:
    left_out = LeftOut()
    (question,) = read_questions(source, [write(tmp_path / "q.jsonl", record)], left_out)
    assert question.id == (record.get("id") or record["_id"]) and question.question == "Who?"
    assert question.answers == (("Ada",) if source in ("hotpotqa", "2wiki") else ("Ada", "Ada L."))
    assert list(question.paragraphs) == [*GOLD, second]
    assert not left_out.counts


def test_a_record_without_id_gets_a_stable_one(tmp_path: Path) -> None:
    record = without("id", JSONL)
    (one,) = read("jsonl", write(tmp_path / "a.jsonl", record))
    (_, other) = read("jsonl", write(tmp_path / "b.jsonl", {**record, "question": "Which?"}, record))
    assert one.id == other.id


def test_documents_without_labels(tmp_path: Path) -> None:
    record = {**JSONL, "documents": ["Ada was first.", {"text": "Rain fell."}]}
    path = write(tmp_path / "q.jsonl", record)
    (question,) = read("jsonl", path, labelled=False)
    assert not any(p.is_supporting for p in question.paragraphs)
    with refused("evidence-missing", "q.jsonl:1: ", "'is_supporting'", "--evidence bm25"):
        read("jsonl", path)
    plain = musique(paragraphs=[{"title": "T", "paragraph_text": "Ada was first."}])
    assert len(read("musique", write(tmp_path / "m.jsonl", plain), labelled=False)) == 1


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path: Path) -> None:
    left_out = LeftOut()
    nothing_gold = musique(id="c", paragraphs=MUSIQUE["paragraphs"][1:])
    path = write(
        tmp_path / "q.jsonl", musique(id="a", answerable=False), musique(id="b", answer="\u200b"), nothing_gold,
        musique(id="d"), MUSIQUE,
    )  # fmt: skip
    questions = read_questions("musique", [path], left_out, exclude={"d", "stranger"})
    assert [question.id for question in questions] == ["2hop__1"]
    assert dict(left_out.entries) == {
        "a": "not answerable from its paragraphs",
        "b": "the answer has no visible character, so no response can be scored",
        "c": "no document is marked as supporting",
        "d": "listed in --exclude-ids",
    }
    assert sorted(left_out.counts.values()) == [1, 1, 1, 1]
    other = {**HOTPOT, "supporting_facts": [["V", 0]]}
    assert not list(read_questions("hotpotqa", [write(tmp_path / "h.jsonl", other)], left_out))
    assert left_out.entries[-1] == ("5a7", "1 titles of supporting_facts are not among the documents")


WRONG = [
    ("musique", without("id"), "field-missing", "'id'"),
    ("musique", without("answer"), "field-missing", "'answer'", "(fields found: answer_aliases, answerable"),
    ("musique", musique(question="  "), "field-empty", "'question'"),
    ("musique", musique(answer=7), "field-type", "'answer'", "str"),
    ("musique", musique(answer_aliases="Ada"), "field-type", "'answer_aliases'", "list, found str"),
    ("musique", musique(answerable="yes"), "field-type", "'answerable'", "bool"),
    ("musique", musique(paragraphs=[]), "field-empty", "'paragraphs'"),
    ("musique", musique(paragraphs="[]x"), "field-value", "'paragraphs'", "no JSON list"),
    ("musique", musique(paragraphs=["text"]), "field-type", "'paragraphs[0]'", "an object, found str"),
    ("musique", paragraph(is_supporting=None), "evidence-missing", "paragraphs[1]: ", "'is_supporting'"),
    ("musique", paragraph(is_supporting=1), "field-type", "paragraphs[1]: ", "'is_supporting'", "bool"),
    ("musique", paragraph(paragraph_text=""), "field-empty", "paragraphs[1]: ", "'paragraph_text'"),
    ("musique", paragraph(title=None), "field-type", "paragraphs[1]: ", "'title'", "str"),
    ("hotpotqa", without("context", HOTPOT), "field-missing", "'context'"),
    ("hotpotqa", without("supporting_facts", HOTPOT), "field-missing", "'supporting_facts'"),
    ("hotpotqa", {**HOTPOT, "context": [["T"]]}, "field-missing", "'context[0][1]'"),
    ("hotpotqa", {**HOTPOT, "context": [["T", "text"]]}, "field-type", "'context[0][1]'", "list, found str"),
    ("hotpotqa", {**HOTPOT, "context": [["T", [" "]]]}, "field-empty", "'context'"),
    (
        "hotpotqa",
        {**HOTPOT, "context": {"title": ["T"], "sentences": []}},
        "field-value",
        "'context'",
        "different lengths (1, 0)",
    ),
    ("2wiki", {**HOTPOT, "context": {"title": ["T"]}}, "field-value", "'context'", "title and sentences"),
    ("jsonl", without("documents", JSONL), "field-missing", "'documents'"),
    ("jsonl", {**JSONL, "documents": [7]}, "field-type", "'documents[0]'", "a text or an object, found int"),
    ("jsonl", {**JSONL, "documents": [{"title": "T"}]}, "field-missing", "documents[0]: ", "'text'"),
    ("jsonl", {**JSONL, "documents": [{"title": 1, "text": "x"}]}, "field-type", "'title'", "str, found int"),
    ("jsonl", {**JSONL, "answers": []}, "field-empty", "'answers'"),
    ("jsonl", without("answers", JSONL), "field-missing", "'answer'"),
]


def with_good_record(tmp_path: Path, source: str, record: Any) -> Path:
    """A good record of the source, then the record, with other ids."""
    good = {"musique": MUSIQUE, "hotpotqa": HOTPOT, "2wiki": HOTPOT, "jsonl": JSONL}[source]
    key = "id" if "id" in good else "_id"
    if isinstance(record, dict) and key in record:
        record = {**record, key: "second"}
    return write(tmp_path / "q.jsonl", {**good, key: "first"}, record)


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_mistake_names_its_line(tmp_path: Path, case: tuple[Any, ...]) -> None:
    source, record, code, *named = case
    path = with_good_record(tmp_path, source, record)
    with refused(code, f"{path}:2", *named):
        read(source, path)


@pytest.mark.parametrize(
    ("record", "code"), [(musique(question="half \ud83d"), "surrogate-half"), (["list"], "field-type")]
)
def test_a_line_that_is_no_record(tmp_path: Path, record: Any, code: str) -> None:
    path = with_good_record(tmp_path, "musique", record)
    with refused(code, f"{path}:2: "):
        read("musique", path)


def test_ids_are_unique_over_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", MUSIQUE), write(tmp_path / "b.jsonl", MUSIQUE)]
    with refused("id-twice", "'2hop__1'", f"{paths[1]}:1: ", f"{paths[0]}:1;"):
        read("musique", *paths)
    path = write(tmp_path / "q.jsonl", MUSIQUE, musique(question="?"))
    with refused("id-twice", f"{path}:2: ", f"{path}:1;"):
        read("musique", path)


def test_pool(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"title": "A", "text": "Some text."}, {"title": "B", "body": "?"})
    with refused("field-missing", "p.jsonl:2: ", "'text'"):
        list(read_pool([path]))


def test_an_array_is_read_one_object_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps([HOTPOT, {**HOTPOT, "_id": "other"}], indent=1), encoding="utf-8")
    assert [question.id for question in read("hotpotqa", path)] == ["5a7", "other"]
    places = [where for where, _ in read_records([path])]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert places == [f"{path}:{number}" for number, line in enumerate(lines, 1) if line == " {"]
    path.write_text("[]", encoding="utf-8")
    assert not list(read_records([path]))


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ('[{"a": 1},\n{"a" 2}]', 2, "not-json"),
        ('[{"a": 1},\n 7]', 2, "field-type"),
        ('[{"a": 1}\n', 2, "not-json"),
        ('[{"a": 1}]\n\n[]', 3, "not-json"),
    ],
)
def test_a_broken_array_names_its_line(tmp_path: Path, text: str, line: int, code: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text, encoding="utf-8")
    with refused(code, f"{path}:{line}: "):
        list(read_records([path]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_tables_and_folders_go_through_datasets(tmp_path: Path, cache: None) -> None:
    import pandas

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    frame = pandas.DataFrame([MUSIQUE, musique(id="other")])
    frame.to_parquet(folder / "train-00000-of-00001.parquet")
    frame.head(1).to_parquet(folder / "test-00000-of-00001.parquet")
    csv = tmp_path / "pool.csv"
    pandas.DataFrame([{"title": "A", "text": "Some text."}]).to_csv(csv, index=False)
    jsonl = write(tmp_path / "q.jsonl", MUSIQUE, musique(id="other"))
    expected = read("musique", jsonl)
    assert read("musique", folder / "train-00000-of-00001.parquet") == expected
    assert read("musique", tmp_path / "set") == expected == read("musique", f"hub:{tmp_path / 'set'}")
    assert read("musique", f"hub:{tmp_path / 'set'}::test") == expected[:1]
    assert list(read_pool([csv])) == [Paragraph("A", "Some text.")]
    frame.drop(columns="question").to_parquet(tmp_path / "bad.parquet")
    with refused("field-missing", "bad.parquet:row 1: ", "'question'", "(fields found: answer"):
        read("musique", tmp_path / "bad.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for paths, code, named in (
        (f"hub:{tmp_path / 'set'}:default:validation", "dataset-unreadable", "default:validation: "),
        (f"hub:{tmp_path / 'set'}:nowhere:train", "dataset-unreadable", "nowhere"),
        ("hub:a:b:c:d", "dataset-name", "hub:NAME:CONFIG:SPLIT"),
        ("hub:", "dataset-name", "hub:NAME"),
        (tmp_path / "broken.parquet", "not-parquet", "broken.parquet: "),
        (tmp_path / "missing.parquet", "file-missing", "missing.parquet: "),
    ):
        with refused(code, named):
            read("musique", paths)


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of any size, the same records and the same line in an error; and never the whole file in memory."""
    path, bad = tmp_path / "a.json", tmp_path / "bad.json"
    records = [{"id": i, "text": 'Zoë \\ " ]}, ' * i, "of": [1, {"a": None}]} for i in range(9)]
    texts = [json.dumps(one, indent=1, ensure_ascii=False) for one in records]
    path.write_text("\n [" + ",\n\n".join(texts) + "\n]\n", encoding="utf-8")
    lines = itertools.accumulate((text.count("\n") + 2 for text in texts[:-1]), initial=2)
    bad.write_text('[{"a": 1},\n{"a": 2},\n\n{"a": \n}]')
    expected = list(inputs.read_records([path]))
    assert [record for _, record in expected] == records
    assert [where for where, _ in expected] == [f"{path}:{line}" for line in lines]
    for size in 1, 2, 7, 100:
        monkeypatch.setattr(inputs, "_CHUNK", size)
        assert list(inputs.read_records([path])) == expected
        with refused("not-json", f"{bad}:5: ", "column"):
            list(inputs.read_records([bad]))
    monkeypatch.undo()
    path.write_text("[" + ",".join([json.dumps({"text": "x" * 100_000})] * 300) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in inputs.read_records([path])) == 300
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()


TOY = """
from megatron_solopo.data.building.sources._source import Source, make_question
from megatron_solopo.data.schema import Paragraph

def _question(record, question_id, where, labelled):
    return make_question(record, question_id, where, [Paragraph("", t, n == 0) for n, t in enumerate(record["toy"])])

SOURCE = Source("toys", "`question, answer, toy [text]`, the first of them gold", _question, frozenset({"toy"}))
"""


def test_a_source_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With the file, and nothing else, the source is in --help, in hints about mistaken files, and prepares data."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "toy.py").write_text(TOY)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "sources")])
    records = [{"id": f"t{i}", "question": "?", "answer": f"w{i}", "toy": [f"w{i} w9", f"x{i}"]} for i in range(4)]
    path, out = write(tmp_path / "q.jsonl", *records), tmp_path / "contexts.jsonl"
    size = ["--short-documents", "1", "--long-documents", "3", "--output", str(out)]
    tokenizer = ["--tokenizer", str(save_word_tokenizer(tmp_path / "tokenizer"))]
    assert prepare_data.main(["--source", "toys", "--data", str(path), *size, *tokenizer]) == 0
    pairs = list(read_contexts(out))
    assert [(pair.id, pair.source) for pair in pairs] == [(f"t{i}", "toys") for i in range(4)]
    assert all(f"w{i} w9" in pair.short_messages[-1]["content"] for i, pair in enumerate(pairs))
    with refused("field-missing", "these are questions of --source toys"):
        list(read_groups(path))
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    assert "toys: question, answer, toy [text], the first of them gold" in " ".join(capsys.readouterr().out.split())


def test_the_documentation_has_the_forms_of_the_sources() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-contexts.md").read_text(encoding="utf-8")
    assert [f"| `{name}` | {form} |" in text for name, form in sources.forms()] == [True] * 6


MINE = """
from megatron_solopo.data.schema import Paragraph, Question, read_groups

def convert(record):
    if record["q"] == "skip":
        return None
    return {"question": record["q"], "answers": record["gold"], "documents": record["texts"]}

def question_of(record):
    return Question("", record["q"], record["gold"][0], (), (Paragraph("T", record["texts"][0]["text"], True),))

def name(record):
    return record["q"]

there = 7
"""
RAW = {
    "_id": 5,
    "q": "Who?",
    "gold": ["Ada", "A."],
    "texts": [{"text": "Ada was first.", "is_supporting": True}, "Rain"],
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the current folder, another for each test."""
    module = f"mine_{tmp_path.name}".replace("-", "_")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{module}.py").write_text(MINE)
    return module


def test_a_user_function_is_a_source(tmp_path: Path, mine: str) -> None:
    path = write(tmp_path / "q.jsonl", RAW, RAW | {"_id": 6, "q": "skip"}, without("_id", RAW), RAW | {"_id": "x"})
    left_out = LeftOut()
    one, two, three = read_questions(f"{mine}:convert", [path], left_out, exclude={"none"})
    assert (one.id, one.answers, one.paragraphs) == (
        "5",
        ("Ada", "A."),
        (Paragraph("", "Ada was first.", True), Paragraph("", "Rain")),
    )
    assert len(two.id) == 16 and two.answers == one.answers and three.id == "x"  # an id derived from the content
    assert left_out.entries == [("6", f"{mine}:convert returned None")]
    assert [q.id for q in read(f"{mine}:convert", path, exclude={"5", "x"})] == [two.id]
    (question,) = read(f"{mine}:question_of", write(tmp_path / "m.jsonl", RAW))
    assert question == Question("5", "Who?", "Ada", (), (Paragraph("T", "Ada was first.", True),))


@pytest.mark.parametrize(
    ("function", "record", "code", "named"),
    [
        ("convert", {"gold": 1}, "function-raises", "q.jsonl:2: --source {name}: raised KeyError: 'q'"),
        ("convert", RAW | {"gold": []}, "field-empty", "q.jsonl:2, from {name}: the field 'answers'"),
        ("convert", RAW | {"texts": [7]}, "field-type", "q.jsonl:2, from {name}: the field 'documents[0]'"),
        ("convert", RAW | {"texts": ["Ada"]}, "evidence-missing", "q.jsonl:2, from {name}: "),
        ("convert", RAW, "id-twice", "q.jsonl:2: the id '5'"),
        ("name", RAW, "function-result", "q.jsonl:1: --source {name}: returned 'Who?'"),
        ("nothing", RAW, "function-missing", "--source {name}: nothing "),
        ("there", RAW, "function-missing", "--source {name}: there "),
    ],
)
def test_a_mistake_of_a_users_function_names_it(
    tmp_path: Path, mine: str, function: str, record: Any, code: str, named: str
) -> None:
    name = f"{mine}:{function}"
    with refused(code, named.format(name=name)):
        read(name, write(tmp_path / "q.jsonl", RAW, record))


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [
        ("musiqe", "option-value", "2wiki, hotpotqa, jsonl, musique, "),
        ("trl", "option-value", "--train-data FILE --context-mode short"),
        ("nowhere:f", "module-import", "nowhere "),
        (":f", "option-value", "2wiki, hotpotqa, jsonl, musique, "),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, name: str, code: str, named: str) -> None:
    with refused(code, f"--source {name}: ", named):
        read(name, write(tmp_path / "q.jsonl", MUSIQUE))


def test_unfinished_work_of_another_function_is_refused(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit of the function's file in the middle: what the first pass read is no longer what would be read."""

    build_all = prepare_data.build_all

    def killed(*args: Any, **settings: Any) -> Iterator[Any]:
        yield next(build_all(*args, **settings))
        raise KeyboardInterrupt

    path = write(tmp_path / "q.jsonl", *(RAW | {"_id": i} for i in range(20)))
    command = ["--source", f"{mine}:convert", "--data", str(path), "--short-documents", "1", "--long-documents", "1"]
    command += ["--tokenizer", str(save_word_tokenizer(tmp_path / "tokenizer")), "--output", str(tmp_path / "c.jsonl")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "build_all", killed)
        prepare_data.main(command)
    Path(f"{mine}.py").write_text(MINE + "\n# another\n")
    with refused("unfinished-other-settings", "source_code"):
        prepare_data.main(command)
    Path(f"{mine}.py").write_text(MINE)
    assert prepare_data.main(command) == 0


@pytest.mark.parametrize(
    ("source", "file", "count"),
    [
        ("musique", "musique/musique_ans_train_subset.jsonl", 310),
        ("hotpotqa", "hotpotqa/hotpot_train_distractor_subset.jsonl", 200),
        ("2wiki", "2wikimultihopqa/2wiki_train_subset.jsonl", 500),
    ],
)
def test_real_data_sets_are_read(solopo_data: Path, source: str, file: str, count: int) -> None:
    left_out = LeftOut()
    questions = list(read_questions(source, [solopo_data / file], left_out))
    assert len(questions) == count and not left_out.counts
    assert all(2 <= sum(p.is_supporting for p in question.paragraphs) <= 4 for question in questions)
    # The evidence states most facts (comparisons are answered by yes, no or a judgement).
    stated = sum(
        any(answer.lower() in f"{p.title} {p.text}".lower() for p in question.paragraphs if p.is_supporting)
        for question in questions
        for answer in [question.answer]
    )
    assert stated >= 0.85 * count
