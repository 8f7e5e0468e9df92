"""`convert-checkpoint doctor`: what of a folder is not understood, and which family is nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file
from test_multimodal import mtp_folder, nested_folder
from tiny_models import SHAPE, write_model
from transformers import AutoModelForCausalLM, FalconConfig, Glm4Config, LlamaConfig

from megatron_solopo.training.convert import main


def changed(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def report(folder: Path, capsys: pytest.CaptureFixture[str], status: int) -> list[str]:
    assert main(["doctor", str(folder)]) == status
    return capsys.readouterr().out.splitlines()


def test_a_folder_that_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "hf", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    lines = report(folder, capsys, 0)
    assert lines == ["weights: 12 of 12 kinds of tensors are those of llama", "all fields are understood: llama"]


def test_fields_and_weights_that_are_not_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "hf", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    changed(folder, mup_scale=0.5, attention_sinks=4)
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{layer}.self_attn.sinks": tensors["model.norm.weight"].clone() for layer in (0, 1)}
    save_file({name: x for name, x in (tensors | extra).items() if "norm" not in name}, folder / "model.safetensors")
    lines = report(folder, capsys, 1)
    assert "config.json: mup_scale = 0.5 is read by no code of llama" in lines
    assert "config.json: attention_sinks = 4 is read by no code of llama" in lines
    assert "the weights model.layers.{layer}.self_attn.sinks are in no table of llama" in lines
    assert "the weights model.norm.weight, which llama has, are missing" in lines
    assert "weights: 9 of 10 kinds of tensors are those of llama" in lines


@pytest.mark.parametrize("weights", [True, False])
def test_an_unknown_model_type_has_a_nearest_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: bool
) -> None:
    folder = write_model(tmp_path / "hf", Glm4Config(**SHAPE, head_dim=16, pad_token_id=0))
    changed(folder, model_type="glm99", router_scale=3)
    if not weights:
        (folder / "model.safetensors").unlink()
    first, *others = report(folder, capsys, 1)
    assert first == "model_type 'glm99' is of no family; the nearest is " + ("glm4" if weights else "glm")
    assert "config.json: router_scale = 3 is read by no code of " + ("glm4" if weights else "glm") in others


def test_a_value_that_is_refused_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "hf", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    assert any("mlp_bias = True" in line for line in report(changed(folder, mlp_bias=True), capsys, 1))


def test_what_is_carried_through_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of multi-token prediction, and an image encoder around a model that itself is understood."""
    mtp_folder(tmp_path / "glm")
    lines = report(tmp_path / "glm", capsys, 0)
    assert "weights: 3 beside the trained model are carried through, such as model.layers.2.eh_proj.weight" in lines
    assert lines[-1] == "all fields are understood: glm4_moe"
    lines = report(nested_folder("gemma3", tmp_path / "gemma3"), capsys, 0)
    assert lines[0] == "model_type 'gemma3': its text_config is that of the trained model"
    assert any("multi_modal_projector.mm_input_projection_weight" in line for line in lines)
    assert lines[-1] == "all fields are understood: gemma3_text"


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    with refused("model-config-missing", "MODEL ", "no config.json"):
        main(["doctor", str(tmp_path)])


def test_a_model_of_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of tensor is one line, and none of a family's is said to be missing."""
    model = AutoModelForCausalLM.from_config(FalconConfig(**{**SHAPE, "num_hidden_layers": 3}))
    model.save_pretrained(tmp_path / "hf")
    lines = report(tmp_path / "hf", capsys, 1)
    assert any(line.startswith("the weights transformer.h.{number}.mlp.dense_4h_to_h.weight are in") for line in lines)
    assert not any("missing" in line or ".h.1." in line for line in lines)
    assert any(line.startswith("weights: 0 of 9 kinds") for line in lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is of no family, because its attention caps scores"),
        ({"model_type": "llama99", "hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported"),
    ],
)
def test_values_that_the_nearest_family_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], said: str
) -> None:
    folder = write_model(tmp_path / "hf", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    assert any(said in line for line in report(changed(folder, **changes), capsys, 1))
