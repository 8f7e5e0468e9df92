"""The same records from every form of an input: lines, arrays, CSV cells as texts, folders; and lists of ids."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from tiny_models import preference_groups, write_model
from word_tokenizer import save_word_tokenizer

from megatron_solopo.data.building.contexts import read_contexts
from megatron_solopo.data.building.prepare_data import main
from megatron_solopo.data.building.sources import LeftOut, read_questions
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.tokenized import tokenize_data
from megatron_solopo.data.tokenized.token_store import DATA, is_store

DOCUMENTS = [
    {"title": "T", "text": "In 2001 it was called None, by 1987 others", "is_supporting": True},
    {"text": "Rain fell", "day": "2001-02-03"},
]


def questions(**fields: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"00{i}", "question": f"Which {i}?", "answer": answer, "documents": DOCUMENTS, **fields}
        for i, answer in enumerate(("1987", "None", "2001"))
    ]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def cells(path: Path, records: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, records[0].keys())
        out.writeheader()
        out.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for record in records)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_cell_of_a_csv_file_is_its_text(tmp_path: Path, cache: None) -> None:
    expected = list(read_questions("jsonl", [lines(tmp_path / "q.jsonl", questions())], LeftOut()))
    table = cells(tmp_path / "q.csv", questions())
    assert list(read_questions("jsonl", [table], LeftOut())) == expected
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert [question.id for question in read_questions("jsonl", [table], LeftOut())] == ["000", "001", "002"]
    musique = {"paragraphs": [{"title": "T", "paragraph_text": "x", "is_supporting": True}], "answer_aliases": ""}
    table = cells(tmp_path / "m.csv", [{"id": str(i), "question": "?", "answer": "x", **musique} for i in (1, 2)])
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0] + ",answerable", rows[1] + ",True", rows[2] + ",False"]))
    left = LeftOut()
    assert [question.id for question in read_questions("musique", [table], left)] == ["1"]
    assert left.entries == [("2", "not answerable from its paragraphs")]


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ('a,b\n1,"two\nlines"\n1,2,3\n', "not-csv", ":4: 3 cells"),
        ('a,b\n1,"two"x\n', "not-csv", ":2: "),
        ('a,b\n1,"two\n', "not-csv", ":2: "),
        ("a,a\n1,2\n", "column-twice", ":1: "),
        ("a,b\n1,\xe9\n", "not-utf8", ": "),
    ],
)
def test_a_broken_csv_file_names_its_line(tmp_path: Path, text: str, code: str, named: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    with refused(code, f"{path}{named}"):
        list(read_records([path]))


def test_rows_of_a_csv_file_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"two\nlines"\n\n,2\n' + f"{'x' * 200_000},\n")
    (one, two, three) = read_records([path])
    assert one == (f"{path}:2", {"a": "1", "b": "two\nlines"})
    assert two[1] == {"b": "2"} and three == (f"{path}:6", {"a": "x" * 200_000})


def test_a_folder_is_read_as_its_files_are(tmp_path: Path, cache: None) -> None:
    """Dates stay texts, an absent field stays absent, and the line is named."""
    records = questions()
    records[1]["answer_aliases"] = ["nothing"]
    records[2]["more"] = "2001-02-03T00:00:00"
    first, second = (
        lines(tmp_path / "set/data/train-0.jsonl", records[:2]),
        lines(tmp_path / "set/data/train-1.jsonl", records[2:]),
    )
    lines(tmp_path / "set/data/test.jsonl", questions(answer="x"))
    (tmp_path / "set/README.md").write_text("# no data\n")
    assert list(read_records([tmp_path / "set"])) == list(read_records([first, second]))
    (tmp_path / "other").mkdir()
    table = cells(tmp_path / "other/a.csv", questions())
    assert list(read_records([tmp_path / "other"])) == list(read_records([table]))
    lines(tmp_path / "tests/test.jsonl", records)
    with refused("split-missing", "tests: ", "split train", "only test;", f"hub:{tmp_path / 'tests'}::SPLIT"):
        list(read_records([tmp_path / "tests"]))
    (tmp_path / "none").mkdir()
    with refused("dataset-unreadable", f"{tmp_path / 'none'}: "):
        list(read_records([tmp_path / "none"]))


def test_a_null_is_an_absent_field(tmp_path: Path, cache: None) -> None:
    lines(tmp_path / "set/train.jsonl", [{"id": "a", "answer": "x"}, {"id": "b"}])
    assert [record for _, record in read_records([f"hub:{tmp_path / 'set'}"])] == [
        {"id": "a", "answer": "x"},
        {"id": "b"},
    ]


def test_ids_are_unique_among_what_is_used(tmp_path: Path) -> None:
    """MuSiQue-Full has every question twice under its id; only one of them has the paragraphs that answer it."""
    paragraphs = [{"title": "T", "paragraph_text": "x", "is_supporting": True}]
    record = {"id": "2hop__1", "question": "?", "answer": "x", "paragraphs": paragraphs, "answerable": True}
    twin = {**record, "answerable": False, "paragraphs": [{**paragraphs[0], "is_supporting": False}]}
    for order in ([record, twin], [twin, record]):
        left = LeftOut()
        path = lines(tmp_path / "q.jsonl", order)
        assert [question.id for question in read_questions("musique", [path], left)] == ["2hop__1"]
        assert left.entries == [("2hop__1", "not answerable from its paragraphs")]
    with refused("id-twice", f"{path}:3: ", "'2hop__1'", f"{path}:1;"):
        list(read_questions("musique", [lines(path, [record, twin, record])], LeftOut()))


@pytest.mark.parametrize("form", ["array.json", "indented.json", "lines.jsonl", "rows.csv", "rows.parquet", "ids.txt"])
def test_every_form_of_a_list_of_ids(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = questions()
    records[0]["answer"] = "\u200b"  # cannot be scored, and is listed all the same
    source, ids = lines(tmp_path / "q.jsonl", records), tmp_path / form
    excluded = [{"_id" if form == "array.json" else "id": record["id"]} for record in records[:2]] + [
        {"id": "stranger"}
    ]
    if form.endswith(".json"):
        ids.write_text(json.dumps(excluded, indent=1 if form == "indented.json" else None))
    elif form == "rows.parquet":
        import pandas

        pandas.DataFrame(excluded).to_parquet(ids)
    elif form == "rows.csv":
        cells(ids, excluded)
    elif form == "lines.jsonl":
        lines(ids, excluded)
    else:
        ids.write_text("\n".join(record["id"] for record in excluded))
    argv = [
        "--source",
        "jsonl",
        "--data",
        str(source),
        "--output",
        str(tmp_path / "c.jsonl"),
        "--exclude-ids",
        str(ids),
    ]
    argv += ["--tokenizer", str(save_word_tokenizer(tmp_path / "model")), "--short-documents", "1"]
    main([*argv, "--long-documents", "1", "--skipped-output", str(tmp_path / "left.jsonl")])
    assert [pair.id for pair in read_contexts(tmp_path / "c.jsonl")] == ["002"]
    left = [json.loads(line) for line in (tmp_path / "left.jsonl").read_text().splitlines()]
    assert left == [{"id": record["id"], "reason": "listed in --exclude-ids"} for record in records[:2]]
    assert "ids to exclude: 2 of 3 are in the input" in capsys.readouterr().out


def test_a_list_that_is_no_list_of_ids(tmp_path: Path) -> None:
    argv = ["--source", "jsonl", "--data", str(lines(tmp_path / "q.jsonl", questions())), "--short-documents", "1"]
    argv += ["--long-documents", "1", "--output", str(tmp_path / "c.jsonl"), "--tokenizer", "model", "--exclude-ids"]
    for name, text, code, named in (
        ("a.json", '["000", "001"]', "field-type", ("a.json:1: ", "str")),
        ("a.txt", '[{"id": "000"}]', "field-type", ("a.txt:1: ", "list")),
        ("a.csv", "000\n001\n", "field-missing", ("--exclude-ids ", "a.csv:2: ", "'id'")),
    ):
        (tmp_path / name).write_text(text)
        with refused(code, *named):
            main([*argv, str(tmp_path / name)])


def test_nothing_beyond_the_limit_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole input is read for the pool; a question that was not wanted is not listed."""
    records = questions()
    unusable = [{**records[0], "id": name, "answer": "\u200b"} for name in ("before", "between", "after")]
    order = [unusable[0], records[0], unusable[1], records[1], unusable[2], records[2]]
    argv = ["--source", "jsonl", "--data", str(lines(tmp_path / "q.jsonl", order)), "--limit", "2"]
    argv += ["--tokenizer", str(save_word_tokenizer(tmp_path / "model")), "--output", str(tmp_path / "c.jsonl")]
    (tmp_path / "ids").write_text("after\n002\n")
    argv += ["--exclude-ids", str(tmp_path / "ids"), "--skipped-output", str(tmp_path / "left.jsonl")]
    main([*argv, "--short-documents", "1", "--long-documents", "1"])
    left = [json.loads(line)["id"] for line in (tmp_path / "left.jsonl").read_text().splitlines()]
    assert left == ["before", "between"]
    printed = capsys.readouterr().out
    assert "questions kept: 2, left out: 2" in printed and "ids to exclude: 2 of 2 are in the input" in printed


