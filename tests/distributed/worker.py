"""What every process of a test launch does (`launches.launch`): worker.py JOB.json

The job lists gradients to compute and trainer runs to do; one launch serves many checks. The first process writes
``results.json`` and ``gradients.safetensors`` into the job's ``out`` folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_solopo import config_load
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import platform


def token_dataset(path: str) -> Any:
    """The examples of a JSON file; see oracle.py for their form."""
    from segment_names import SEGMENTS, completion

    from megatron_solopo.data.tokenized.stretch import Jump
    from megatron_solopo.data.tokenized.tokens import Prompt, TokenDataset, TokenGroup

    groups = [
        TokenGroup(
            example["id"],
            tuple(
                Prompt(
                    SEGMENTS[prompt["completions"][0]["role"]][0],
                    prompt["ids"],
                    tuple(
                        completion(c["role"], c["ids"], c["loss_mask"], c["response"]) for c in prompt["completions"]
                    ),
                    jumps=tuple(Jump(*jump) for jump in prompt["jumps"]),
                )
                for prompt in example["prompts"]
            ),
        )
        for example in json.loads(Path(path).read_text())
    ]
    return TokenDataset(groups, [], "")


def gradient_case(engine: Any, case: dict[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Loss and gradient of one step through the trainer's planning, packing, schedule and reduction."""
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.losses.solopo import reference_scores, tail_weight
    from megatron_solopo.pack import Context, Side, segment_name
    from megatron_solopo.training.gradients import full_gradients
    from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
    from megatron_solopo.training.step import run_step, segment_table
    from megatron_solopo.training.step_work import make_packs, sent

    dataset, indices = token_dataset(case["examples"]), case["indices"]
    reference = None
    if case["reference"]:
        compared = sorted(reference_scores(config.method))
        responses = torch.tensor(
            [[[sum(c.side == side for c in g.prompts[0].completions) for side in Side]] for g in dataset.groups]
        )
        scored = torch.zeros(len(Context), len(Side), dtype=torch.int64)
        for one in compared:
            scored[*one] = 1
        counts = scored * responses
        tail = 1 - tail_weight(config.method)
        values = [
            row[name] - tail * (row[f"{name} tail"] if tail else 0)
            for row, each in zip(case["reference"], counts, strict=True)
            for one in compared
            for name in (segment_name(*one, response) for response in range(each[*one]))
        ]
        reference = ReferenceLogProbs(SegmentPlaces(counts), torch.tensor(values, dtype=torch.float64))

    def planned() -> list[Any]:
        packs = make_packs(engine, dataset, indices, config)
        if case.get("multiple_of"):
            padded = [
                build_pack(
                    [dataset.groups[i] for i in pack.groups],
                    pack.groups,
                    config.data.share_prompts,
                    case["multiple_of"],
                    case["multiple_of"] // 2,
                )
                for pack in packs
            ]
            return sent(engine, padded)
        return packs

    engine.zero_gradients()
    engine.train()
    packs = planned()
    sums = run_step(engine, packs, len(indices), config.method, reference)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, [list(pack.groups) for pack in packs])
    values = {"means": sums.means(), "tokens": sums.tokens, "padding": sums.padding, "packs": of_ranks}
    gradients = full_gradients(engine)
    if case["table"]:
        engine.eval()
        places = SegmentPlaces.of_dataset(dataset)
        table = segment_table(engine, places, planned())
        rows = table.split(places.counts.sum((1, 2)).tolist())
        values["table"] = [rows[index].tolist() for index in indices]  # one row for each example
    return values, gradients


def cut(source: Path, target: Path, iteration: int) -> None:
    """A copy of a run folder as a kill leaves it: later checkpoints half written, later lines there."""
    shutil.copytree(source, target)
    (target / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    for folder in target.glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > iteration:
            folder.rename(folder.with_name(folder.name + ".partial"))
    with (target / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


def end(engines: dict[str, Any]) -> None:
    """Drops all engines and then their process groups."""
    for engine in engines.values():
        engine.close()
    engines.clear()
    platform.end_model_parallel()


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text())
    here = platform.start("cpu", timeout_minutes=2)
    from megatron_solopo.model import offload
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine, initialize_parallel
    from megatron_solopo.training.trainer import train

    offload.SMALLEST, offload.BLOCK = 1, 1000  # no tensor of these models is large

    results: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    engines: dict[str, Any] = {}
    layout = None
    for case in job["gradients"]:
        config, _ = config_load.load(case["argv"])
        if layout != config.parallel:
            end(engines)
            initialize_parallel(config)
            layout = config.parallel
        key = json.dumps([case["dtype"], dataclasses.asdict(config.model), config.training.moe_aux_loss_coeff])
        if key not in engines:
            hf_config = read_hf_config(config.model.hf_path, config.model.rope_scaling)
            engines[key] = build_engine(here, hf_config, config, getattr(torch, case["dtype"]))
        results[case["name"]], gradients = gradient_case(engines[key], case, config)
        tensors |= {f"{case['name']}|{name}": tensor for name, tensor in gradients.items()}
    end(engines)
    for run in job["runs"]:
        if "cut" in run and dist.get_rank() == 0:
            cut(*map(Path, run["cut"][:2]), run["cut"][2])
        dist.barrier()
        try:
            train(here, config_load.load(run["argv"])[0])
            results[run["name"]] = "done"
        except UserError as error:
            results[run["name"]] = str(error)
        platform.end_model_parallel()
    if dist.get_rank() == 0:
        out = Path(job["out"])
        (out / "results.json").write_text(json.dumps(results))
        save_file(tensors, out / "gradients.safetensors")
    dist.barrier()
    platform.stop(here)
    return 0


if __name__ == "__main__":
    import preloaded  # noqa: F401

    sys.exit(main(sys.argv[1:]))
