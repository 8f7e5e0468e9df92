"""Token ids as a table of Arrow: one row an example, in record batches that are written one by one and read by mmap.

`COLUMNS` has the columns of ids. Beside them are ``id`` and ``sha256``, which has a digest of each of them. A prompt or
response that is not there is null; ``long_chosen`` and ``long_rejected`` are null too where they equal ``chosen`` and
``rejected``, as nearly always, though a template may write a response differently after another prompt.

The file is Arrow's IPC stream, as `datasets` writes it: the schema, then the batches. A batch can be appended to it
without reading what is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Context, Scored, Side, names_of_scored

_IDS, _RESPONSES = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
_MASK, _MASKS = pa.list_(pa.bool_()), pa.list_(pa.list_(pa.bool_()))

COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "preference": {
        "short_prompt": _IDS,
        "long_prompt": _IDS,
        "chosen": _RESPONSES,
        "rejected": _RESPONSES,
        "long_chosen": _RESPONSES,
        "long_rejected": _RESPONSES,
        **dict.fromkeys(("chosen_mask", "rejected_mask", "long_chosen_mask", "long_rejected_mask"), _MASKS),
        "long_boundaries": _IDS,
    },
    "sft": {"prompt": _IDS, "response": _IDS, "loss_mask": _MASK, "boundaries": _IDS},
}
"""Objective -> its columns. A mask marks the trained tokens of a response; it is empty where all are, and the
cell is null where all masks of a row are empty. Boundaries are those of `Prompt`, null where there is none."""

SCHEMAS = {
    objective: pa.schema(
        [("id", pa.string()), *columns.items(), ("sha256", pa.struct([(name, pa.binary()) for name in columns]))]
    )
    for objective, columns in COLUMNS.items()
}

DIGEST_BYTES = 32


def _mask_column(responses: str) -> str:
    return "loss_mask" if responses == "response" else f"{responses}_mask"


_OF_MASKS = frozenset(name for columns in COLUMNS.values() for name in columns if name.endswith("mask"))


BOUNDARIES = {"preference": "long_boundaries", "sft": "boundaries"}
"""Objective -> the column of boundaries."""


def _prompt_column(context: Context, objective: str) -> str:
    return "prompt" if objective == "sft" else f"{context.name.lower()}_prompt"


def _response_column(context: Context, side: Side) -> str:
    if side == Side.PLAIN:
        return "response"
    return side.name.lower() if context == Context.SHORT else f"long_{side.name.lower()}"


def record_batch(groups: Sequence[TokenGroup], objective: str) -> pa.RecordBatch:
    """Returns the rows of groups, each with all its responses."""
    rows = [_cells(group, objective) for group in groups]
    columns, digests = [], []
    for name, kind in COLUMNS[objective].items():
        dtype = np.bool_ if name in _OF_MASKS else np.int32
        cells = [[np.asarray(one, dtype) for one in row.get(name, ())] for row in rows]
        columns.append(_column(cells, kind, dtype))
        digests.append(pa.array([_digest(cell) for cell in cells], pa.binary()))
    names = pa.array([group.id for group in groups], pa.string())
    sha256 = pa.StructArray.from_arrays(digests, names=list(COLUMNS[objective]))
    return pa.RecordBatch.from_arrays([names, *columns, sha256], schema=SCHEMAS[objective])


def _cells(group: TokenGroup, objective: str) -> dict[str, list[Sequence[Any]]]:
    """Column -> the prompt, the mask, or the responses in the order of their numbers; only those that are there."""
    row: dict[str, list[Sequence[Any]]] = {}
    for prompt in group.prompts:
        row[_prompt_column(prompt.context, objective)] = [prompt.ids]
        if len(prompt.boundaries):
            row[BOUNDARIES[objective]] = [prompt.boundaries]
        for completion in sorted(prompt.completions, key=lambda one: one.response):
            responses = row.setdefault(_response_column(prompt.context, completion.side), [])
            if completion.response != len(responses):
                raise ValueError(f"responses of one side of group {group.id!r} are not numbered from 0")
            responses.append(completion.ids)
            trained = () if completion.loss_mask is None else completion.loss_mask
            row.setdefault(_mask_column(_response_column(prompt.context, completion.side)), []).append(trained)
    for side in ("chosen", "rejected"):
        names, long = (side, _mask_column(side)), (f"long_{side}", _mask_column(f"long_{side}"))
        if [row.get(name) for name in long] == [row.get(name) for name in names]:
            for name in long:
                row.pop(name, None)
    for name in _OF_MASKS & row.keys():
        if not any(map(len, row[name])):
            del row[name]
    return row


def _column(cells: list[list[np.ndarray]], kind: pa.DataType, dtype: type) -> pa.ListArray:
    flat = [one for cell in cells for one in cell]
    values = pa.array(np.concatenate(flat) if flat else np.zeros(0, dtype))
    absent = pa.array([not cell for cell in cells])
    if kind not in (_RESPONSES, _MASKS):
        return pa.ListArray.from_arrays(_offsets([sum(map(len, cell)) for cell in cells]), values, mask=absent)
    each = pa.ListArray.from_arrays(_offsets([len(one) for one in flat]), values)
    return pa.ListArray.from_arrays(_offsets([len(cell) for cell in cells]), each, mask=absent)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]).astype(np.int32))


def _digest(cell: Sequence[np.ndarray]) -> bytes:
    """Returns the sha256 of the lengths of the sequences and of their ids (4 bytes each; of a mask 1)."""
    digest = hashlib.sha256(np.array([len(one) for one in cell], np.int32).tobytes())
    for one in cell:
        digest.update(np.ascontiguousarray(one))
    return digest.digest()


class _Stored(Sequence[int]):
    """Token ids, or the marks of a mask, that are read from the file when they are used; their number is read before.

    `numpy.asarray` of ids copies nothing. Reading raises UserError where the bytes are not those that were written.
    """

    def __init__(self, table: TokenTable, name: str, row: int, response: int = 0) -> None:
        self._table, self._name, self._row, self._response = table, name, row, response
        self._cell = table.cell(name, row)

    def __len__(self) -> int:
        return len(self._cell[self._response])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        cell = [one.to_numpy(zero_copy_only=False) for one in self._cell]
        if _digest(cell) != self._table.rows["sha256"][self._row][self._name].as_py():
            raise UserError(
                "file-damaged",
                f"{self._table.path}: {self._name} of example {self._table.id(self._row)!r} is not what was written; "
                "the disk or a copy damaged it: copy the folder again, or delete it and tokenize again",
            )
        ids = cell[self._response]
        return ids if dtype is None else ids.astype(dtype, copy=bool(copy))

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.__array__().tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


class TokenTable:
    """The rows of a file, opened by mmap.

    Attributes:
        rows: the table.
        counts: column -> [rows] the sequences of each row.
        lengths: column -> [rows] tokens of the longest of them; 0 where there is none.
        digests: column -> [rows, 32] uint8.
    """

    def __init__(self, path: Path, objective: str) -> None:
        self.path, self.objective = path, objective
        self.rows = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.counts, self.lengths, self.digests = {}, {}, {}
        digests = self.rows["sha256"].combine_chunks()
        for name in COLUMNS[objective]:
            # Offsets alone are read. (`pyarrow.compute.list_flatten` would copy the ids.)
            sizes = [np.zeros((2, 0), np.int64), *map(_sizes, self.rows[name].chunks)]
            self.counts[name], self.lengths[name] = np.concatenate(sizes, axis=1)
            data = digests.field(name).buffers()[2]
            self.digests[name] = np.frombuffer(data, np.uint8, len(self) * DIGEST_BYTES).reshape(-1, DIGEST_BYTES)

    def __len__(self) -> int:
        return self.rows.num_rows

    @property
    def tokens(self) -> int:
        """All ids of the file."""
        names = COLUMNS[self.objective].keys() - _OF_MASKS - {BOUNDARIES[self.objective]}
        values = [chunk.values for name in names for chunk in self.rows[name].chunks]
        return sum(len(one.values if pa.types.is_list(one.type) else one) for one in values)

    def id(self, row: int) -> str:
        return self.rows["id"][row].as_py()

    def cell(self, name: str, row: int) -> list[pa.Array]:
        """Returns the sequences of a row in a column, no id of which is read."""
        values = self.rows[name][row].values
        return [one.values for one in values] if pa.types.is_list(values.type) else [values]

    def of_prompts(self, context: Context, what: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns [rows, ...] of a value of each column, that of the context's prompts."""
        return what[_prompt_column(context, self.objective)]

    def of_responses(self, context: Context, side: Side, what: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns [rows, ...] of a value of each column, that of the column that holds each row's responses."""
        column, short = _response_column(context, side), _response_column(Context.SHORT, side)
        there = self.counts[column] > 0
        return np.where(there.reshape(-1, *[1] * (what[column].ndim - 1)), what[column], what[short])

    def _of_masks(self, context: Context, side: Side, what: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns [rows, ...] of a value of the masks of `of_responses`."""
        column, short = _response_column(context, side), _response_column(Context.SHORT, side)
        there = (self.counts[column] > 0)[:, None]
        return np.where(there, what[_mask_column(column)], what[_mask_column(short)])

    def masked(self, rows: np.ndarray) -> bool:
        """Whether a response of these rows has tokens that are not trained."""
        return any(bool(self.counts[name][rows].any()) for name in _OF_MASKS & self.counts.keys())

    def group(self, row: int, scored: Scored) -> TokenGroup:
        """Returns a row's example with these segments."""
        prompts = []
        for context in Context:
            sides = [side for side in Side if (context, side) in scored]
            completions = tuple(one for side in sides for one in self._responses(row, context, side))
            if completions:
                ids = _Stored(self, _prompt_column(context, self.objective), row)
                prompts.append(Prompt(context, ids, completions, self._boundaries(row, context)))
        return TokenGroup(self.id(row), tuple(prompts))

    def _boundaries(self, row: int, context: Context) -> Sequence[int]:
        name = BOUNDARIES[self.objective]
        of_context = self.objective == "sft" or context == Context.LONG
        return _Stored(self, name, row) if of_context and self.counts[name][row] else ()

    def _responses(self, row: int, context: Context, side: Side) -> Iterator[Completion]:
        name = _response_column(context, side)
        if not self.counts[name][row]:
            name = _response_column(Context.SHORT, side)
        mask = _mask_column(name)
        for response in range(self.counts[name][row]):
            marks: Any = _Stored(self, mask, row, response) if self.counts[mask][row] else ()
            yield Completion(side, _Stored(self, name, row, response), marks if len(marks) else None, response)

    def fingerprint(self, rows: np.ndarray, scored: Scored) -> str:
        """Returns the sha256 over all that these segments of these rows are: their ids and their loss masks."""
        digest = hashlib.sha256(names_of_scored(scored).encode())
        parts = [self.of_prompts(context, self.digests) for context in sorted({context for context, _ in scored})]
        parts += [self.of_responses(context, side, self.digests) for context, side in sorted(scored)]
        parts += [self._of_masks(context, side, self.digests) for context, side in sorted(scored)]
        digest.update(np.concatenate(parts, axis=1)[rows])
        return digest.hexdigest()

    def index_sha256(self) -> str:
        """Returns the sha256 of what is read before a group is: names, lengths and digests."""
        digest = hashlib.sha256("\0".join(self.rows["id"].to_pylist()).encode())
        for name in COLUMNS[self.objective]:
            for part in (self.counts[name], self.lengths[name], self.digests[name]):
                digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()


def _sizes(chunk: pa.ListArray) -> np.ndarray:
    """Returns [2, rows] int64: the sequences of each row of a column's chunk, and the tokens of the longest of them."""
    starts = chunk.offsets.to_numpy()
    counts = np.diff(starts)
    if not pa.types.is_list(chunk.type.value_type):
        return np.stack([counts > 0, counts])
    each = np.append(np.diff(chunk.values.offsets.to_numpy()), 0)
    # For a row without sequences `reduceat` returns the next row's first one.
    return np.stack([counts, np.where(counts > 0, np.maximum.reduceat(each, starts)[:-1], 0)])