def saved(folder: Path, records: list[dict[str, Any]]) -> dict[str, Path]:
    """The records in every form of a folder of data, and in a file."""
    import datasets

    table = datasets.Dataset.from_list(records)
    (folder / "parquet").mkdir()
    for place in range(2):
        table.shard(2, place, contiguous=True).to_parquet(folder / "parquet" / f"train-{place:05d}-of-00002.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "splits")
    return {name: folder / name for name in ("parquet", "saved", "splits")} | {
        "file": lines(folder / "g.jsonl", records)
    }


def test_a_folder_of_data_is_training_data(tmp_path: Path, cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    """In Parquet files or as save_to_disk wrote them: for training, tokenize-data and inspect-data."""
    write_model(tmp_path / "hf")
    forms = saved(tmp_path, preference_groups(6))
    expected = list(read_groups(forms["file"]))
    for name, path in forms.items():
        assert not is_store(path) and list(read_groups(path)) == expected
        command = ["--train-data", str(path), "--tokenizer", str(tmp_path / "hf"), "--workers", "1"]
        assert tokenize_data.main([*command, "--output", str(tmp_path / f"tokens-{name}")]) == 0
        assert inspect_data.main(["--data", str(path), "--tokenizer", str(tmp_path / "hf")]) == 0
    tokens = {(tmp_path / f"tokens-{name}" / DATA).read_bytes() for name in forms}
    assert len(tokens) == 1 and is_store(tmp_path / "tokens-file")
    assert [group.id for group in read_groups(f"hub:{forms['splits']}::test")] == ["g0"]
    with refused("split-missing", "splits::dev: ", "split dev", "only train, test;", f"hub:{forms['splits']}::SPLIT"):
        list(read_groups(f"hub:{forms['splits']}::dev"))
    with refused("split-missing", "saved::test: ", "split test", "only train;", "::SPLIT"):
        list(read_groups(f"hub:{forms['saved']}::test"))


def test_a_folder_without_data_is_one_of_token_ids(tmp_path: Path) -> None:
    """What is left of one, too: its reader names what is missing."""
    for names in (
        ("whole/manifest.json", "whole/ids.jsonl"),
        ("half/tokens.bin", "half/ids.jsonl"),
        ("x.partial/s.json",),
    ):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        assert is_store((tmp_path / names[0]).parent), names
    (tmp_path / "empty").mkdir()
    assert is_store(tmp_path / "empty") and not is_store(lines(tmp_path / "q.jsonl", []))
