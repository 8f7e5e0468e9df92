"""Preference groups as Parquet, streamed in both directions.

The columns are the fields of `PreferenceGroup`. Two fields have another form, because a column has one type: a
document span is a struct ``{start, end, gold}``, and ``scores`` is a list of ``{name, value}``. Other files with
the columns that a reader requests are read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_solopo.atomic import new_file
from megatron_solopo.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_SPANS = pa.list_(pa.struct({"start": pa.int64(), "end": pa.int64(), "gold": pa.bool_()}))
_SCORES = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "short_messages": _MESSAGES,
        "long_messages": _MESSAGES,
        "chosen": pa.string(),
        "rejected": pa.string(),
        "answers": pa.list_(pa.string()),
        "scores": _SCORES,
        "source": pa.string(),
        "question": pa.string(),
        "short_spans": _SPANS,
        "long_spans": _SPANS,
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "chat_template_date": pa.string(),
    }
)
"""The columns that `write_groups` writes of groups whose sides are one text each."""

_SIDES = ("chosen", "rejected", "chosen_ids", "rejected_ids")

ROWS = 64
"""Rows in a row group, and rows in memory while one is read: about 3 MB of groups with an 8K context."""


def write_groups(path: str | Path, groups: Iterable[DataclassInstance]) -> int:
    """Writes preference groups, through a temporary file that is renamed; returns their number.

    The sides of all groups are texts, or those of all are lists of texts.
    """
    count, rows_left = 0, map(_row, groups)
    rows = list(islice(rows_left, ROWS))
    schema = _of_several(SCHEMA) if rows and isinstance(rows[0]["chosen"], list) else SCHEMA
    with new_file(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
            rows = list(islice(rows_left, ROWS))
    return count


def _of_several(schema: pa.Schema) -> pa.Schema:
    """Returns the schema with lists of responses, and of their ids."""
    return pa.schema([(each.name, pa.list_(each.type) if each.name in _SIDES else each.type) for each in schema])


def _row(group: DataclassInstance) -> dict[str, Any]:
    row = dataclasses.asdict(group)
    row["scores"] = [{"name": name, "value": value} for name, value in row["scores"].items()]
    for name in ("short_spans", "long_spans"):
        row[name] = [dict(zip(("start", "end", "gold"), span, strict=True)) for span in row[name]]
    return row


def read_rows(
    path: str | Path, row_group: int | None = None, first_row: int = 1, skip: int = 0, count: int | None = None
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields ``("file:row N", record)``; a null is an absent field.

    A process that reads the parts of a row group in order decodes it once.

    Args:
        row_group: only this one, and of it ``count`` rows after the first ``skip``.
        first_row: the number of the first row that is yielded.

    Raises:
        UserError: the file is missing, not Parquet or damaged.
    """
    batches = _Batches.at(path, row_group, skip)
    number = first_row
    try:
        for batch in batches.take(count):
            for row in _decoded(batch, path, number):
                yield f"{path}:row {number}", record_of(row)
                number += 1
        batches.keep()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "file-damaged", f"{path}:row {number}: damaged from there on ({_reason(error)}); write the file again"
        ) from None


class _Batches:
    """The rows of a file or of one of its row groups as batches of at most `ROWS`.

    Row groups of other writers hold a million rows and can only be decoded from their beginning, so the last one that
    was read in part is kept, open, for the part that follows.
    """

    _kept: _Batches | None = None

    def __init__(self, path: str | Path, row_group: int | None) -> None:
        self._key = self._key_of(path, row_group)
        self._batches = _open(path).iter_batches(batch_size=ROWS, row_groups=None if row_group is None else [row_group])
        self._row, self._skip = 0, 0
        self._rest: pa.RecordBatch | None = None

    @classmethod
    def at(cls, path: str | Path, row_group: int | None, skip: int) -> _Batches:
        """Returns the batches after the first ``skip`` rows."""
        kept, cls._kept = cls._kept, None
        if row_group is None or kept is None or kept._row > skip or kept._key != cls._key_of(path, row_group):
            kept = cls(path, row_group)
        kept._skip = skip - kept._row
        return kept

    @staticmethod
    def _key_of(path: str | Path, row_group: int | None) -> tuple[str | Path | int | None, ...]:
        stat = Path(path).stat() if Path(path).is_file() else None
        return str(path), row_group, *((stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else ())

    def take(self, count: int | None) -> Iterator[pa.RecordBatch]:
        """Yields the next ``count`` rows, or all that are left."""
        if self._skip:
            for _ in self._next(self._skip):
                pass
        yield from self._next(count)

    def _next(self, count: int | None) -> Iterator[pa.RecordBatch]:
        while count is None or count > 0:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            part = batch.slice(0, count)
            self._rest = batch.slice(part.num_rows) if part.num_rows < batch.num_rows else None
            self._row += part.num_rows
            count = None if count is None else count - part.num_rows
            yield part

    def keep(self) -> None:
        """Lets the next call of `at` continue at the current row."""
        if self._key[1] is not None:
            type(self)._kept = self


def _decoded(batch: pa.RecordBatch, path: str | Path, first: int) -> list[dict[str, object]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                raise UserError(
                    "not-utf8", f"{path}:row {first + index}: a text is not UTF-8; write the file again"
                ) from None
        raise


def row_group_sizes(path: str | Path) -> list[int]:
    """Returns the rows of each row group."""
    metadata = _open(path).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _open(path: str | Path) -> pq.ParquetFile:
    if not Path(path).is_file():
        raise UserError("file-missing", f"{path}: no such file; set the path of a Parquet file")
    try:
        # Without a buffer pyarrow reads an entire row group at once; those of other writers may be very large.
        return pq.ParquetFile(path, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "not-parquet", f"{path}: not a Parquet file ({_reason(error)}); a JSONL file ends in .jsonl"
        ) from None


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def record_of(row: Mapping[str, object]) -> dict[str, object]:
    """Returns the record from which a row of a table was written; a null is an absent field."""
    record = {name: value for name, value in row.items() if value is not None}
    scores = record.get("scores")
    if isinstance(scores, list) and all(isinstance(s, dict) and s.keys() == {"name", "value"} for s in scores):
        record["scores"] = {score["name"]: score["value"] for score in scores}
    for name in ("short_spans", "long_spans"):
        if isinstance(spans := record.get(name), list):
            record[name] = [
                [span.get("start"), span.get("end"), span.get("gold")] if isinstance(span, dict) else span
                for span in spans
            ]
    return record
