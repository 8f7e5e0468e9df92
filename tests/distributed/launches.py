"""The launches of this folder: gradients of every layout, and complete runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import worker
from forked_runs import ForkedRun
from methods import METHODS, OPTIONS, has_reference, method_flags, method_roles
from option_lines import last_wins
from safetensors.torch import load_file
from tiny_models import SHAPE
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

LAYOUTS: dict[str, list[Any]] = {
    "packed": ["--micro-batch-size", 8],
    "by-two": ["--micro-batch-size", 2],
    "one-by-one": ["--micro-batch-size", 1],
    "separate": ["--micro-batch-size", 3, "--no-share-prompts"],
    "padded": ["--micro-batch-size", 1],  # with multiple_of, and every piece to half of it
    "by-tokens": ["--micro-batch-size", 8, "--max-tokens-per-rank", 160, "--seq-length", 160],
    "small-chunks": ["--micro-batch-size", 8, "--logprob-chunk-size", 3],
    "recompute": ["--micro-batch-size", 2, "--recompute-granularity", "full"],
    "recompute-keep": ["--micro-batch-size", 2, "--recompute-granularity", "full", "--recompute-keep", "core_attn"],
    "recompute-offload": [
        *("--micro-batch-size", 2, "--recompute-granularity", "full", "--recompute-keep", "core_attn"),
        "--activation-offload",
    ],
    "recompute-mlp": ["--micro-batch-size", 2, "--recompute-granularity", "selective", "--recompute-modules", "mlp"],
    "recompute-block": [
        "--micro-batch-size",
        2,
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "block",
        "--recompute-num-layers",
        1,
    ],
    "tiles": ["--micro-batch-size", 2, "--mlp-tiles", 3],
    "tiles-recompute": ["--micro-batch-size", 2, "--mlp-tiles", "auto", "--recompute-granularity", "full"],
}
BATCHES = {"seven": [0, 1, 2, 3, 4, 5, 6], "one": [3], "three": [6, 2, 4], "four": [5, 0, 3, 1], "many": [7, 0]}
"""Seven and three do not divide by two processes; with one, the second process has an empty pack; many has a group of
twelve responses."""

LAID_OUT = (
    "dpo",
    "simpo",
    "orpo",
    "sft",
    "dpo solo both l1 short alignment stop short gradient",
    "orpo short",
    "dpo long",
    "longpo long token",
    "ipo solo 0.8 token",
)
PLANS = [
    *(("float64", method, "llama", layout, "seven") for method in LAID_OUT for layout in ("packed", "one-by-one")),
    *(("float64", "dpo", "llama", layout, "seven") for layout in LAYOUTS if layout not in ("packed", "one-by-one")),
    *(("float64", "orpo", "qwen2", layout, "seven") for layout in ("by-two", "separate")),
    *(("float64", method, "llama", "one-by-one", batch) for method in ("dpo", "sft") for batch in ("one", "three")),
    *(("float32", method, "llama", "by-two", "seven") for method in ("dpo", "simpo", "orpo", "sft")),
    *(("float32", "dpo", "llama", layout, "seven") for layout in ("one-by-one", "recompute")),
    *(("float32", "dpo", "llama", "one-by-one", batch) for batch in ("one", "three")),
    ("float32", "orpo", "qwen2", "by-two", "seven"),
    *(("float64", "dpo", "llama", layout, "many") for layout in ("packed", "separate", "padded", "small-chunks")),
    *(("float64", method, "llama", "by-tokens", "many") for method in ("orpo", "dpo long")),
    ("float64", "dpo solo both l1 short alignment stop short gradient", "llama", "recompute", "many"),
]
"""(dtype, method, model, layout, batch) of every gradient that is computed by one process and by two."""

OPTION_PLANS = [
    (dtype, method, "llama", "one-by-one", "three") for dtype in ("float64", "float32") for method in OPTIONS
]
"""Those of two processes only: every option, each process with a different pack or an empty one."""


def case_name(plan: tuple[str, ...]) -> str:
    return " ".join(plan)


RESPONSES = [(1, 1), (2, 2), (3, 1), (1, 3), (1, 1), (2, 1), (1, 2), (4, 8)]
"""(chosen, rejected) responses of each example."""


JUMPS = {"short": [], "long": [(3, 40), (11, 1), (19, 57)], "response": [(1, 60)]}
"""Context -> (token, gap) of each jump of a stretched prompt."""


def token_examples(roles: tuple[str, ...], count: int = len(RESPONSES)) -> list[dict[str, Any]]:
    """Random ids; lengths from one token to many, so that no two packs are alike. Of conversations and of second
    responses, which have several turns, not all tokens are trained. Positions of every second prompt are stretched."""
    draw, examples = random.Random(5), []

    def ids(length: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(length)]

    for number in range(count):
        prompts = {
            "short": ids(draw.randint(2, 20)),
            "long": ids(draw.randint(20, 90)),
            "response": ids(draw.randint(2, 40)),
        }
        of_sides = dict(zip(("chosen", "rejected"), RESPONSES[number % len(RESPONSES)], strict=True))
        responses = {side: [ids(draw.randint(1, 9)) for _ in range(size)] for side, size in of_sides.items()}
        responses["response"] = [ids(draw.randint(2, 30))]
        masks = {
            side: [[draw.random() < 0.6 for _ in one[:-1]] + [True] for one in each] for side, each in responses.items()
        }
        examples.append(
            {
                "id": f"g{number}",
                "prompts": [
                    {
                        "ids": prompts[context],
                        "jumps": JUMPS[context] if number % 2 else [],
                        "completions": [
                            {
                                "role": role,
                                "response": response,
                                "ids": each,
                                "loss_mask": masks[side][response] if role == "response" or response == 1 else None,
                            }
                            for role in roles
                            if role.split("_")[0] == context
                            for side in [role.split("_")[-1]]
                            for response, each in enumerate(responses[side])
                        ],
                    }
                    for context in dict.fromkeys(role.split("_")[0] for role in roles)
                ],
            }
        )
    return examples


@dataclass(frozen=True)
class Launch:
    """What a launch left behind.

    Attributes:
        results: case -> {"means", "tokens", "padding", "packs", "table"}; run -> "done" or its error.
        gradients: case -> tensor name -> gradient.
        folder: with one run folder for each run, ``NAME-hf`` for its export.
    """

    results: dict[str, Any]
    gradients: dict[str, dict[str, Tensor]]
    folder: Path

    def metrics(self, run: str, split: str = "train") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == split]

    def weights(self, run: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{run}-hf" / "model.safetensors")


@dataclass(frozen=True)
class World:
    """Models and data that all launches use."""

    folder: Path

    def model(self, name: str) -> Path:
        return self.folder / name

    def examples(self, roles: tuple[str, ...]) -> Path:
        return self.folder / ("-".join(roles) + ".json")


def gradient_cases(
    world: World, reference: list[dict[str, float]], out: Path, plans: list, flags: tuple[Any, ...] = ()
) -> list[dict[str, Any]]:
    cases = []
    for plan in plans:
        dtype, method_name, model, layout, batch = plan
        method = METHODS[method_name]
        argv = [
            "--hf-path",
            world.model(model),
            "--train-data",
            "none",
            "--save",
            out / "none",
            "--train-iters",
            1,
            *method_flags(method),
            *LAYOUTS[layout],
            *flags,
        ]
        cases.append(
            {
                "name": case_name(plan),
                "dtype": dtype,
                "indices": BATCHES[batch],
                "argv": last_wins(list(map(str, argv))),
                "examples": str(world.examples(method_roles(method))),
                "multiple_of": 16 if layout == "padded" else None,
                "reference": reference if has_reference(method) else None,
                "table": plan in PLANS,
            }
        )
    return cases


def training_run(
    world: World,
    out: Path,
    name: str,
    *flags: Any,
    model: str = "llama",
    data: str = "groups",
    load: bool = False,
    cut: tuple | None = None,
) -> dict:
    argv = [
        "--hf-path",
        world.model(model),
        "--train-data",
        world.folder / f"{data}.jsonl",
        "--save",
        out / name,
        "--save-hf",
        out / f"{name}-hf",
        "--seq-length",
        128,
        "--micro-batch-size",
        2,
        *(["--load", out / name] if load else []),
        *flags,
    ]
    return {"name": name, "argv": last_wins(list(map(str, argv)))} | (
        {"cut": [str(cut[0]), str(out / name), cut[1]]} if cut else {}
    )


# Adam moves a weight by about the learning rate for any gradient, so rounding of small gradients moves weights by
# a share of that rate: the bound of 1e-5 on weights is for 1e-4. (At 1e-3 it was 2.1e-5 on one kind of processor.)
SIX_STEPS = ["--train-iters", 6, "--global-batch-size", 5, "--lr", 1e-4, "--save-interval", 2, "--eval-interval", 3]


def common_runs(world: World, out: Path) -> list[dict[str, Any]]:
    """Runs that every number of processes does: three steps of each method, with a last step that is smaller."""
    data = {"sft": "chats", "stretched": "paragraphs"}
    return [
        training_run(
            world,
            out,
            f"three-{name}",
            *(("--preference-loss", "orpo", "--stretch-positions", 240) if name == "stretched" else ()),
            *(method_flags(METHODS[name]) if name in METHODS else ()),
            "--lr",
            1e-4,
            "--global-batch-size",
            5,
            "--train-epochs",
            1,
            "--lr-warmup-fraction",
            0,
            data=data.get(name, "groups"),
        )
        for name in ("dpo", "simpo", "orpo", "sft", "stretched")
    ]


def launch(processes: int, out: Path, cases: list[dict], runs: list[dict], torchrun: bool = False) -> Launch:
    """Does the cases and then the runs with so many processes, forked ones or, as a user starts them, torchrun's."""
    out.mkdir(exist_ok=True)
    job = out / "job.json"
    job.write_text(json.dumps({"out": str(out), "gradients": cases, "runs": runs}))
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(
            [*start, worker.__file__, str(job)], env=environment, cwd=out, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    else:
        run = ForkedRun([str(job)], processes, out / "stderr.txt", worker.main)
        assert run.wait(1500) == [0] * processes, run.text()[-8000:]
    gradients_by_case: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(out / "gradients.safetensors").items():
        case, _, name = key.partition("|")
        gradients_by_case.setdefault(case, {})[name] = tensor
    return Launch(json.loads((out / "results.json").read_text()), gradients_by_case, out)
