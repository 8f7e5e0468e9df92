"""Reading and writing Hugging Face folders: old and new files, shards, and what is wrong with them in one line."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from megatron_solopo.conversion import hf_folder
from megatron_solopo.conversion.hf_folder import TensorReader, write_folder
from megatron_solopo.conversion.shards import parse_size
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.model.families.operators import (
    AlternatingGateUp,
    InterleaveQKV,
    Operator,
    PadRows,
    Rename,
    StackGateUp,
    Transpose,
)


def write(folder: Path, source: Path, tensors: Iterable[tuple[str, torch.Tensor]], **options: Any) -> None:
    """A folder of `TENSORS`, which come from ``tensors``."""
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    write_folder(folder, SidecarFiles(source, "{}"), shapes, torch.float32, tensors, **options)


TENSORS = {f"layer.{number}.weight": torch.arange(6.0).view(2, 3) + number for number in range(5)}


def test_shards_are_written_as_they_fill_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write(tmp_path / "new", tmp_path, iter(TENSORS.items()), max_shard_size="50B")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names == ["config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 24 and index["weight_map"].keys() == TENSORS.keys()
    assert [len(load_file(tmp_path / "new" / name)) for name in shards] == [2, 2, 1]
    reader = TensorReader(tmp_path / "new")
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())


def test_a_file_is_opened_once_and_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of tens of thousands of tensors is read once; a tensor that nobody holds is mapped no longer."""
    write(tmp_path / "new", tmp_path, iter(TENSORS.items()), max_shard_size="50B")
    opened, safe_open = [], hf_folder.safe_open
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(hf_folder, "safe_open", lambda path, **how: opened.append(path) or safe_open(path, **how))
    reader = TensorReader(tmp_path / "new")
    kept = reader.get("layer.0.weight")
    assert kept.add_(1).equal(TENSORS["layer.0.weight"] + 1)  # memory that is not mapped
    for _ in range(3):
        assert all(reader.get(name).equal(tensor) for name, tensor in TENSORS.items())
    assert len(opened) == 3 and len(list(Path("/proc/self/fd").iterdir())) < before + 10
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert [Path(line.split()[-1]).name for line in mapped if str(tmp_path) in line] == [
        "model-00001-of-00003.safetensors"
    ]


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path / "new", tmp_path, iter(TENSORS.items()))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


def test_a_missing_tensor_leaves_no_model(tmp_path: Path) -> None:
    *come, (last, _) = TENSORS.items()
    with pytest.raises(ValueError, match=f"{last} was not written"):
        write(tmp_path / "new", tmp_path, iter(come))
    assert not (tmp_path / "new").exists()


