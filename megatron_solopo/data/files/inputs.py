"""Records of question sets: JSON, CSV and Parquet files are read here, Arrow files and data sets of the hub by
``datasets``."""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO, cast

from megatron_solopo import json_text
from megatron_solopo.data.files import parquet, records
from megatron_solopo.data.files.records import HALF, Record, check_encodes
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar

HUB = "hub:"
"""The prefix of an input of the form ``hub:NAME[:CONFIG][:SPLIT]``."""

TABLES = (".parquet", ".csv", ".arrow")
"""The suffixes of input files that are neither JSON nor JSONL."""

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""The files that ``save_to_disk`` of `datasets` writes into a folder of one split, of several splits."""
_LONGEST_CELL = 1 << 30
_CHUNK = 1 << 20
_SPACES = " \t\r\n"


def read_records(inputs: Iterable[str | Path]) -> Iterator[tuple[str, Record]]:
    """Yields ``(where, record)`` of every input, in order; ``where`` is the file and line, or the row.

    An input is a JSONL file, a ``.json`` file that holds one array (as HotpotQA and 2WikiMultihopQA distribute),
    a ``.parquet``, ``.csv`` or ``.arrow`` file, a folder of such files (those that ``datasets`` assigns to its split
    ``train``), one that ``save_to_disk`` wrote, or ``hub:NAME[:CONFIG][:SPLIT]``: a data set of the Hugging Face hub,
    or a folder, with a split of that name (default: ``train``). A null of a table, or an empty cell of a
    CSV file, is an absent field.

    Raises:
        UserError: the input cannot be read; the message names it.
    """
    for source in inputs:
        text, path = str(source), Path(source)
        if text.startswith(HUB):
            name, config, split = _hub_parts(text)
            yield from _rows(text, name, config, split)
        elif _is_saved(path):
            yield from _rows(text, text, None, "train")
        elif path.is_dir():
            files = _train_files(path)
            if all(file.suffix in _SUFFIXES for file in files):
                yield from read_records(files)
            else:
                yield from _rows(text, text, None, "train")
        elif path.suffix == ".arrow" and path.is_file():
            yield from _rows(text, "arrow", None, "train", text)
        elif path.suffix == ".csv" and path.is_file():
            yield from _csv(path)
        elif path.suffix == ".json" and path.is_file() and _starts_an_array(path):
            yield from _array(path)
        else:
            yield from records.read_records(path)


def first_field(source: str | Path, name: str) -> str | None:
    """Returns a text of the first record of an input; None where there is no such record or field."""
    try:
        value = next((record.get(name) for _, record in read_records([source])), None)
    except UserError:
        return None  # the reader of all records reports the mistake
    return value if isinstance(value, str) else None


@contextlib.contextmanager
def as_file(source: str, temporary: Path) -> Iterator[str]:
    """A file that `records.scan` can divide into parts: the input itself, or, if the input is a data set of the hub, a
    folder, a JSON array or a table, its records as JSONL in ``temporary``, which is removed at the end. Errors name the
    input.

    Raises:
        UserError: the input cannot be read.
    """
    path = Path(source)
    array = path.suffix == ".json" and path.is_file() and _starts_an_array(path)
    if not (array or path.is_dir() or source.startswith(HUB) or path.suffix in (".csv", ".arrow")):
        yield source
        return
    with temporary.open("w", encoding="utf-8") as lines:
        try:
            for where, record in ProgressBar(read_records([source]), desc=f"reading {source}", unit="record"):
                named = record if record.get("id") is not None else record | {"id": where}
                lines.write(json.dumps(named, default=str) + "\n")
            lines.flush()
            yield str(temporary)
        except UserError as error:
            raise UserError(
                error.code, str(error).replace(f"{temporary}:", f"{source}, record ").replace(str(temporary), source)
            ) from None
        finally:
            temporary.unlink(missing_ok=True)


def holds_data(folder: str | Path) -> bool:
    """Whether a folder holds files that `read_records` reads."""
    return any(file.suffix in (*_SUFFIXES, ".arrow") for file in Path(folder).rglob("*"))


def _is_saved(folder: str | Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((Path(folder) / name).is_file() for name in _SAVED)


def local_files(source: str | Path) -> list[Path]:
    """Returns the files of an input; an empty list for a data set of the hub."""
    path = place(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def fingerprint(inputs: Iterable[str]) -> list[list[str]]:
    """``[name, sha256 in hex]`` of every file of the inputs; a data set of the hub has an empty digest."""
    digests = []
    for name in inputs:
        files = local_files(name)
        if not files:
            digests.append([name, ""])
        for path in files:
            with path.open("rb") as file:
                digests.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digests


def place(source: str | Path) -> Path:
    """Returns the file or folder that an input names; a path that does not exist names a data set of the hub."""
    return Path(_hub_parts(str(source))[0] if str(source).startswith(HUB) else source)


def _hub_parts(text: str) -> tuple[str, str | None, str]:
    """Returns (name, config, split) of ``hub:NAME[:CONFIG][:SPLIT]``."""
    name, *rest = text.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UserError("dataset-name", f"{text}: write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def _rows(
    source: str, name: str, config: str | None, split: str, file: str | None = None
) -> Iterator[tuple[str, Record]]:
    import datasets  # takes a second, and most inputs do not need it

    with _datasets_explained(source):
        if _is_saved(name):
            rows = datasets.load_from_disk(name)
            loaded = rows if isinstance(rows, datasets.DatasetDict) else {str(rows.split or "train"): rows}
        else:
            loaded = {split: datasets.load_dataset(name, config, split=split, data_files=file)}
    splits = cast(Mapping[str, Iterable[Record]], loaded)
    if (rows := splits.get(split)) is None:
        raise UserError(
            "split-missing",
            f"{source}: has no split {split}, only {', '.join(splits)}; use hub:{name}::SPLIT with one of these",
        )
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", parquet.record_of(row)


def _train_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's split ``train``, as `datasets` assigns them: by their names, or by its
    README.md."""
    import datasets  # see `_rows`

    with _datasets_explained(str(folder)):
        splits = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    if "train" not in splits:
        raise UserError(
            "split-missing",
            f"{folder}: has no split train, only {', '.join(map(str, splits))}; pass its files, or hub:{folder}::SPLIT",
        )
    absolute = folder.resolve()
    files = map(Path, splits["train"])
    return [folder / file.relative_to(absolute) if file.is_relative_to(absolute) else file for file in files]


