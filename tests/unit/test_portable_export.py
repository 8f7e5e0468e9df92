"""An exported folder means the same in transformers 4.57 and 5: what is written for that, by value, for every kind of
source. Both versions read such folders in tests/functional/test_two_transformers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE, byte_tokenizer, write_model
from transformers import AutoTokenizer, LlamaConfig, LlamaTokenizer, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from megatron_solopo.conversion.sidecar_files import SidecarFiles, config_json
from megatron_solopo.data.text.tokenizer import add_special_tokens, read_tokenizer
from megatron_solopo.model.hf_config import read_hf_config

OLD = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SHAPE
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
TRAINED = {"original_max_position_embeddings": 64}
THETA = {"rope_theta": 5e5}
BOTH = {"dtype": "float32", "torch_dtype": "float32"}


def exported(folder: Path, document: dict[str, Any], scaling: str | None = None, **fields: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document | fields))
    return json.loads(config_json(folder, read_hf_config(folder, scaling), torch.float32))


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_type": "default"} | THETA, None),
        ({"rope_type": "default", "rope_theta": 10000.0}, None),
        (YARN | THETA, YARN),
        (YARN | THETA | {"truncate": False}, YARN | {"truncate": False}),
        (LLAMA3 | TRAINED | THETA, LLAMA3 | TRAINED),
        (LINEAR | THETA, LINEAR),
    ],
)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_config_of_transformers_5_has_the_older_fields_too(
    kind: type, fields: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    """transformers 4 reads rope_parameters nowhere, and uses theta 10,000 without a scaling instead."""
    kind(**SHAPE, rope_parameters=dict(fields), dtype="float32").save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in before and "torch_dtype" not in before
    written = exported(tmp_path, before)
    assert written["rope_theta"] == fields["rope_theta"] and written["rope_scaling"] == scaling
    assert written["rope_parameters"] == before["rope_parameters"] and written | BOTH == written
    assert {name: written[name] for name in before} == before


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "float32", "rope_scaling": None} | THETA,
        {"torch_dtype": "float32"},
        {"dtype": "float32", "rope_scaling": YARN} | THETA,
        {"dtype": "float32", "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"dtype": "float32", "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None} | THETA,
        {"dtype": "float32", "rope_scaling": LLAMA3 | TRAINED, "rope_parameters": LLAMA3 | TRAINED | THETA} | THETA,
    ],
)
def test_a_config_that_both_read_alike_stays_as_it_is(fields: dict[str, Any], tmp_path: Path) -> None:
    """To the byte."""
    exported(tmp_path, OLD, **fields)
    config = read_hf_config(tmp_path)
    assert config_json(tmp_path, config, torch.float32) == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_scaling": {}} | THETA, 5e5, None),
        ({"rope_scaling": YARN | {"rope_theta": 7e4}} | THETA, 7e4, YARN),
        ({"rope_scaling": YARN | {"type": "linear"}} | THETA, 5e5, YARN),
        ({"rope_scaling": LLAMA3} | THETA, 5e5, LLAMA3 | {"original_max_position_embeddings": 256}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}} | THETA, 7e4, None),
        ({"rope_parameters": YARN | {"rope_theta": 7e4}, "rope_scaling": LINEAR} | THETA, 5e5, LINEAR),
    ],
)
def test_fields_that_the_versions_read_otherwise_are_those_of_training(
    fields: dict[str, Any], theta: float, scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    written = exported(tmp_path, OLD, **fields)
    assert written["rope_theta"] == theta and written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert json.loads(config_json(tmp_path, read_hf_config(tmp_path), torch.float32)) == written


def test_an_extended_model_has_both(tmp_path: Path) -> None:
    written = exported(tmp_path, OLD, "yarn:4:256", **THETA)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert written["rope_scaling"] == scaling and written["rope_parameters"] == scaling | THETA
    assert written["max_position_embeddings"] == 1024 and written | BOTH == written


@pytest.mark.parametrize(("names", "dtype"), [(["torch_dtype"], "float32"), (["dtype"], "float32"), ([], "float32")])
def test_the_dtype_is_the_one_written(names: list[str], dtype: str, tmp_path: Path) -> None:
    written = exported(tmp_path, OLD, **dict.fromkeys(names, "bfloat16"))
    assert {name: written.get(name) for name in BOTH} == dict.fromkeys(BOTH) | dict.fromkeys(names or BOTH, dtype)


def test_experts_are_counted_under_both_names(tmp_path: Path) -> None:
    """transformers 4 uses 128 for Qwen3-MoE without num_experts; Mixtral has one name."""
    Qwen3MoeConfig(**SHAPE, **EXPERTS, **QWEN3_MOE).save_pretrained(tmp_path)
    written = exported(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert written["num_experts"] == written["num_local_experts"] == 4
    MixtralConfig(**SHAPE, **EXPERTS).save_pretrained(tmp_path)
    written = exported(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert written["num_local_experts"] == 4 and "num_experts" not in written


def test_yarn_of_mixtral_has_a_head_dim(tmp_path: Path) -> None:
    """Which transformers 5.17 requires as a number there, and Mixtral's config.json leaves out."""
    mixtral = OLD | EXPERTS | {"model_type": "mixtral"}
    assert exported(tmp_path, mixtral, "yarn:2:256")["head_dim"] == 8
    assert exported(tmp_path, mixtral, rope_scaling=YARN)["head_dim"] == 8
    assert "head_dim" not in exported(tmp_path, mixtral)