def test_all_tensors_are_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Other processes send them; stopping to listen would leave those waiting."""
    read, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes a file: a header alone is longer
    try:
        with refused("write-failed", f"--save-hf {tmp_path}/new: ", "File too large"):
            write(tmp_path / "new", tmp_path, ((name, read.append(name) or t) for name, t in TENSORS.items()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read) == 5


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("7B", 7), ("3kB", 3000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0GB", "5GiB", "five"])
def test_wrong_sizes_are_one_line(text: str) -> None:
    with refused("option-value", f"--max-shard-size {text}: ", "5GB"):
        parse_size(text)


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "torch before 1.6"])
def test_bin_files_are_read(tmp_path: Path, zipped: bool) -> None:
    parts = dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])
    for number, part in enumerate(parts):
        torch.save(part, tmp_path / f"{number}.bin", _use_new_zipfile_serialization=zipped)
    weights = {name: f"{number}.bin" for number, part in enumerate(parts) for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert TensorReader(tmp_path).names() == TENSORS.keys()


@pytest.mark.parametrize(
    ("single", "index"),
    [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")],
)
def test_an_index_that_was_left_over_is_not_read(tmp_path: Path, single: str, index: str) -> None:
    """save_pretrained leaves it in a folder that had shards before; transformers reads the single file first."""
    save = save_file if single == "model.safetensors" else torch.save
    save(TENSORS, tmp_path / single)
    save({name: tensor + 1 for name, tensor in TENSORS.items()}, tmp_path / f"old-{single}")
    (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, f"old-{single}")}))
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())


class Code:
    def __reduce__(self) -> Any:
        return print, ("code of a checkpoint ran",)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OBJECTS = {"bin in a bin": {"state_dict": TENSORS}, "bin of a run": TENSORS | {"epoch": 3}, "bin of a list": [1, 2]}
INDEXES = {
    "index without map": "{}",
    "index without tensors": '{"weight_map": {}}',
    "index of numbers": '{"weight_map": {"a": 1}}',
    "index of names": '{"weight_map": ["a"]}',
}


def break_folder(folder: Path, how: str) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(dict(list(TENSORS.items())[:2]), folder / shards[0])
    save_file(dict(list(TENSORS.items())[2:]), folder / shards[1])
    weights = {name: shards[number >= 2] for number, name in enumerate(TENSORS)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    if how == "missing shard":
        (folder / shards[1]).unlink()
    elif how == "truncated shard":
        (folder / shards[1]).write_bytes((folder / shards[1]).read_bytes()[:-7])
    elif how == "tensor in another shard":
        index.write_text(json.dumps({"weight_map": weights | {"layer.4.weight": shards[0]}}))
    elif how in INDEXES:
        index.write_text(INDEXES[how])
    elif how == "pointer":
        (folder / shards[0]).write_bytes(POINTER)
    elif how in ("code", "half a bin", "no weights", "bin pointer", *OBJECTS):
        for path in (index, *map(folder.joinpath, shards)):
            path.unlink()
        if how == "code":
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code()}))
        elif how == "bin pointer":
            (folder / "pytorch_model.bin").write_bytes(POINTER)
        elif how in OBJECTS:
            torch.save(OBJECTS[how], folder / "pytorch_model.bin")
        elif how == "half a bin":
            torch.save(TENSORS, folder / "pytorch_model.bin")
            (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-200])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("how", "code", "named"),
    [
        ("missing shard", "shard-missing", ["/model-00002-of-00002.safetensors: "]),
        ("truncated shard", "file-damaged", ["/model-00002-of-00002.safetensors: "]),
        ("tensor in another shard", "tensor-missing", ["/model-00001-of-00002.safetensors: ", "'layer.4.weight'"]),
        *((how, "file-damaged", ["/model.safetensors.index.json: ", "'weight_map'"]) for how in INDEXES),
        ("code", "pickle-unsafe", ["/pytorch_model.bin: "]),
        ("half a bin", "file-damaged", ["/pytorch_model.bin: "]),
        ("bin in a bin", "not-a-state-dict", ["/pytorch_model.bin: 'state_dict'", "(dict)"]),
        ("bin of a run", "not-a-state-dict", ["/pytorch_model.bin: 'epoch'", "(int)"]),
        ("bin of a list", "not-a-state-dict", ["/pytorch_model.bin: ", "(a list)"]),
        ("pointer", "git-lfs-pointer", ["/model-00001-of-00002.safetensors: ", "git lfs pull"]),
        ("bin pointer", "git-lfs-pointer", ["/pytorch_model.bin: ", "git lfs pull"]),
        ("no weights", "weights-missing", [": no model.safetensors, ", "--random-init"]),
    ],
)
def test_broken_folders_are_one_line(
    tmp_path: Path, how: str, code: str, named: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    break_folder(tmp_path, how)
    with refused(code, str(tmp_path), *named):
        reader = TensorReader(tmp_path)
        for name in reader.names():
            reader.get(name)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_the_dtype_is_that_of_all_weights(tmp_path: Path, single: str) -> None:
    save = save_file if single == "model.safetensors" else torch.save
    tensors = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    save(tensors | {"layer.0.rotary_emb.inv_freq": torch.ones(3)}, tmp_path / single)  # which is not a weight
    assert TensorReader(tmp_path).dtype() == torch.bfloat16
    save(tensors | {"layer.4.weight": TENSORS["layer.4.weight"]}, tmp_path / single)
    with refused("dtype-mixed", "bfloat16 (layer.0.weight), float32 (layer.4.weight)", "--dtype"):
        TensorReader(tmp_path).dtype()
    save(tensors | {"layer.4.weight": torch.ones(2, 3, dtype=torch.int8)}, tmp_path / single)
    with refused("dtype-unsupported", "'layer.4.weight'", "8, and only F64, F32, BF16, F16"):
        TensorReader(tmp_path).dtype()


OPERATORS: list[tuple[Operator, list, int | None]] = [
    (Rename(), [(8, 12)], 0),
    (Rename(), [(8, 12)], 1),
    (Rename(), [(8,)], None),
    (PadRows(13, 16), [(13, 3)], 0),
    (PadRows(5, 16), [(5, 3)], 0),
    (InterleaveQKV(8, 4, 6), [(48, 5), (24, 5), (24, 5)], 0),
    (InterleaveQKV(8, 4, 6), [(48,), (24,), (24,)], 0),
    (StackGateUp(), [(16, 3), (16, 3)], 0),
    (AlternatingGateUp(), [(3, 32)], 0),
    (AlternatingGateUp(), [(32,)], 0),
    (Transpose(), [(16, 3)], 1),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("operator", "shapes", "dimension"), OPERATORS)
def test_a_parameter_is_filled_with_its_cut(operator: Operator, shapes: list, dimension: int | None, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    for rank in range(size if dimension is not None else 1):
        count = size if dimension is not None else 1
        expected = operator.cut(operator.to_megatron(tensors), rank, count, dimension)
        parameter = torch.full(expected.shape, 7.0)
        operator.fill(parameter, tensors, rank, count, dimension)
        assert torch.equal(parameter, expected)
        for rows in (slice(-1), slice(1)):  # one row less, and one that torch would repeat
            with pytest.raises((ValueError, RuntimeError)):
                operator.fill(parameter, [tensor[rows] for tensor in tensors], rank, count, dimension)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("operator", "shapes", "dimension"), OPERATORS)
def test_parts_joined_are_the_tensors_again(operator: Operator, shapes: list, dimension: int | None, size: int) -> None:
    """Of processes that filled their parts; all parts together hold every number once, beside rows of padding."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    whole = operator.to_megatron(tensors)
    count = size if dimension is not None else 1
    parts = []
    for rank in range(count):
        shape = list(whole.shape)
        if dimension is not None:
            shape[dimension] //= size
        parts.append(torch.full(shape, 7.0))
        operator.fill(parts[-1], tensors, rank, count, dimension)
    back = operator.to_hf(operator.join(parts, dimension))
    assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))
    numbers = torch.cat([part.flatten() for part in parts])
    wanted = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.equal(numbers[numbers != 0].sort().values, wanted.sort().values)


def test_interleaved_heads_are_ordered_by_group() -> None:
    """Megatron's order, written out: a key-value head's query heads, its key, its value."""
    rows = {"q": 4, "k": 2, "v": 2}  # heads of one row: 4 query heads, 2 of keys and values
    tensors = [torch.arange(count, dtype=torch.float) + 10 * place for place, count in enumerate(rows.values())]
    assert InterleaveQKV(4, 2, 1).to_megatron(tensors).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert StackGateUp().to_megatron([torch.tensor([1.0, 2]), torch.tensor([3.0, 4])]).tolist() == [1, 2, 3, 4]
    assert AlternatingGateUp().to_megatron([torch.tensor([1.0, 3, 2, 4])]).tolist() == [1, 2, 3, 4]
