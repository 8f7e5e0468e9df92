"""Quantised and stacked weights of a folder: by value against transformers' dequantisers, and back without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from test_model_parity import CONFIGS, megatron_model, random_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_solopo.conversion.compare import compare
from megatron_solopo.conversion.quantized import WeightReader, fp8, mxfp4
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import read_hf_config


def drawn(*shape: int, high: int = 256, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def test_mxfp4_is_transformers_bit_for_bit() -> None:
    blocks, scales = drawn(3, 10, 2, 16), drawn(3, 10, 2, low=90, high=160)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (3, 64, 10)
    for place in range(3):
        ours = mxfp4(blocks[place], scales[place])
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected[place])


def test_fp8_is_transformers_bit_for_bit_and_has_blocks_at_the_edge() -> None:
    weight = torch.randn(2, 256, 384).to(torch.float8_e4m3fn)
    factors = torch.rand(2, 2, 3)
    assert torch.equal(fp8(weight, factors), Fp8Dequantize(None)._dequantize_one(weight, factors))
    ours = fp8(weight[0, :200, :130], factors[0, :, :2])  # the last blocks are 72 rows and 2 columns
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 129)):
        assert ours[row, column] == weight[0, row, column].float() * factors[0, row // 128, column // 128]


def quantized_gpt_oss(folder: Path) -> Path:
    """The parity test's model with drawn MXFP4 experts, as openai's folders hold them."""
    source = random_folder("gpt-oss", folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = tensors.pop(name).shape
        tensors[name + "_blocks"] = drawn(experts, out, inner // 32, 16)
        tensors[name + "_scales"] = drawn(experts, out, inner // 32, low=120, high=124)
    save_file(tensors, source / "model.safetensors")
    return with_config(source, quant_method="mxfp4", modules_to_not_convert=["lm_head"])


def with_config(folder: Path, **quantization: Any) -> Path:
    document = json.loads((folder / "config.json").read_text())
    document |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def quantized_llama(folder: Path) -> Path:
    """A model with FP8 matrices in its layers, of at most two blocks a side."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=211
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "hf")
    tensors = load_file(folder / "hf" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, inner = tensors[name].shape
        tensors[name] = torch.randn(out, inner).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.rand(-(-out // 128), -(-inner // 128)) / 16
    save_file(tensors, folder / "hf" / "model.safetensors")
    quantization = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128])
    return with_config(folder / "hf", **quantization)


@pytest.mark.parametrize("quantized", [quantized_gpt_oss, quantized_llama])
def test_a_quantized_folder_is_what_transformers_dequantizes(engine: Any, tmp_path: Path, quantized: Any) -> None:
    """The export is a bfloat16 folder of the same numbers without quantization_config."""
    from megatron_solopo.conversion.save_folder import save_folder

    source = quantized(tmp_path)
    hf_config, model = megatron_model(source, torch.bfloat16)
    save_folder([model], hf_config, source, tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    ours = load_file(tmp_path / "back" / "model.safetensors")
    ours.setdefault("lm_head.weight", ours["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys() and WeightReader(source).names() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], tensor.bfloat16()), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(again[name].bfloat16(), ours[name]) for name in ours)


@pytest.mark.parametrize("quantized", [quantized_gpt_oss, quantized_llama])
def test_a_quantized_folder_is_verified_against_its_weights(engine: Any, tmp_path: Path, quantized: Any) -> None:
    source = quantized(tmp_path)
    hf_config, model = megatron_model(source, torch.float32)
    comparison = compare(model, hf_config, source, [list(range(3, 40))])
    assert comparison is not None and comparison.largest < 1e-3


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),  # of Llama
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "'fp8'"),
        ({"quant_method": "fp8"}, "'fp8'"),  # a factor for each tensor
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], named: str) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    with refused("model-quantized", "config.json: quantization_config ", named, "unquantized"):
        family_of(read_hf_config(with_config(tmp_path, **quantization)))


def test_scales_of_another_block_size_are_refused(tmp_path: Path) -> None:
    source = quantized_gpt_oss(tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name][:, :, :1].clone()}, source / "model.safetensors")
    with refused("tensor-shape", name, "(4, 64, 3)"):
        WeightReader(source)


def stacked_folder(name: str, folder: Path) -> tuple[Path, Path]:
    """A folder with a tensor for each expert, and one of the same model with those of a layer in one."""
    source = random_folder(name, folder)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder / "stacked", save_original_format=False)
    return source, folder / "stacked"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_in_one_tensor_are_read_and_written(engine: Any, tmp_path: Path, name: str) -> None:
    from megatron_solopo.conversion.doctor import diagnose
    from megatron_solopo.conversion.save_folder import save_folder

    source, stacked = stacked_folder(name, tmp_path)
    before = load_file(stacked / "model.safetensors")
    assert before["model.layers.2.mlp.experts.gate_up_proj"].shape[0] == 4
    hf_config, model = megatron_model(stacked, torch.float32)
    _, separate = megatron_model(source, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), separate.parameters(), strict=True))
    save_folder([model], hf_config, stacked, tmp_path / "back", max_shard_size="100KB")
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 3
    after = WeightReader(tmp_path / "back")
    assert after.names() == before.keys()
    assert all(torch.equal(after.get(key), tensor) for key, tensor in before.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for folder in (stacked, source):
        assert diagnose(folder).understood
