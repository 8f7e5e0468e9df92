"""Groups in Parquet: what was written comes back, in pieces, and a wrong file or row is one line."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from megatron_solopo.data.files import parquet
from megatron_solopo.data.files.records import read_records, scan, write_jsonl, write_records
from megatron_solopo.data.schema import PreferenceGroup, read_conversations, read_groups

CHAT = [{"role": "user", "content": "q"}]
ROW = {"id": "g", "short_messages": CHAT, "chosen": "a", "rejected": "b"}


def draw_group(number):
    draw = random.Random(number)

    def text():
        return "".join(draw.choices('ab 東\n"\\\u2028é', k=draw.randint(1, 30))) + str(draw.random())

    content = text()
    cuts = sorted(draw.sample(range(len(content) + 1), 4))
    spans = [(cuts[0], cuts[1], True), (cuts[2], cuts[3], False)]
    chat = [{"role": "system", "content": text()}, {"role": "user", "content": content}]
    return PreferenceGroup(
        id=f"g{number}",
        short_messages=chat,
        long_messages=draw.choice([None, chat]),
        chosen=text(),
        rejected=text(),
        answers=[text() for _ in range(draw.randint(0, 3))],
        scores={name: draw.random() for name in draw.sample(["chosen", "rejected", "x"], draw.randint(0, 3))},
        source=draw.choice(["", text()]),
        question=draw.choice(["", text()]),
        short_spans=draw.choice([[], spans]),
        long_spans=[],
        chosen_ids=draw.choice([None, [draw.randint(0, 2**31 - 1)]]),
        rejected_ids=draw.choice([None, [1, 2, 3]]),
    )


def test_groups_come_back_from_either_file(tmp_path):
    groups = [draw_group(number) for number in range(150)]
    for name in ("a.parquet", "a.jsonl"):
        assert write_records(tmp_path / name, iter(groups)) == 150
        assert list(read_groups(tmp_path / name)) == groups
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_the_parts_are_the_whole(name, tmp_path, monkeypatch):
    """Each with the places of its records in the file."""
    monkeypatch.setattr("megatron_solopo.data.files.records.PART_BYTES", 2000)
    monkeypatch.setattr("megatron_solopo.data.files.records.PART_ROWS", 30)
    path = tmp_path / name
    write_records(path, [draw_group(number) for number in range(150)])
    if name == "a.jsonl":
        path.write_text("\n\n" + path.read_text().replace("}\n", "}\n\n"), encoding="utf-8")
    digest, parts = scan(path)
    assert len(parts) > 2 and scan(path) == (digest, parts)
    assert [record for part in parts for record in read_records(path, part)] == list(read_records(path))
    if name == "a.parquet":
        assert [part.count for part in parts] == [30, 30, 4, 30, 30, 4, 22]


def test_parts_of_one_row_group_decode_it_once(tmp_path, monkeypatch):
    """In their order; a part that comes before, or of a file that was written anew, starts again and is right too."""
    path = tmp_path / "a.parquet"
    rows = [{**ROW, "id": f"g{number}"} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    monkeypatch.setattr("megatron_solopo.data.files.records.PART_ROWS", 100)
    decoded = []
    monkeypatch.setattr(parquet.pq, "ParquetFile", Counted.into(decoded))
    _, parts = scan(path)
    whole = list(read_records(path))
    assert len(parts) == 10 and sum(decoded) == 1000
    decoded.clear()
    assert [entry for part in parts for entry in read_records(path, part)] == whole
    assert sum(decoded) == 1000
    decoded.clear()
    third = [entry for part in parts[::3] for entry in whole[part.first - 1 : part.first - 1 + part.count]]
    assert [entry for part in parts[::3] for entry in read_records(path, part)] == third
    assert sum(decoded) == 1000  # as one of three workers does
    assert list(read_records(path, parts[2])) == whole[200:300]
    mixed = zip(read_records(path, parts[3]), read_records(path, parts[4]), strict=True)
    assert list(mixed) == list(zip(whole[300:400], whole[400:500], strict=True))
    pq.write_table(pa.Table.from_pylist([{**row, "chosen": "new"} for row in rows]), path, row_group_size=1000)
    assert {record["chosen"] for _, record in read_records(path, parts[3])} == {"new"}


class Counted:
    """A Parquet file that notes how many rows of it are decoded."""

    @classmethod
    def into(cls, decoded):
        opened = pq.ParquetFile
        return lambda *args, **how: cls(opened(*args, **how), decoded)

    def __init__(self, file, decoded):
        self.metadata, self._file, self._decoded = file.metadata, file, decoded

    def iter_batches(self, **how):
        for batch in self._file.iter_batches(**how):
            self._decoded.append(batch.num_rows)
            yield batch


def test_foreign_parquet_with_the_columns_is_read(tmp_path):
    """Row groups of another size, scores as a struct, additional columns, TRL's form."""
    rows = [{**ROW, "id": f"g{n}", "scores": {"x": 0.5}, "extra": n, "long_messages": None} for n in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000)
    groups = list(read_groups(tmp_path / "a.parquet"))
    assert [group.id for group in groups] == [f"g{n}" for n in range(100)] and groups[5].scores == {"x": 0.5}
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert [(g.short_messages, g.id) for g in read_groups(tmp_path / "b.parquet")] == [
        (CHAT, f"{tmp_path / 'b.parquet'}:row 1")
    ]
    chat = {"id": "c", "messages": [*CHAT, {"role": "assistant", "content": "a"}]}
    pq.write_table(pa.Table.from_pylist([chat]), tmp_path / "c.parquet")
    assert next(read_conversations(tmp_path / "c.parquet")).messages == chat["messages"]


