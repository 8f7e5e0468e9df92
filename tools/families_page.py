#!/usr/bin/env python3
"""docs/families.md: every model family with measured distances from transformers (`make families-page`).

The tiny models are those of tests/unit/test_model_parity.py: random weights, norms and biases; each figure is the
largest of a family's configurations.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "unit"):
    sys.path.insert(0, str(folder))

ABOUT = """\
# Model families

A folder is read by the `model_type` of its config.json, of a model with images by that of its `text_config`:

| model_type | published models |
|---|---|
| deepseek_v2, deepseek_v3 | DeepSeek-V2, DeepSeek-V3, DeepSeek-R1 |
| gemma3_text, inside gemma3 | Gemma 3 |
| gemma4_text, inside gemma4; gemma4_unified_text, inside gemma4_unified | Gemma 4 31B; 12B (not E2B, E4B, 26B-A4B) |
| glm, glm4 | GLM-4-9B, GLM-4-0414 |
| glm4_moe | GLM-4.5, GLM-4.6 and their Air |
| glm4_moe_lite | GLM-4.7-Flash |
| gpt_oss | gpt-oss-20b, gpt-oss-120b |
| llama | Llama 2 to 3.3, SmolLM2, DeepSeek-R1-Distill-Llama |
| ministral; ministral3, inside mistral3 | Ministral; Ministral 3 |
| mistral, also inside mistral3 | Mistral 7B, Mistral Nemo, Mistral Small 3 |
| mixtral | Mixtral |
| olmo2, olmo3 | OLMo 2, OLMo 3 |
| phi3 | Phi-3, Phi-4 |
| qwen2 | Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen |
| qwen3, qwen3_moe | Qwen3 |
| qwen3_5_text, qwen3_5_moe_text, inside qwen3_5, qwen3_5_moe | Qwen3.5, Qwen3.6 |
| qwen3_next | Qwen3-Next |
| smollm3 | SmolLM3 |

`solopo convert-checkpoint doctor MODEL` says of any other folder what is not understood, and which family is nearest
([another family](adding-a-model.md)). What is trained with each family's chat template is in
[data-storage.md](data-storage.md#a-response-is-what-follows-the-generation-prompt), what LoRA adapts in
[lora.md](lora.md#families).

## Distances from transformers

`make families-page` generates this page: it builds the tiny models of `tests/unit/test_model_parity.py` (random
weights, norms and biases, 211 rows of vocabulary), and compares them with transformers on a CPU. A figure is the
largest of a family's configurations.

- *log-probs*: largest difference of a response's summed log-prob from transformers', nats, in float32 and in float64;
- *gradients*: largest distance of a tensor's gradient from transformers', relative to its norm (at least 1e-3),
  in float64;
- *shared*: largest difference between prompts that responses share and a prompt for each response, nats, in float64;
- *export*: whether every tensor of the exported folder has the bits of the folder that was loaded;
- *layouts*: tp, sp, pp and cp in two processes, or more ways on two to eight, have the oracle's gradient
  (`tests/distributed`); *as another*: every kind of its parameters is one of a family that is compared.

One of the two configurations of `qwen3_5_text` has an rms_norm_eps of 1e-5. With Qwen3.5's 1e-6 it is 2.1e-5 nats from
transformers in float32, 1.9e-5 from its own float64, and transformers is 1.8e-5 from that.
One of `gemma4_text` is 1.1e-5 from transformers in float32, three units in the last place of a sum beyond 32. It is
1.0e-5 from float64 and transformers 2.9e-6; with the other configuration 7.2e-6 and 1.1e-5.

| family | configurations | log-probs float32 | log-probs float64 | gradients | shared | export | layouts | lines |
|---|---|---|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """The measured figures of a configuration."""

    float32: float
    float64: float
    gradients: float
    shared: float
    export: bool


def measure(name: str, folder: Path) -> Row:
    """Measures one of test_model_parity's configurations."""
    import test_model_parity as parity
    import torch
    import transformers_in_double
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_solopo.conversion.adapters import trained_entries
    from megatron_solopo.conversion.save_folder import save_folder
    from megatron_solopo.data.tokenized.packs import build_pack

    hf_folder = parity.random_folder(name, folder)
    groups = [parity.random_group(seed) for seed in (1, 2)] + [parity.random_group(3, ((90, (4, 11)),))]

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one.double() - other.double()).abs().max().item()

    def ours(model: Any, hf_config: Any, dtype: torch.dtype, share: bool = True) -> torch.Tensor:
        return parity.run_pack(hf_config, model, build_pack(groups, range(3), share), dtype)

    hf_config, model = parity.megatron_model(hf_folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([parity.transformers_log_probs(theirs, group) for group in groups])
        float32 = distance(ours(model, hf_config, torch.float32), expected)
    save_folder([model], hf_config, hf_folder, folder / "back")
    before, after = (load_file(each / "model.safetensors") for each in (hf_folder, folder / "back"))
    export = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    hf_config, model = parity.megatron_model(hf_folder, torch.float64)
    theirs = transformers_in_double.load(hf_folder)
    sums = ours(model, hf_config, torch.float64)
    expected = torch.cat([parity.transformers_log_probs(theirs, group) for group in groups])
    with torch.no_grad():
        shared = distance(sums, ours(model, hf_config, torch.float64, share=False))
    weights = torch.arange(1, len(sums) + 1)
    (sums * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    gradients = transformers_in_double.by_file_name(theirs, gradients)
    worst = 0.0
    for entry, names, parameter in trained_entries(model, hf_config):
        for key, gradient in zip(names, entry.operator.to_hf(parameter.grad), strict=True):
            worst = max(worst, ((gradient - gradients[key]).norm() / gradients[key].norm().clamp(min=1e-3)).item())
    return Row(float32, distance(sums.detach(), expected.detach()), worst, shared, export)


def layouts_of(model_type: str) -> str:
    """Names the tests of tests/distributed that have a model of this type."""
    sources = [(ROOT / "tests" / "distributed" / name).read_text() for name in ("conftest.py", "test_experts.py")]
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type].__name__
    return "oracle" if any(f"{kind}(**" in source for source in sources) else "as another"


def source_of(model_type: str) -> Path:
    """Returns the file that declares a family."""
    files = sorted((ROOT / "megatron_solopo" / "model" / "families").glob("*.py"))
    return next(file for file in files if file.name != "__init__.py" and f'"{model_type}"' in file.read_text())


def rows() -> Iterator[str]:
    """Yields the table's rows, a family each."""
    import test_model_parity as parity

    from megatron_solopo.model.families.registry import FAMILIES
    from megatron_solopo.parallel import platform

    here = platform.start("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    for model_type in sorted(FAMILIES):
        measured = []
        for name, config in parity.CONFIGS.items():
            if config.model_type == model_type:
                with tempfile.TemporaryDirectory() as folder:
                    measured.append(measure(name, Path(folder)))
        columns = [max(column) for column in list(zip(*measured, strict=True))[:4]]
        source = source_of(model_type)
        lines = len(source.read_text().splitlines())
        yield (
            f"| {model_type} | {len(measured)} | {' | '.join(f'{value:.0e}' for value in columns)} | "
            f"{'bit-equal' if all(row.export for row in measured) else 'differs'} | {layouts_of(model_type)} | "
            f"`{source.name}` {lines} |"
        )
    platform.stop(here)


def page() -> str:
    """Returns the page's text."""
    return ABOUT + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
