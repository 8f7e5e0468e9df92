"""LoRA: gradients equal PEFT's on transformers in float64, in every layout; runs resume, also in other layouts."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from comparisons import BOUND, differences, largest_difference
from launches import BATCHES, SIX_STEPS, Launch, World, case_name, gradient_cases, launch, token_examples, training_run
from methods import LONG, METHODS, SHORT
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers_in_double import load

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "wide-tied": {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    "wide-qwen3": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj", "down_proj"], "use_rslora": True},
    "qwen3_moe": {"r": 2, "lora_alpha": 3, "target_modules": ALL[:4]},
}
"""Model -> PEFT's settings of its adapters: of all projections; of some, rank-stabilised; beside experts."""
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
MOE = ("float64", "dpo", "qwen3_moe", "by-two", "seven")
CASES = [
    *((2, layout, plan) for layout in LAYOUTS for plan in PLANS),
    *((2, layout, MOE) for layout in WITH_EXPERTS),
    *((4, layout, plan) for layout in FOUR for plan in (*PLANS[:2], PLANS[-1])),
]


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model -> a folder of adapters that PEFT wrote, none of them zero."""
    folders: dict[str, Path] = {}
    for name, settings in SETTINGS.items():
        torch.manual_seed(3)
        model = peft.get_peft_model(load(world.model(name)), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.1)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


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


def run(world: World, out: Path, name: str, *flags: Any, **more: Any) -> dict[str, Any]:
    options = ("--preference-loss", "orpo", "--lora-rank", 4, "--lora-export", "adapter")
    return training_run(world, out, name, *SIX_STEPS[:-2], *options, *flags, model="wide-tied", **more)


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
