"""Records of question sets: JSON files read as they lie, tables and hub data sets through ``datasets``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_solopo.data.records import read_jsonl
from megatron_solopo.errors import UserError

HUB = "hub:"
"""What an input of the form ``hub:NAME[:CONFIG][:SPLIT]`` starts with."""

_TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def read_records(inputs: Iterable[str | Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ``(where, record)`` of every input, in order; ``where`` names the file and line, or the row.

    An input is a JSONL file, a ``.json`` file that holds one array (HotpotQA's and 2WikiMultihopQA's own files),
    a ``.parquet``, ``.csv`` or ``.arrow`` file, a folder of such files (its split ``train``), or
    ``hub:NAME[:CONFIG][:SPLIT]``: a data set of the Hugging Face hub, or a folder, with a split of that name
    (default: ``train``).

    Raises:
        UserError: the input cannot be read; the message names it.
    """
    for given in inputs:
        text, path = str(given), Path(given)
        if text.startswith(HUB):
            name, config, split = _hub_parts(text)
            yield from _rows(text, name, config, split)
        elif path.is_dir():
            yield from _rows(text, text, None, "train")
        elif path.suffix in _TABLES and path.is_file():
            yield from _rows(text, _TABLES[path.suffix], None, "train", data_files=text)
        elif path.suffix == ".json" and path.is_file() and _starts_an_array(path):
            yield from _array(path)
        else:
            yield from read_jsonl(path)


def local_files(given: str | Path) -> list[Path]:
    """The files that an input is read from, none for a data set of the hub."""
    path = Path(_hub_parts(str(given))[0] if str(given).startswith(HUB) else given)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _hub_parts(text: str) -> tuple[str, str | None, str]:
    """(name, config, split) of ``hub:NAME[:CONFIG][:SPLIT]``."""
    name, *rest = text.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{text}: give hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def _rows(given: str, name: str, config: str | None, split: str, **files: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # takes a second, and most inputs do not need it

    try:
        rows = datasets.load_dataset(name, config, split=split, **files)
    except Exception as error:  # a missing name, a wrong split, a broken file: datasets raises many kinds
        # The outer error of a broken file only says that generating failed; its cause says why.
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(f"{given}: datasets cannot load it ({reason[:300]})") from None
    for number, row in enumerate(rows, 1):
        yield f"{given}, row {number}", row


def _starts_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of one JSON array, decoded one at a time; an error names the line an object starts in."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(position: int, characters: str) -> int:
        while position < len(text) and text[position] in characters:
            position += 1
        return position

    while True:
        position = skip(position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        if position < len(text) and text[position] == "]":
            if (after := skip(position + 1, " \t\r\n")) < len(text):
                line += text.count("\n", position, after)
                raise UserError(f"{path}:{line}: more text follows the array; keep one array in the file")
            return
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
                "the file must be one array of objects"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot be read ({error}); repair the record") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record
