"""LoRA beside matrices that a family holds in an order of its own: PEFT's folders in and out, log-probs, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from test_families import small
from test_model_parity import CONFIGS, random_folder, random_group, run_pack, transformers_log_probs
from test_multimodal import nested_folder
from test_recompute import FULL, LORA, built, options
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, Phi3Config
from transformers_in_double import load

from megatron_solopo.config import ModelConfig
from megatron_solopo.data.tokenized.packs import build_pack

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
RECURRENT = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
MODULES = {
    "gpt-oss": ATTENTION,
    "gemma4": [*ATTENTION, *MLP],
    "glm4": [*ATTENTION, "down_proj"],
    "glm4-moe-groups-and-biases": ATTENTION,
    "phi3": ["o_proj", "down_proj"],
    "qwen3-5": [*ATTENTION, *MLP, *RECURRENT],
    "qwen3-next": ["q_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
}
NESTED = {"gemma3": [*ATTENTION, *MLP], "qwen3-5": ["q_proj", "down_proj", "in_proj_qkv", "out_proj"]}


def adapted(model: Any, modules: Any, folder: Path) -> Any:
    """PEFT's model with adapters that are not zero, which it saved in a folder."""
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=modules)
    model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


def trained_by(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def ours_with(hf: Path, adapters: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    from megatron_solopo.conversion.adapters import check_adapters, start_adapters
    from megatron_solopo.conversion.hf_weights import HfWeights
    from megatron_solopo.model.build import build_model
    from megatron_solopo.model.hf_config import read_hf_config

    hf_config, flags = read_hf_config(hf), options("--lora-path", adapters)
    check_adapters(flags.model, hf_config)
    model = build_model(hf_config, flags, dtype).train()
    HfWeights(hf, [model], hf_config).fill_all()
    start_adapters([model], hf_config, flags.model, 0)
    return hf_config, flags.model, model


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_pefts_and_the_folder_is(engine: Any, name: str, tmp_path: Path) -> None:
    from megatron_solopo.conversion.adapters import adapter_entries, save_adapters

    torch.manual_seed(3)
    hf = random_folder(name, tmp_path)
    theirs = adapted(load(hf), MODULES[name], tmp_path / "adapters").double()
    hf_config, chosen, model = ours_with(hf, tmp_path / "adapters", torch.float64)
    groups = [random_group(1), random_group(2)]
    expected = torch.cat([transformers_log_probs(theirs, group) for group in groups])
    actual = run_pack(hf_config, model, build_pack(groups, range(2)), torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)
    actual.sum().backward()
    expected.sum().backward()
    trained, seen = trained_by(theirs), set()
    for entry, (key,), parameter in adapter_entries(model, hf_config):
        [gradient] = entry.operator.to_hf(parameter.grad)
        assert (gradient - trained[key].grad).norm() <= 1e-10 * trained[key].grad.norm(), key
        seen.add(key)
    assert seen == trained.keys()
    save_adapters([model], hf_config, chosen, tmp_path / "back")
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("adapters", "back"))
    assert before.keys() == after.keys() and all(
        torch.equal(before[key].double(), after[key].double()) for key in before
    )


@pytest.mark.parametrize("name", NESTED)
def test_adapters_of_the_language_model_inside_another(engine: Any, name: str, tmp_path: Path) -> None:
    """PEFT finds the projections of the language model alone, though an encoder of images has some of these names."""
    from megatron_solopo.conversion.adapters import save_adapters

    hf = nested_folder(name, tmp_path / "hf")
    whole = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    inside = rf".*\.language_model\..*\.({'|'.join(NESTED[name])})"
    theirs = adapted(whole, inside, tmp_path / "adapters")
    settings = tmp_path / "adapters" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_modules": NESTED[name]}))
    hf_config, chosen, model = ours_with(hf, tmp_path / "adapters", torch.float32)
    group = random_group(1)
    with torch.no_grad():
        expected = transformers_log_probs(theirs, group)
        actual = run_pack(hf_config, model, build_pack([group], [0]), torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    save_adapters([model], hf_config, chosen, tmp_path / "back")
    base = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "back", is_trainable=True)
    before, after = trained_by(theirs), trained_by(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ours_with(hf, tmp_path / "back", torch.float32)


def test_projections_without_a_tensor_are_refused() -> None:
    from megatron_solopo.conversion.adapters import check_adapters

    hf_config = small(Phi3Config)
    with refused(
        "adapter-unsupported", "--lora-modules: ", "phi3", "no matrix q_proj", "name some of o_proj,down_proj"
    ):
        check_adapters(ModelConfig(lora_rank=2), hf_config)
    with refused("adapter-unsupported", "--lora-modules: ", "no matrix in_proj_z"):
        check_adapters(ModelConfig(lora_rank=2, lora_modules="o_proj,in_proj_z"), hf_config)
    check_adapters(ModelConfig(lora_rank=2, lora_modules="o_proj,down_proj"), hf_config)


class Batched(TorchDispatchMode):
    """Notes how many pairs of matrices each batched product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.batches.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [(), FULL], ids=["kept", "recomputed"])
def test_a_frozen_matrix_is_multiplied_with_all_tokens_at_once(engine: Any, flags: tuple[Any, ...]) -> None:
    """A batched product would copy the matrix for every token."""
    pack = build_pack([random_group(1, ((20, (6,)),))], [0])
    with Batched() as noted:
        run_pack(CONFIGS["llama"], built("llama", *LORA, *flags), pack, torch.float64).sum().backward()
    assert len(pack.tokens) not in noted.batches
