"""Folders of models that also read images: their language model is trained, all other tensors are carried through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from test_model_parity import (
    GEMMA3,
    GEMMA4,
    LINEAR,
    LINEAR_MOE,
    SMALL,
    megatron_model,
    random_group,
    run_pack,
    transformers_log_probs,
)
from tiny_models import write_model
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    Glm4MoeConfig,
    Mistral3Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)

from megatron_solopo.conversion.quantized import fp8
from megatron_solopo.data.tokenized.packs import build_pack

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
PIXTRAL = VISION | dict(model_type="pixtral", head_dim=8, patch_size=14)
QWEN3_5 = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=14, out_hidden_size=64)
GEMMA4_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
GEMMA4_VISION |= dict(num_key_value_heads=2, head_dim=8, position_embedding_size=32)
MINISTRAL3 = SMALL | dict(model_type="ministral3", head_dim=24, max_position_embeddings=262144)
CONFIGS = {
    "gemma3": Gemma3Config(text_config=SMALL | GEMMA3, vision_config=VISION | dict(patch_size=14)),
    "gemma4": Gemma4Config(
        text_config=SMALL | GEMMA4 | dict(pad_token_id=0, hidden_size_per_layer_input=0, attention_k_eq_v=True),
        vision_config=GEMMA4_VISION,
    ),
    "gemma4-unified": Gemma4UnifiedConfig(
        text_config=SMALL | GEMMA4 | dict(pad_token_id=0, model_type="gemma4_unified_text"),
        vision_config=dict(patch_size=2, mm_embed_dim=16, mm_posemb_size=16, output_proj_dims=64),
    ),
    "mistral-small-3": Mistral3Config(
        text_config=SMALL | dict(model_type="mistral", head_dim=24, sliding_window=None),
        vision_config=PIXTRAL,
        tie_word_embeddings=False,
    ),
    "ministral-3": Mistral3Config(text_config=MINISTRAL3, vision_config=PIXTRAL, tie_word_embeddings=True),
    "qwen3-5": Qwen3_5Config(text_config=SMALL | LINEAR, vision_config=QWEN3_5),
    "qwen3-5-moe": Qwen3_5MoeConfig(text_config=LINEAR_MOE, vision_config=QWEN3_5),
}
OF_LATER_NAMES = ("gemma4", "gemma4-unified", "qwen3-5", "qwen3-5-moe")
PUBLISHED, LATER = "language_model.model.", "model.language_model."


def nested_folder(name: str, folder: Path, later: bool = False) -> Path:
    """A folder of random weights, with the names of published folders or, where those differ, of later families."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name])
    with torch.no_grad():
        scalars = (x for name, x in model.named_buffers() if name.endswith("layer_scalar"))
        for parameter in (*model.parameters(), *scalars):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if later:
        tensors = load_file(folder / "model.safetensors")
        save_file({_later(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _later(name: str) -> str:
    if name.startswith("language_model."):
        return name.replace(PUBLISHED, LATER).replace("language_model.lm_head", "lm_head")
    return f"model.{name}"


@pytest.mark.parametrize(
    ("name", "later"),
    [(name, later) for name in CONFIGS for later in (False, True) if not (later and name in OF_LATER_NAMES)],
)
def test_a_language_model_inside_another(engine: Any, name: str, later: bool, tmp_path: Path) -> None:
    """Log-probs equal the whole model's on text, and the export has every tensor's bits and config.json's fields."""
    from megatron_solopo.conversion.save_folder import save_folder

    folder = nested_folder(name, tmp_path / "hf", later)
    hf_config, model = megatron_model(folder, torch.float32)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    groups = [random_group(1), random_group(2)]
    ours = run_pack(hf_config, model, build_pack(groups, range(2)), torch.float32)
    with torch.no_grad():
        expected = torch.cat([transformers_log_probs(theirs, group) for group in groups])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    save_folder([model], hf_config, folder, tmp_path / "back")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any("vis" in key for key in before)
    old, new = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "back"))
    inner, ours = old.pop("text_config"), new.pop("text_config")
    # transformers 4 reads RoPE's base beside the other fields, see `rope_scaling.write`
    added = set() if name.startswith("gemma") else {"torch_dtype"}
    assert new.keys() - old.keys() == added and new.items() >= old.items()
    rope = {"rope_parameters", "partial_rotary_factor"}
    assert all(ours[field] == value for field, value in inner.items() if field not in rope)


def test_quantized_experts_in_one_tensor_inside_another_model(engine: Any, tmp_path: Path) -> None:
    """Weights are dequantised, also of the encoder, and layers of multi-token prediction are carried through."""
    from megatron_solopo.conversion.save_folder import save_folder

    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(CONFIGS["qwen3-5-moe"]).bfloat16()
    model.save_pretrained(tmp_path / "hf", save_original_format=False)
    before = load_file(tmp_path / "hf" / "model.safetensors") | {"mtp.fc.weight": torch.randn(64, 128).bfloat16()}
    stored, expected = dict(before), dict(before)
    for name, tensor in before.items():
        if ".mlp.experts." in name or name == "model.visual.merger.linear_fc1.weight":
            factors = torch.rand(*tensor.shape[:-2], 1, 1)
            stored[name] = (tensor / factors).to(torch.float8_e4m3fn)
            expected[name] = fp8(stored[name], factors).bfloat16()
            stored[name + "_scale_inv"] = factors
    assert "model.language_model.layers.2.mlp.experts.gate_up_proj_scale_inv" in stored
    save_file(stored, tmp_path / "hf" / "model.safetensors")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    document["text_config"] |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    document["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(document))
    hf_config, model = megatron_model(tmp_path / "hf", torch.bfloat16)
    save_folder([model], hf_config, tmp_path / "hf", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_what_is_carried_keeps_its_dtype(engine: Any, tmp_path: Path) -> None:
    """And trained tensors do not come from the source folder."""
    from megatron_solopo.conversion.save_folder import save_folder

    folder = nested_folder("gemma3", tmp_path / "hf")
    hf_config, model = megatron_model(folder, torch.bfloat16)
    with torch.no_grad():
        model.decoder.final_layernorm.weight.fill_(0.5)
    save_folder([model], hf_config, folder, tmp_path / "back", max_shard_size="100KB")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    after = {key: load_file(tmp_path / "back" / file)[key] for key, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    before = load_file(folder / "model.safetensors")
    for key, tensor in before.items():
        trained = key.startswith("language_model.")
        assert after[key].dtype == (torch.bfloat16 if trained else torch.float32)
        assert trained or torch.equal(after[key], tensor)
    assert (after["language_model.model.norm.weight"] == 0.5).all()
    document = json.loads((tmp_path / "back" / "config.json").read_text())
    assert document["dtype"] == "bfloat16" and document["text_config"]["vocab_size"] == 211


def test_a_longer_model_is_written_into_the_text_config(tmp_path: Path) -> None:
    from megatron_solopo.conversion.sidecar_files import config_json
    from megatron_solopo.model.hf_config import read_hf_config

    CONFIGS["mistral-small-3"].save_pretrained(tmp_path)
    extended = read_hf_config(tmp_path, "yarn:4:512")
    before = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(config_json(tmp_path, extended, torch.float32))
    after = json.loads((tmp_path / "config.json").read_text())
    assert after["text_config"]["max_position_embeddings"] == 2048
    assert read_hf_config(tmp_path).rope_parameters["rope_type"] == "yarn"
    assert before["vision_config"] == after["vision_config"]
    assert not {"rope_theta", "max_position_embeddings", "rope_parameters"} & after.keys()


def test_an_export_needs_the_tensors_that_it_carries(tmp_path: Path) -> None:
    from megatron_solopo.conversion.hf import beside_of
    from megatron_solopo.model.hf_config import read_hf_config

    CONFIGS["gemma3"].save_pretrained(tmp_path / "nested")
    with refused("weights-missing", f"{tmp_path / 'nested'}: ", "gemma3"):
        beside_of(tmp_path / "nested", read_hf_config(tmp_path / "nested"))
    CONFIGS["gemma3"].text_config.save_pretrained(tmp_path / "alone")
    assert beside_of(tmp_path / "alone", read_hf_config(tmp_path / "alone")) is None


def mtp_folder(folder: Path) -> dict[str, torch.Tensor]:
    """A GLM-4.5 folder with a layer of multi-token prediction behind the model's; returns that layer's tensors."""
    config = Glm4MoeConfig(
        **SMALL | dict(num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
        head_dim=24,
        pad_token_id=None,
        num_nextn_predict_layers=1,
    )
    write_model(folder, config)
    tensors = load_file(folder / "model.safetensors")
    mtp = {
        "model.layers.2.eh_proj.weight": torch.randn(64, 128),
        "model.layers.2.mlp.gate.e_score_correction_bias": torch.randn(4),
        "model.layers.2.enorm.weight": torch.randn(64).bfloat16(),
    }
    save_file(tensors | mtp, folder / "model.safetensors")
    return mtp


def test_layers_of_multi_token_prediction_are_carried_through(engine: Any, tmp_path: Path) -> None:
    from megatron_solopo.conversion.save_folder import save_folder

    mtp = mtp_folder(tmp_path / "hf")
    hf_config, model = megatron_model(tmp_path / "hf", torch.bfloat16)
    save_folder([model], hf_config, tmp_path / "hf", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == load_file(tmp_path / "hf" / "model.safetensors").keys()
    for name, tensor in mtp.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    router = "model.layers.1.mlp.gate."
    assert after[router + "e_score_correction_bias"].dtype == torch.float32
    assert after[router + "weight"].dtype == torch.bfloat16


def test_a_layer_beyond_those_of_multi_token_prediction_is_left_over(tmp_path: Path) -> None:
    from megatron_solopo.conversion.start import check_weights
    from megatron_solopo.model.hf_config import read_hf_config

    mtp_folder(tmp_path)
    check_weights(tmp_path, read_hf_config(tmp_path), 256)
    document = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with refused("tensor-left-over", "'model.layers.2.eh_proj.weight'", "3 such"):
        check_weights(tmp_path, read_hf_config(tmp_path), 256)


def test_a_megatron_folder_carries_nothing(tmp_path: Path) -> None:
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.convert_weights import all_trained

    mtp_folder(tmp_path)
    with refused("folder-carries", f"--hf-path {tmp_path}: ", "multi-token prediction"):
        all_trained(str(tmp_path), read_hf_config(tmp_path))
