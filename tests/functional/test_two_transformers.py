"""Exported folders in transformers 4 and 5: the same ids, log-probs, stops and chats, each version in another process.

Needs an interpreter with transformers 4.57, named by SOLOPO_TRANSFORMERS4; `make test-transformers4` makes one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EXPERTS, QWEN3_MOE, SHAPE, TEMPLATE, byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo.cli import run
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.training import convert

PROGRAM = Path(__file__).parent.parent / "read_folders.py"
OTHER = os.environ.get("SOLOPO_TRANSFORMERS4")
pytestmark = pytest.mark.skipif(
    not OTHER,
    reason="SOLOPO_TRANSFORMERS4 is not set; name a Python with transformers 4.57, or make test-transformers4",
)
BOUND = 1e-5
TEXTS = ["The quick fox, 1,234.56 € in 2026", "  two\n\n\tw ", "½ 12 34 Größe 東京", "", "</s>hi <|user|> hi <think>x"]
SIZES: dict[str, Any] = SHAPE | {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5}),
    "llama-tied-llama3": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral-linear": MistralConfig(
        **SIZES, sliding_window=None, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral-window": MistralConfig(**SIZES, sliding_window=64, rope_parameters={"rope_theta": 1e6}),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "mixtral-yarn": MixtralConfig(**SIZES, **EXPERTS, rope_parameters=YARN, head_dim=8),
    "qwen2-tied-yarn": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rope_parameters={"rope_theta": 1e6}),
    "qwen3-yarn": Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN | {"attention_factor": 1.3}),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, **QWEN3_MOE, rope_parameters={"rope_theta": 1e6}),
}
for _config in FAMILIES.values():
    _config.dtype = "float32"


def read(python: str, folders: list[Path], tmp: Path, save: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a version of transformers reads of folders, by name; see tests/read_folders.py."""
    job = tmp / f"job-{len(list(tmp.glob('job-*')))}.json"
    job.write_text(json.dumps({"folders": [*map(str, folders)], "texts": TEXTS, "save": save and str(save)}))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(PROGRAM), str(job)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What two versions read otherwise of a folder."""
    for one in (ours, theirs):
        if "error" in one:
            return one["error"]
    ours, theirs = dict(ours), dict(theirs)
    assert ours.pop("version")[0] != theirs.pop("version")[0]
    pairs = zip(ours.pop("log_probs", [0.0]), theirs.pop("log_probs", [0.0]), strict=True)
    worst = max(abs(one - other) for one, other in pairs)
    named = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    return f"{sorted(named)}, log-probs {worst}" if named or not worst <= BOUND else None


def differences(folders: list[Path], tmp: Path, save: Path | None = None) -> dict[str, str]:
    fours, fives = read(OTHER, folders, tmp, save), read(sys.executable, folders, tmp)
    assert all(one.get("version", "4.57").startswith("4.57") for one in fours.values())
    differing = {name: difference(fours[name], fives[name]) for name in fours}
    return {name: text for name, text in differing.items() if text is not None}


def exported(source: Path, target: Path, *to_megatron: str) -> Path:
    """A folder there and back, by the commands."""
    megatron = target.parent / f"{target.name}-megatron"
    command = ["hf-to-megatron", "--hf-path", str(source), "--save", str(megatron), *to_megatron]
    assert run(convert.main, command) == 0
    assert run(convert.main, ["megatron-to-hf", "--load", str(megatron), "--save-hf", str(target)]) == 0
    shutil.rmtree(megatron)
    return target


def source_of(folder: Path, config: PretrainedConfig) -> Path:
    """As transformers 5 writes it: random weights, moved off their initial values."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    name = "Qwen2Tokenizer" if config.model_type.startswith("qwen") else "TokenizersBackend"
    special: dict[str, Any] = {"eos_token": "<|end|>", "extra_special_tokens": ["<|user|>"], "backend": "tokenizers"}
    settings = special | {"tokenizer_class": name, "is_local": True, "chat_template": TEMPLATE}
    byte_tokenizer(folder, config.model_type, digits=not name.startswith("Qwen"), **settings)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sources/ written by transformers 5, exported/ of them, with tokens and with yarn too."""
    world = tmp_path_factory.mktemp("world")
    for name in ("sources", "exported", "again"):
        (world / name).mkdir()
    for name, config in FAMILIES.items():
        exported(source_of(world / "sources" / name, config), world / "exported" / name)
    exported(world / "sources" / "llama", world / "exported" / "llama-tokens", "--add-special-tokens", "<think>,<more>")
    exported(world / "sources" / "qwen3", world / "exported" / "qwen3-tokens", "--add-special-tokens", "<think>,<more>")
    return world


def test_exports_of_transformers_5_are_read_alike_by_both(world: Path, tmp_path: Path) -> None:
    folders = sorted((world / "exported").iterdir())
    assert differences(folders, tmp_path) == {}


def test_files_of_transformers_4_stay_as_they_are(world: Path, tmp_path: Path) -> None:
    """Weights bit for bit, and every file that both versions read alike."""
    written, back = tmp_path / "written", tmp_path / "back"
    written.mkdir(), back.mkdir()
    assert differences(sorted((world / "exported").iterdir()), tmp_path, written) == {}
    for source in sorted(written.iterdir()):
        target = exported(source, back / source.name)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, source))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        names = {path.name for path in source.iterdir()} - {"model.safetensors"}
        changed = [name for name in names if (target / name).read_bytes() != (source / name).read_bytes()]
        assert changed == [], source.name
    assert differences(sorted(back.iterdir()), tmp_path) == {}


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def of_bytes(**settings: Any) -> Callable[[Path, Path], Path]:
    return lambda folder, data: byte_tokenizer(folder, eos_token="<|end|>", bos_token="<|user|>", **settings)


def of_sentencepiece(model_type: str, name: str = "mistral/tokenizer.model.v1", **settings: Any) -> Callable:
    def make(folder: Path, data: Path) -> Path:
        folder.mkdir()
        shutil.copyfile(data / "tokenizers" / name, folder / "tokenizer.model")
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | settings))
        return folder

    return make


TOKENIZERS: dict[str, Callable[[Path, Path], Path]] = {
    "file": of_bytes(tokenizer_class="PreTrainedTokenizerFast"),
    "gpt2": of_bytes(tokenizer_class="GPT2Tokenizer", add_prefix_space=False),
    "llama-bytes": of_bytes(tokenizer_class="LlamaTokenizerFast", add_bos_token=True),
    "llama-bytes-no-bos": of_bytes(tokenizer_class="LlamaTokenizerFast", add_bos_token=False, add_eos_token=True),
    "llama-bytes-default": of_bytes(tokenizer_class="LlamaTokenizerFast"),
    "python": of_bytes(tokenizer_class="PythonBackend", extra_special_tokens=["<|user|>"]),
    "named": of_bytes(tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens={"image_token": "<|user|>"}),
    "no-class": of_bytes(),
    "llama-2": of_sentencepiece("llama"),
    "llama-2-legacy": of_sentencepiece("llama", legacy=True),
    "llama-2-not-legacy": of_sentencepiece("llama", legacy=False),
    "mistral": of_sentencepiece("mistral", "mistral/mistral_instruct_tokenizer_240323.model.v3", legacy=False),
    "mixtral-no-bos": of_sentencepiece("mixtral", add_bos_token=False),
    "unigram": of_sentencepiece("llama", "sentencepiece_test/test_model.model"),
}


@pytest.mark.parametrize("added", [None, "<think>,<more>"])
def test_tokenizers_of_every_class_have_the_same_ids(solopo_data: Path, tmp_path: Path, added: str | None) -> None:
    """Of a folder, of what transformers 5 makes of it, and of what 4 makes of what was exported of those."""
    for name in ("sources", "fives", "fours"):
        (tmp_path / name).mkdir()
    sources = [make(tmp_path / "sources" / name, solopo_data) for name, make in TOKENIZERS.items()]
    read(sys.executable, sources, tmp_path, tmp_path / "fives")
    first = [export_tokenizer(source, tmp_path / "exported" / source.name, added) for source in sources]
    for source in sorted((tmp_path / "fives").iterdir()):
        first.append(export_tokenizer(source, tmp_path / "exported" / f"5-{source.name}", added))
    assert differences(first, tmp_path, tmp_path / "fours") == {}
    again = [export_tokenizer(path, tmp_path / "again" / path.name) for path in sorted((tmp_path / "fours").iterdir())]
    assert len(again) == len(first) and differences(again, tmp_path) == {}


def export_tokenizer(source: Path, target: Path, added: str | None = None) -> Path:
    target.mkdir(parents=True)
    SidecarFiles(source, (source / "config.json").read_text(), added_tokens=added).write(target)
    return target
