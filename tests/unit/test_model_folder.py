"""A model that is not where a folder is expected: the line names what is there instead and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refused
from tiny_models import write_model

from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.data.hf_model import load_model, reach
from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.text.tokenizer import read_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.model_folder import download, seen_in

READERS: dict[str, Callable[[str], object]] = {
    "--hf-path": read_hf_config,
    "--tokenizer": read_tokenizer,
    "--model": lambda folder: load_model(folder, "cpu", "float32"),
}


def reported(read: Callable[[str], object], folder: str | Path) -> str:
    """The message of a reader that appends the text of `seen_in` or `download`."""
    with pytest.raises(UserError) as caught:
        read(str(folder))
    assert "\n" not in caught.value.message
    return caught.value.message


def refuse(read: Callable[[str], object], folder: str | Path, code: str, *named: str) -> None:
    with refused(code, *named):
        read(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-7B-Instruct",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/",
        "hub:Qwen/Qwen2.5-7B-Instruct",
    ],
)
@pytest.mark.parametrize("option", READERS)
def test_a_name_of_the_hub_is_refused_with_its_download_command(
    option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "hf download Qwen/Qwen2.5-7B-Instruct --local-dir Qwen2.5-7B-Instruct"
    refuse(READERS[option], name, "folder-missing", command)


@pytest.mark.parametrize("name", ["/models/Qwen2.5", "runs/solo-hf", "nowhere", "a/b/c", "../b"])
def test_other_paths_are_not_mistaken_for_names_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for read in READERS.values():
        with refused("folder-missing", name, "Hugging Face folder") as caught:
            read(name)
        assert "hf download" not in caught.value.message


def test_a_data_set_of_the_hub_and_a_servers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.data.files.records import read_jsonl

    monkeypatch.chdir(tmp_path)
    message = reported(lambda name: list(read_jsonl(name)), "trl-lib/ultrafeedback_binarized")
    command = "hf download trl-lib/ultrafeedback_binarized --repo-type dataset --local-dir ultrafeedback_binarized"
    assert command in message
    argv = ["--contexts", "c", "--output", "o", "--server", "http://127.0.0.1:9/v1", "--model"]
    message = reported(lambda name: sample_responses.main([*argv, name]), "Qwen/Qwen3-8B")
    assert message.startswith("--tokenizer ") and "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B" in message


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


HELD = {
    "GGUF": ("Qwen2.5-7B-Q4_K_M.gguf", "it holds Qwen2.5-7B-Q4_K_M.gguf, and GGUF of llama.cpp is not read"),
    "authors' weights": ("consolidated.00.pth", "it holds consolidated.00.pth, and the format of the original author"),
    "Flax": ("flax_model.msgpack", "it holds flax_model.msgpack, and Flax is not read"),
    "TensorFlow": ("tf_model.h5", "and TensorFlow is not read"),
    "ONNX": ("onnx/model.onnx", "it holds model.onnx, and ONNX is not read"),
    "adapter": ("adapter_config.json", "it holds an adapter of PEFT alone .adapter_config.json."),
    "cache": ("snapshots/0123/config.json", "it is a model in the hub's cache.*/snapshots/0123$"),
    "all of the cache": ("models--Qwen--Qwen3-8B/refs/main", "it is the hub's cache.*snapshots/REVISION"),
    "half a download": (".cache/huggingface/download/a.incomplete", "its download is not complete.*hf download"),
    "a run": ("iter_0000005/manifest.json", "it holds checkpoints of a run.* megatron-to-hf --load "),
    "a folder around it": ("7B/config.json", "the model is in a folder inside it.*/7B$"),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_folder_holds_instead_is_named(name: str, tmp_path: Path) -> None:
    file, expected = HELD[name]
    write(tmp_path / file, "{}")
    for read in (*READERS.values(), reach):
        assert re.search(expected, reported(read, tmp_path))


@pytest.mark.parametrize("name", ["GGUF", "Flax", "ONNX", "adapter"])
def test_weights_of_another_kind_beside_a_config_are_named(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    write(folder / HELD[name][0], "{}")
    for read in (TensorReader, READERS["--model"]):
        assert re.search(HELD[name][1], reported(read, folder))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    write(tmp_path / "model.safetensors")
    for read in READERS.values():
        refuse(read, tmp_path / "a.gguf", "not-a-folder", "a.gguf: ", "GGUF of llama.cpp is not read")
        with refused("not-a-folder", "model.safetensors: ") as caught:
            read(str(tmp_path / "model.safetensors"))
        assert caught.value.message.endswith(f", {tmp_path}")


def test_an_unrecognized_folder(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt")
    assert seen_in(tmp_path) is None and download(tmp_path) is None
    assert "config.json" in reported(read_hf_config, tmp_path)
    write(tmp_path / "config.json", json.dumps({"model_type": "llama"}))
    refuse(TensorReader, tmp_path, "weights-missing", f"{tmp_path}: ", "--random-init")