WRONG = {
    "another table": ([{"x": 1}], "field-missing", "row 1: ", "'short_messages'", " x)", "prompt, chosen and rejected"),
    "a null": ([ROW, {**ROW, "id": "h", "chosen": None}], "field-missing", "row 2: ", "'chosen'"),
    "a number": ([{**ROW, "chosen": 3}], "field-type", "row 1: ", "'chosen'", " str", " int"),
    "texts for messages": ([{**ROW, "short_messages": ["q"]}], "field-type", "row 1: ", "short_messages[0]"),
    "span beyond the text": (
        [{**ROW, "short_spans": [{"start": 0, "end": 9, "gold": True}]}],
        *("field-value", "row 1: ", "short_spans[0] ", "0 to 9", "the 1 characters"),
    ),
    "span without its end": (
        [{**ROW, "short_spans": [{"start": 0, "gold": True}]}],
        *("field-type", "row 1: ", "'short_spans[0][1]'", " int", " NoneType"),
    ),
    "same id": ([ROW, ROW], "id-twice", "row 2: ", "'g'", "row 1;"),
}
"""Case -> (rows, code, what the message names)."""


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named(case, tmp_path):
    rows, code, row, *named = WRONG[case]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with refused(code, f"{path}:{row}", *named):
        list(read_groups(path))


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [draw_group(number) for number in range(150)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with refused("not-parquet", f"{path}: ", ".jsonl"):
        list(read_groups(path))
    start = len(whole) // 2
    path.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    with refused("file-damaged") as caught:
        list(read_groups(path))
    assert re.match(rf"{path}:row \d+: ", caught.value.message)
    write_jsonl(tmp_path / "b.parquet", [ROW])
    with refused("not-parquet", f"{tmp_path / 'b.parquet'}: "):
        list(read_groups(tmp_path / "b.parquet"))


def test_an_aborted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.parquet"
    write_records(path, [draw_group(1)])

    def broken():
        yield draw_group(2)
        raise RuntimeError("by the test")

    with pytest.raises(RuntimeError, match="by the test"):
        write_records(path, broken())
    assert [group.id for group in read_groups(path)] == ["g1"]


def test_rows_are_read_and_written_a_few_at_a_time(tmp_path):
    """For any number of groups, the largest row group has 64 rows."""
    write_records(tmp_path / "a.parquet", (draw_group(number) for number in range(1000)))
    assert max(parquet.row_group_sizes(tmp_path / "a.parquet")) == parquet.ROWS == 64


def test_a_text_that_is_not_utf8_names_its_row(tmp_path):
    """Other programs write what is not checked: bytes under the name of a text."""
    texts = [b"good", b"also good", "Gr\u00f6\u00dfe".encode("latin-1"), b"x"]
    column = pa.StringArray.from_buffers(4, *pa.array(texts, pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"title": ["t"] * 4, "text": column}), tmp_path / "a.parquet")
    with refused("not-utf8", f"{tmp_path / 'a.parquet'}:row 3: "):
        list(read_records(tmp_path / "a.parquet"))
