"""What every process of a test launch does: torchrun --nproc_per_node N worker.py JOB.json

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
    from megatron_solopo.data.tokens import Continuation, Prompt, TokenDataset, TokenGroup

    groups = [
        TokenGroup(
            example["id"],
            tuple(
                Prompt(
                    prompt["ids"],
                    tuple(Continuation(c["role"], c["ids"], c["learnt"]) for c in prompt["continuations"]),
                )
                for prompt in example["prompts"]
            ),
        )
        for example in json.loads(Path(path).read_text())
    ]
    return TokenDataset(groups, [], "")


def build(here: platform.Platform, config: Any, dtype: torch.dtype) -> Any:
    """The trainer's engine; in float64 the same parts without the cast of gradients to float32."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_solopo.conversion.hf import load_weights
    from megatron_solopo.model.build import build_model, read_hf_config
    from megatron_solopo.training.engine import build_engine

    hf_config = read_hf_config(config.model.hf_path)
    engine = build_engine(here, hf_config, config)
    if dtype == torch.float32:
        return engine
    gpt = build_model(hf_config, config, dtype)
    load_weights(gpt, hf_config, config.model.hf_path)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    gpt.config.finalize_model_grads_func = engine.gpt.config.finalize_model_grads_func
    return dataclasses.replace(engine, model=DistributedDataParallel(gpt.config, ddp, gpt), dtype=dtype)


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """The gradient by Hugging Face name, whole, on the first process.

    Each process of a distributed optimizer holds the sum of its shard; tensor-parallel processes hold parts of a
    matrix, pipeline stages some of the layers.
    """
    from megatron.core import parallel_state

    from megatron_solopo.conversion.hf import named_entries, tensor_group

    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    expert_copies = parallel_state.get_expert_data_parallel_group()
    for buffers, group in ((engine.model.buffers, copies), (engine.model.expert_parallel_buffers, expert_copies)):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            own = bucket.grad_data.chunk(dist.get_world_size(group))
            shards = [torch.empty_like(shard) for shard in own]
            dist.all_gather(shards, own[dist.get_rank(group)].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(shards))
    found = {}
    for entry, names, parameter in named_entries(engine.gpt, engine.hf_config):
        group = tensor_group(entry)
        cut = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        parts = [torch.empty_like(parameter.main_grad) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, parameter.main_grad.clone(), group=group)
        if cut is None:  # kept whole on every process, and must stay equal
            assert all(torch.equal(part, parts[0]) for part in parts), names
        whole = entry.operator.join(parts, cut) if len(parts) > 1 else parts[0]
        for name, gradient in zip(names, entry.operator.to_hf(whole), strict=True):
            found[name] = gradient.clone().contiguous()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for other in everyone:
        for name, gradient in other.items():
            assert torch.equal(found.setdefault(name, gradient), gradient), name
    return found


def gradient_case(engine: Any, case: dict[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Loss and gradient of one step through the trainer's planning, packing, schedule and reduction."""
    from megatron_solopo.data.packs import build_pack
    from megatron_solopo.losses.solopo import reference_roles, roles
    from megatron_solopo.training.step import make_packs, run_step, segment_table

    dataset, indices = token_dataset(case["examples"]), case["indices"]
    names = roles(config.method)
    reference = None
    if case["reference"]:
        compared = reference_roles(config.method)
        reference = torch.tensor([[row[name] for name in compared] for row in case["reference"]], dtype=torch.float64)

    def packs() -> list[Any]:
        made = make_packs(engine, dataset, indices, config)
        if case.get("multiple_of"):
            made = [
                build_pack(
                    [dataset.groups[i] for i in pack.groups],
                    pack.groups,
                    config.data.share_prompts,
                    case["multiple_of"],
                )
                for pack in made
            ]
        return made

    engine.model.zero_grad_buffer()
    engine.model.train()
    mine = packs()
    sums = run_step(engine, mine, len(indices), config.method, reference)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [list(pack.groups) for pack in mine])
    values = {"means": sums.means(), "tokens": sums.tokens, "padding": sums.padding, "packs": everyone}
    found = gradients(engine)
    if case["table"]:
        values["table"] = segment_table(engine, names, indices, packs()).tolist()
    return values, found


def cut(source: Path, target: Path, iteration: int) -> None:
    """A copy of a run folder as a kill leaves it: later checkpoints half written, later lines there."""
    shutil.copytree(source, target)
    (target / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    for folder in target.glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > iteration:
            folder.rename(folder.with_name(folder.name + ".partial"))
    with (target / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    here = platform.start("cpu", timeout_minutes=2)
    from megatron.core import parallel_state

    from megatron_solopo.training.engine import initialize_parallel
    from megatron_solopo.training.run import train

    results: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    engines: dict[str, Any] = {}
    layout = None
    for case in job["gradients"]:
        config, _ = config_load.load(case["argv"])
        if layout != config.parallel:
            parallel_state.destroy_model_parallel()
            engines.clear()
            initialize_parallel(config)
            layout = config.parallel
        key = json.dumps([case["dtype"], dataclasses.asdict(config.model), config.training.moe_aux_loss_coeff])
        if key not in engines:
            engines[key] = build(here, config, getattr(torch, case["dtype"]))
        results[case["name"]], found = gradient_case(engines[key], case, config)
        tensors |= {f"{case['name']}|{name}": tensor for name, tensor in found.items()}
    parallel_state.destroy_model_parallel()
    engines.clear()
    for run in job["runs"]:
        if "cut" in run and dist.get_rank() == 0:
            cut(*map(Path, run["cut"][:2]), run["cut"][2])
        dist.barrier()
        try:
            train(here, config_load.load(run["argv"])[0])
            results[run["name"]] = "done"
        except UserError as error:
            results[run["name"]] = str(error)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        out = Path(job["out"])
        (out / "results.json").write_text(json.dumps(results))
        save_file(tensors, out / "gradients.safetensors")
    dist.barrier()
    platform.stop(here)


if __name__ == "__main__":
    main()