TEXTS = ["The fox, 1,234.56 € in 2026", "  two\n\n\tw ", "½ 12 34", "<|end|>hi <|user|> hi"]


def written_of(source: Path, target: Path, added: str | None = None, **changed: Any) -> dict[str, Any]:
    """tokenizer_config.json as exported; its tokenizer has the ids of training in transformers 5."""
    target.mkdir()
    ours = read_tokenizer(source)
    if added is not None:
        add_special_tokens(ours, added, source)
    SidecarFiles(source, (source / "config.json").read_text(), added_tokens=added, **changed).write(target)
    theirs = AutoTokenizer.from_pretrained(target)
    texts = [*TEXTS, "<think> x</think>y"]
    assert theirs(texts)["input_ids"] == ours(texts)["input_ids"]
    for skip in (False, True):
        assert theirs.batch_decode(theirs(texts)["input_ids"], skip_special_tokens=skip) == ours.batch_decode(
            ours(texts)["input_ids"], skip_special_tokens=skip
        )
    assert set(theirs.all_special_tokens) == set(ours.all_special_tokens)
    return json.loads((target / "tokenizer_config.json").read_text())


def untouched(source: Path, target: Path) -> bool:
    return all((target / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())


@pytest.mark.parametrize("added", [None, "<think>,</think>"])
def test_a_tokenizer_of_transformers_5_gets_a_class_that_4_has(added: str | None, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    before = json.loads((source / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and isinstance(before["extra_special_tokens"], list)
    (tmp_path / "new").mkdir()
    SidecarFiles(source, "{}", added_tokens=added).write(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in written
    special = before["extra_special_tokens"] + (added.split(",") if added else [])
    assert written["additional_special_tokens"] == special
    words, theirs = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "new", source))
    listed = {token["content"]: token for token in words.pop("added_tokens")}
    assert all(listed[token]["special"] for token in special)
    theirs.pop("added_tokens")
    assert words == theirs


CLASSES = {
    "of the file": ("PreTrainedTokenizerFast", {}, "PreTrainedTokenizerFast", True),
    "4's dictionary": ("PreTrainedTokenizerFast", {"extra_special_tokens": {"image": "<|user|>"}}, None, True),
    "5's list": ("PreTrainedTokenizerFast", {"extra_special_tokens": ["<|user|>"]}, None, False),
    "words of a class": ("GPT2Tokenizer", {}, "PreTrainedTokenizerFast", False),
    "SentencePiece's class": ("LlamaTokenizerFast", {"add_bos_token": False}, "PreTrainedTokenizerFast", False),
    "another name of 5": ("PythonBackend", {}, "PreTrainedTokenizerFast", False),
}


@pytest.mark.parametrize("case", CLASSES)
def test_the_class_of_a_tokenizer(case: str, tmp_path: Path) -> None:
    name, settings, expected, stays = CLASSES[case]
    settings = settings | {"eos_token": "<|end|>", "bos_token": "<|user|>"}
    source = byte_tokenizer(tmp_path / "hf", tokenizer_class=name, **settings)
    written = written_of(source, tmp_path / "new")
    assert written["tokenizer_class"] == (expected or name)
    assert untouched(source, tmp_path / "new") == stays
    again = tmp_path / "again"
    assert written_of(tmp_path / "new", again) == written and untouched(tmp_path / "new", again)


@pytest.mark.parametrize(("adds", "name"), [(False, "PreTrainedTokenizerFast"), (True, "LlamaTokenizer")])
def test_what_transformers_4_adds_by_class_is_in_the_file(adds: bool, name: str, tmp_path: Path) -> None:
    """Its LlamaTokenizerFast starts a text with <s> for any tokenizer.json; 5 goes by the file, and saves no
    add_bos_token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "hi", "\u2581hi"]
    merges = [("h", "i"), ("\u2581", "hi")]
    tokenizer = LlamaTokenizer({word: number for number, word in enumerate(words)}, merges, add_bos_token=adds)
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    assert "add_bos_token" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written_of(tmp_path / "hf", tmp_path / "new")["tokenizer_class"] == name
    ids = read_tokenizer(tmp_path / "new")("hi hi")["input_ids"]
    assert ids == [words.index("<s>")] * adds + [words.index("\u2581hi")] * 2


@pytest.mark.parametrize("files", [[], ["special_tokens_map.json", "added_tokens.json"]])
def test_new_tokens_are_in_every_list(files: list[str], tmp_path: Path) -> None:
    decoder = {"1": {"content": "<|user|>", "special": True}}
    settings = {"added_tokens_decoder": decoder, "extra_special_tokens": {}, "add_bos_token": False}
    source = byte_tokenizer(tmp_path / "hf", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>", **settings)
    for name in files:
        (source / name).write_text(json.dumps({"eos_token": "<|end|>"} if "map" in name else {"<|user|>": 1}))
    written = written_of(source, tmp_path / "new", "<think>,</think>")
    size = len(read_tokenizer(source))
    entries = {number: token["content"] for number, token in written["added_tokens_decoder"].items()}
    assert entries == {"1": "<|user|>", str(size): "<think>", str(size + 1): "</think>"}
    assert written["additional_special_tokens"] == ["<think>", "</think>"] and written["add_bos_token"] is False
    if files:
        names = json.loads((tmp_path / "new" / files[0]).read_text())
        assert names == {"eos_token": "<|end|>", "additional_special_tokens": ["<think>", "</think>"]}
        added = json.loads((tmp_path / "new" / files[1]).read_text())
        assert added == {"<|user|>": 1, "<think>": size, "</think>": size + 1}


@pytest.mark.parametrize(
    ("stored", "written", "read"),
    [
        (None, None, "new"),
        ("old", "new", "new"),
        (
            [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}],
            [{"name": "default", "template": "new"}, {"name": "tool_use", "template": "tools"}],
            {"default": "new", "tool_use": "tools"},
        ),
    ],
)
def test_a_chat_template_takes_the_place_of_the_older_one(stored: Any, written: Any, read: Any, tmp_path: Path) -> None:
    """Readers older than chat_template.jinja read tokenizer_config.json only."""
    settings = {} if stored is None else {"chat_template": stored}
    source = byte_tokenizer(tmp_path / "hf", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>", **settings)
    config = written_of(source, tmp_path / "new", chat_template="new")
    assert config.get("chat_template") == written
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template == read