@contextlib.contextmanager
def _datasets_explained(source: str) -> Iterator[None]:
    """Turns an error of `datasets` (many classes: a missing name, a wrong split, a broken file) into one line."""
    try:
        yield
    except Exception as error:
        # The outer error of a broken file reports only that generating failed; its cause has the reason.
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError("dataset-unreadable", f"{source}: datasets cannot load it ({reason[:300]})") from None


def _csv(path: Path) -> Iterator[tuple[str, Record]]:
    """Yields the rows of a CSV file, each named by its first line. Cells are texts: a type guess would turn 0012 into
    12."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows, line = csv.reader(file, strict=True), 1
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise UserError("column-twice", f"{path}:1: two columns have one name; rename one of them")
            line = rows.line_num + 1
            for cells in rows:
                if len(cells) > len(names):
                    raise UserError(
                        "not-csv",
                        f"{path}:{line}: {len(cells)} cells under {len(names)} names; quote texts with commas",
                    )
                if cells:  # a blank line has none
                    yield f"{path}:{line}", {name: cell for name, cell in zip(names, cells, strict=False) if cell}
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError("not-csv", f"{path}:{line}: not valid CSV ({error}); repair the row") from None
        except UnicodeDecodeError:
            raise UserError("not-utf8", f"{path}: not UTF-8; save the file as UTF-8") from None


def _starts_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[str, Record]]:
    """Yields the objects of one JSON array, one in memory at a time; an error names the line in which its object
    starts."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _objects(path, file)
        except UnicodeDecodeError:
            raise UserError("not-utf8", f"{path}: not UTF-8; save the file as UTF-8") from None


def _objects(path: Path, file: TextIO) -> Iterator[tuple[str, Record]]:
    decoder, text, position, line = json_text.DECODER, "", 0, 1

    def more() -> bool:
        nonlocal text, position
        # As much again as the buffer holds: an object longer than a chunk is decoded a few times, not once a chunk.
        chunk = file.read(max(_CHUNK, len(text) - position))
        text, position = text[position:] + chunk, 0
        return bool(chunk)

    def skip(characters: str) -> str:
        """Returns the next character that is none of these, "" at the end of the file."""
        nonlocal position, line
        while True:
            while position < len(text) and text[position] in characters:
                line += text[position] == "\n"
                position += 1
            if position < len(text) or not more():
                return text[position : position + 1]

    skip(_SPACES)
    position += 1
    number = last = 0
    while skip(_SPACES + ",") != "]":
        number += 1
        where = f"{path}:{line}" if line > last else f"{path}:{line}, record {number}"  # names must differ
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            broken = line + text.count("\n", position, error.pos)
            if more():
                number -= 1
                continue
            raise UserError(
                "not-json",
                f"{path}:{broken}: not valid JSON ({json_text.fault(error)} at column {error.colno}); "
                "the file must be one array of objects",
            ) from None
        except (ValueError, RecursionError) as error:
            code = "json-key-twice" if isinstance(error, json_text.KeyTwice) else "not-json"
            raise UserError(code, f"{where}: cannot be read ({error}); repair the record") from None
        if HALF.search(text, position, end):
            check_encodes(record, where)
        if not isinstance(record, dict):
            raise UserError("field-type", f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record
        last = line = line + text.count("\n", position, end)
        position = end
    position += 1
    if skip(_SPACES):
        raise UserError("not-json", f"{path}:{line}: more text follows the array; keep one array in the file")
