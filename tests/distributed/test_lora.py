"""LoRA: gradients equal PEFT's on transformers in float64, in every layout; runs resume, also in other layouts."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from comparisons import BOUND, differences, largest_difference
from launches import BATCHES, SIX_STEPS, Launch, World, case_name, gradient_cases, launch, token_examples, training_run
from methods import LONG, METHODS, SHORT
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS
from torch import Tensor, nn
from transformers_in_double import by_file_name, load

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "wide-tied": {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    "wide-qwen3": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj", "down_proj"], "use_rslora": True},
    "qwen3_moe": {"r": 2, "lora_alpha": 3, "target_modules": ALL},
    "mixtral": {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj", "w1", "w2", "w3"]},
    "qwen3_5": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "up_proj", "in_proj_qkv", "in_proj_b", "out_proj"],
    },
    "glm4": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}
"""Model -> PEFT's settings of its adapters: of all projections; of some, rank-stabilised; of experts; of matrices whose
rows have another order here."""
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "data": (),
    "tensor": ("--tensor-model-parallel-size", 2),
    "sequence": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context": ("--context-parallel-size", 2),
    "overlap": ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 2000),
}
WITH_EXPERTS: dict[str, tuple[Any, ...]] = {
    "experts": ("--expert-model-parallel-size", 2),
    "experts tensor": ("--expert-tensor-parallel-size", 2),
    "experts gathered": LAYOUTS["sequence"],
    "experts sequence": (*LAYOUTS["sequence"], "--expert-tensor-parallel-size", 1, "--expert-model-parallel-size", 2),
}
FOUR = {
    "tensor context": (*LAYOUTS["sequence"], *LAYOUTS["context"]),
    "virtual stages": (*LAYOUTS["tensor"], *LAYOUTS["pipeline"], "--num-virtual-stages-per-pipeline-rank", 2),
}
DROPPED = ("--lora-dropout", 0.3, "--lora-modules", "q_proj,v_proj,gate_proj")
"""Of inputs that tensor-parallel ranks have alike."""
PLANS = [
    ("float64", "dpo", "wide-tied", "by-two", "seven"),
    ("float64", "simpo", "wide-qwen3", "recompute", "seven"),
    ("float32", "orpo", "wide-tied", "by-two", "seven"),
    ("float64", "dpo", "wide-tied", "tiles", "seven"),
    ("float64", "orpo", "wide-qwen3", "tiles-recompute", "seven"),
]
MOES = [
    ("float64", "dpo", "qwen3_moe", "by-two", "seven"),
    ("float64", "orpo", "mixtral", "recompute-offload", "seven"),
]
ORDERED = [
    (2, "sequence", ("float64", "dpo", "qwen3_5", "by-two", "seven")),
    (2, "context", ("float64", "dpo", "qwen3_5", "by-two", "seven")),
    (2, "tensor", ("float64", "simpo", "glm4", "by-two", "seven")),
]
CASES = [
    *((2, layout, plan) for layout in LAYOUTS for plan in PLANS),
    *ORDERED,
    *((2, layout, plan) for layout in WITH_EXPERTS for plan in MOES),
    *((4, layout, plan) for layout in FOUR for plan in (*PLANS[:2], PLANS[-1])),
]


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model -> a folder of adapters that PEFT wrote, none of them zero; those of experts in the form that PEFT reads
    with transformers 5 and does not write."""
    folders: dict[str, Path] = {}
    for name, settings in SETTINGS.items():
        torch.manual_seed(3)
        if name in ("qwen3_moe", "mixtral"):
            folders[name] = folder_of_experts(world, tmp_path_factory.mktemp("adapters") / name, name, settings)
            continue
        model = peft.get_peft_model(load(world.model(name)), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.1)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


