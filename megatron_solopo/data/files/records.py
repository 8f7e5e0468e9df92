"""Records in JSONL or Parquet files: read one by one, from an entire file or a part of it, and written at once.

A file whose name ends in ``.parquet`` is Parquet, every other one JSONL.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_solopo import json_text
from megatron_solopo.atomic import new_file
from megatron_solopo.data.files import parquet
from megatron_solopo.errors import UserError
from megatron_solopo.model_folder import download

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = dict[str, object]
"""A JSON object or a row of a table, not checked yet."""

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a surrogate pair in JSON text; complete pairs match too."""

PART_BYTES = 4 << 20
"""Bytes after which a part of a JSONL file ends with the current line."""
PART_ROWS = 1024
"""The most rows of a part of a Parquet file; row groups that this package writes have `parquet.ROWS`."""


@dataclass(frozen=True)
class Part:
    """A range of a file that is read independently of the rest.

    Attributes:
        start: the byte offset; for a Parquet file, the row group.
        first: the number of its first line or row in the file, counted from 1.
        count: number of lines, including empty ones, or of rows.
        skip: number of rows before it in the row group.
    """

    start: int
    first: int
    count: int
    skip: int = 0


def is_parquet(path: str | Path) -> bool:
    return Path(path).suffix == ".parquet"


def read_text(flag: str, path: str | Path) -> str:
    """Returns the text of the file of an option, without a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "not-utf8", f"{flag} {path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        ) from None


def _absent(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    hub = download(path, "dataset")
    return "no such file" + (f" ({hub})" if hub else "")


def read_records(path: str | Path, part: Part | None = None) -> Iterator[tuple[str, Record]]:
    """Yields (where, record) of a JSONL or Parquet file or of a part of it; where is ``file:line`` or ``file:row N``.

    Raises:
        UserError: the file is missing or not of its kind, or a line is not a JSON object.
    """
    if not is_parquet(path):
        return read_jsonl(path, part)
    if part is None:
        return parquet.read_rows(path)
    return parquet.read_rows(path, part.start, part.first, part.skip, part.count)


def read_jsonl(path: str | Path, part: Part | None = None) -> Iterator[tuple[str, Record]]:
    """Yields ``("file:line", record)`` for each non-empty line of a file, or of a part of it.

    Raises:
        UserError: the file is missing, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("file-missing", f"{path}: {_absent(path)}; set the path of a JSONL file")
    start, first, count = (part.start, part.first, part.count) if part else (0, 1, None)
    with path.open("rb") as lines:
        lines.seek(start)
        for number, line in enumerate(lines, first):
            if number - first == count:
                return
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # editors may write it at the start of a file
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse_line(line, where)


def parse_line(line: bytes, where: str) -> Record:
    """Returns the record of one line of a JSONL file.

    Raises:
        UserError: naming ``where``; not UTF-8, not JSON, or not an object of texts that can be written again.
    """
    try:
        text = line.decode("utf-8")
        record = json_text.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(
            "not-utf8", f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            "not-json",
            f"{where}: not valid JSON ({json_text.fault(error)} at column {error.colno}); "
            "each line must be one JSON object",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        code = "json-key-twice" if isinstance(error, json_text.KeyTwice) else "not-json"
        raise UserError(code, f"{where}: cannot be read ({error}); repair the line") from None
    if HALF.search(text):
        check_encodes(record, where)
    if not isinstance(record, dict):
        raise UserError(
            "field-type",
            f"{where}: expected one JSON object a line, found {type(record).__name__}; repair the line",
        )
    return record


def check_encodes(value: object, where: str) -> None:
    """Refuses texts with half of a surrogate pair (``"\\ud83d"`` in JSON), which no tokenizer accepts and UTF-8 cannot
    encode.

    Raises:
        UserError: naming ``where`` and the text before the half.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(error.start - 20, 0) : error.start]
        raise UserError(
            "surrogate-half", f"{where}: the character after {before!r} is half of a surrogate pair; repair the text"
        ) from None


def scan(path: str | Path) -> tuple[str, list[Part]]:
    """Returns (sha256 in hex, parts in order) of a file. The parts depend only on the file's bytes.

    Raises:
        UserError: the file is missing, or it is not Parquet though its name ends in .parquet.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("file-missing", f"{path}: {_absent(path)}; set the path of a JSONL or Parquet file")
    if is_parquet(path):
        parts, first = [], 1
        for group, size in enumerate(parquet.row_group_sizes(path)):
            # Row groups of other writers may have a million rows; each part decodes the rows before it again.
            for skip in range(0, size, PART_ROWS):
                count = min(PART_ROWS, size - skip)
                parts.append(Part(group, first, count, skip))
                first += count
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), parts
    digest, parts = hashlib.sha256(), []
    start = size = count = 0
    first = 1
    with path.open("rb") as lines:
        for line in lines:
            digest.update(line)
            size, count = size + len(line), count + 1
            if size >= PART_BYTES:
                parts.append(Part(start, first, count))
                start, first, size, count = start + size, first + count, 0, 0
    if count:
        parts.append(Part(start, first, count))
    return digest.hexdigest(), parts


def write_records(path: str | Path, records: Iterable[DataclassInstance]) -> int:
    """Writes preference groups as JSONL or Parquet, through a temporary file that is renamed; returns their number."""
    return parquet.write_groups(path, records) if is_parquet(path) else write_jsonl(path, records)


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, object] | DataclassInstance]) -> int:
    """Writes dataclasses or dicts, one per line, through a temporary file that is renamed; returns their number."""
    count = 0
    with new_file(path) as out:
        for record in records:
            written = record if isinstance(record, Mapping) else dataclasses.asdict(record)
            out.write(json.dumps(written, ensure_ascii=False) + "\n")
            count += 1
    return count
