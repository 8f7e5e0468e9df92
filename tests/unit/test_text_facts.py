"""When two folders' tokenizers count as one: a folder of token ids is for every folder that makes the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEMPLATE, write_model

from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.text_facts import AS_READ, text_differences, text_facts


def facts(folder: Path, added_tokens: str | None = None) -> dict[str, Any]:
    return text_facts(folder, load_tokenizer(folder, added_tokens=added_tokens))


def exported(folder: Path, target: Path, added_tokens: str | None = None) -> Path:
    target.mkdir()
    SidecarFiles(folder, (folder / "config.json").read_text(), added_tokens=added_tokens).write(target)
    return target


@pytest.mark.parametrize("added", [None, "<think>"])
def test_a_sentencepiece_model_and_what_is_exported_of_it(solopo_data: Path, tmp_path: Path, added: str | None) -> None:
    """Where a tokenizer.json is beside the model, and tokenizer_config.json is written anew."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copyfile(solopo_data / "tokenizers" / "mistral" / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    again = exported(folder, tmp_path / "again", added)
    assert (again / "tokenizer.json").is_file()
    assert not text_differences(facts(folder, added), facts(again))


def test_added_tokens_are_the_same_in_an_exported_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf")
    assert not text_differences(facts(folder, "<think>"), facts(exported(folder, tmp_path / "again", "<think>")))


def change(name: str, how: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        how(document)
        (folder / name).write_text(json.dumps(document))

    return apply


CHANGES = {
    "spaces of the file": (change("tokenizer.json", lambda d: None), []),
    "another id": (change("tokenizer.json", lambda d: d["model"]["vocab"].update(w0=5, w1=4)), ["tokenizer.json"]),
    "another special token": (
        change("tokenizer_config.json", lambda d: d.update(bos_token="w1")),
        ["tokenizer_config"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_counts_is_the_tokenizer_not_its_files(tmp_path: Path, case: str) -> None:
    apply, named = CHANGES[case]
    folder = write_model(tmp_path / "hf")
    before = facts(folder)
    apply(folder)
    lines = text_differences(before, facts(folder))
    assert len(lines) == len(named) and all(name in line for name, line in zip(named, lines, strict=True))


def test_facts_of_an_earlier_version_name_files_only(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf")
    before = facts(folder)
    del before["tokenizer"][AS_READ]
    assert not text_differences(before, facts(folder))
    before["tokenizer"]["tokenizer.json"] = "0"
    assert text_differences(before, facts(folder)) == ["another tokenizer (tokenizer.json differs)"]