def folder_of_experts(world: World, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """A folder with adapters of each expert, as PEFT wrote it with transformers 4."""
    tensors: dict[str, Tensor] = {}
    for key, matrix in load_file(world.model(name) / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in settings["target_modules"]:
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(settings["r"], matrix.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(matrix.shape[0], settings["r"])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def of_experts(names: Any, theirs: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Tensors by our names, from those of PEFT's model, which has A [experts x rank, in] and B [out, rank x experts]
    for all experts of a layer, and gate and up in one of twice the rank."""
    found = {name: match for name in names if (match := EXPERT.fullmatch(name))}
    ours = {name: tensor for name, tensor in theirs.items() if ".experts." not in name}
    for name, match in found.items():
        layer, expert, projection, part = match.groups()
        place = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}.get(projection)
        base, together = ("", 1) if place is None else ("base_layer.", 2)
        whole = theirs[f"{layer}.mlp.experts.{base}lora_{part}.weight"]
        if part == "A":
            ours[name] = whole.view(experts, -1, whole.shape[1])[int(expert)].chunk(together)[place or 0]
        else:
            each = whole.view(len(whole), -1, experts)[..., int(expert)]
            ours[name] = each.chunk(together)[place or 0].chunk(together, 1)[place or 0]
    return ours


def with_adapters(world: World, folders: dict[str, Path], name: str) -> nn.Module:
    return peft.PeftModel.from_pretrained(load(world.model(name)), folders[name], is_trainable=True).double()


@pytest.fixture(scope="module")
def adapted(world: World, folders: dict[str, Path], reference: list) -> Any:
    """(model, method, batch) -> losses and gradient of PEFT's model."""
    scores: dict[str, list[oracle.Scores]] = {}

    def of(name: str, method: str, batch: str) -> Any:
        if name not in scores:
            model = with_adapters(world, folders, name)
            trained = {key.replace(".default", ""): p for key, p in model.named_parameters() if p.requires_grad}
            scores[name] = []
            for example in token_examples(SHORT + LONG):
                sums, counts = oracle.log_probs(model, example)
                gradients = {
                    role: dict(
                        zip(trained, torch.autograd.grad(value, [*trained.values()], retain_graph=True), strict=True)
                    )
                    for role, value in sums.items()
                    if value.requires_grad
                }
                scores[name].append(oracle.Scores({r: s.detach() for r, s in sums.items()}, counts, gradients))
        chosen = [scores[name][i] for i in BATCHES[batch]]
        return oracle.batch(chosen, [reference[i] for i in BATCHES[batch]], METHODS[method])

    return of


def run(world: World, out: Path, name: str, *flags: Any, model: str = "wide-tied", **more: Any) -> dict[str, Any]:
    options = ("--preference-loss", "orpo", "--lora-rank", 4, "--lora-export", "adapter")
    return training_run(world, out, name, *SIX_STEPS[:-2], *options, *flags, model=model, **more)


@pytest.fixture(scope="module")
def gradients(
    world: World, folders: dict[str, Path], reference: list, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Launch]:
    """processes -> one launch with the gradients of all layouts of that size, when it is asked for."""

    @functools.cache
    def of(processes: int) -> Launch:
        out = tmp_path_factory.mktemp(f"gradients-{processes}")
        cases = []
        for layout, plan in ((layout, plan) for size, layout, plan in CASES if size == processes):
            flags = (*(LAYOUTS | WITH_EXPERTS | FOUR)[layout], "--lora-path", folders[plan[2]])
            [case] = gradient_cases(world, reference, out, [plan], flags)
            cases.append(case | {"name": f"{layout} {case['name']}"})
        return launch(processes, out, cases, [])

    return of


@pytest.fixture(scope="module")
def launches(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Launch]:
    """Runs of one process and of two."""
    out = tmp_path_factory.mktemp("lora")
    cut = (out / "one" / "whole", 2)
    one = [run(world, out / "one", "whole"), run(world, out / "one", "resumed", load=True, cut=cut)]
    one.append(run(world, out / "one", "dropped", *DROPPED))
    two = [run(world, out / "two", f"six {layout}", *LAYOUTS[layout]) for layout in ("data", "sequence")]
    two.append(run(world, out / "two", "dropped tensor", *DROPPED, *LAYOUTS["tensor"]))
    of_experts = ("--lora-modules", ",".join(ALL))
    one.append(run(world, out / "one", "mixture", *of_experts, model="mixtral"))
    cut_mixture, parallel = (out / "one" / "mixture", 2), WITH_EXPERTS["experts sequence"]
    more: dict[str, Any] = dict(model="mixtral", load=True, cut=cut_mixture)
    two.append(run(world, out / "two", "resumed mixture", *of_experts, *parallel, **more))
    for layout in ("sequence", "pipeline"):
        two.append(run(world, out / "two", f"resumed {layout}", *LAYOUTS[layout], load=True, cut=cut))
    return {1: launch(1, out / "one", [], one), 2: launch(2, out / "two", [], two)}


@pytest.mark.parametrize(
    ("processes", "layout", "plan"), CASES, ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else value
)
def test_gradients_are_pefts(
    gradients: Callable[[int], Launch], adapted: Any, processes: int, layout: str, plan: tuple[str, ...]
) -> None:
    launched, name = gradients(processes), f"{layout} {case_name(plan)}"
    dtype, method, model, _, batch = plan
    losses, gradient = adapted(model, method, batch)
    assert launched.results[name]["means"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=BOUND[dtype])
    gradient = of_experts(launched.gradients[name], gradient, EXPERTS["num_local_experts"])
    worst = differences(launched.gradients[name], gradient)
    assert max(worst.values()) <= BOUND[dtype], max(worst, key=worst.get)
    assert min(tensor.norm() for tensor in gradient.values()) > 0


def adapters(launched: Launch, name: str) -> dict[str, Tensor]:
    return load_file(launched.folder / f"{name}-hf" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *((name, "whole") for name in ("six data", "six sequence", "resumed sequence", "resumed pipeline")),
        ("dropped tensor", "dropped"),  # of one input the ranks drop the same
        ("resumed mixture", "mixture"),
    ],
)
def test_six_steps_equal_one_process_that_never_stopped(launches: dict[int, Launch], name: str, whole: str) -> None:
    assert launches[2].results[name] == "done"
    for ours, theirs in zip(launches[2].metrics(name), launches[1].metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ours, theirs = adapters(launches[2], name), adapters(launches[1], whole)
    assert largest_difference(ours, theirs) <= 1e-5 and min(tensor.norm() for tensor in theirs.values()) > 0


def test_a_resumed_run_has_the_same_bits(launches: dict[int, Launch]) -> None:
    whole, resumed = (adapters(launches[1], name) for name in ("whole", "resumed"))
    assert launches[1].results["resumed"] == "done"
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ["wide-tied", "mixtral", "qwen3_moe"])
def test_merged_matrices_are_pefts(world: World, folders: dict[str, Path], name: str) -> None:
    from megatron_solopo.conversion.adapters import merged

    model: Any = with_adapters(world, folders, name)
    model = model.merge_and_unload()
    theirs = by_file_name(model, dict(model.state_dict()))
    tensors = [(key, one.double()) for key, one in load_file(world.model(name) / "model.safetensors").items()]
    scale = SETTINGS[name]["lora_alpha"] / SETTINGS[name]["r"]
    ours = dict(merged(tensors, load_file(folders[name] / "adapter_model.safetensors"), scale))
    changed = 0
    for key, before in tensors:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-10, atol=1e-10)
        changed += int(not torch.equal(ours[key], before))
    assert changed == len(load_file(folders[name] / "adapter_model.safetensors")) // 2


def test_peft_loads_what_a_run_wrote(launches: dict[int, Launch], world: World) -> None:
    """PEFT's model with the adapters has the log-probs that the run had: its chosen answers became likelier."""
    folder = launches[1].folder / "whole-hf"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    base = load(world.model("wide-tied"))
    example = token_examples(SHORT + LONG)[0]
    with torch.no_grad():
        before, _ = oracle.log_probs(copy.deepcopy(base), example)
        after, _ = oracle.log_probs(peft.PeftModel.from_pretrained(base, folder).double(), example)
    assert all(abs(after[role] - before[role]) > 1e-6 for role in before if not role.endswith("tail"))
