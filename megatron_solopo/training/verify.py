"""Does a parallel layout train the same model? One step's loss and gradient under each, on this machine's processes.

    solopo verify-parallelism --config run.yaml --layouts "tp2 sp" cp2 "pp2 cp2"

takes the run's own model, data and method. Layouts that need the same number of processes share a launch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_solopo import config_load, launch, template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.config import Config
from megatron_solopo.config_checks import check
from megatron_solopo.data.tokenized.batches import most_tokens_of_a_pack
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.layouts import Layout, parse_layout
from megatron_solopo.progress import ProgressBar
from megatron_solopo.training.preparation import dated_tokenizer, quiet

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
"""Room for the order of sums. bfloat16 rounds every activation to 8 bits, so it has no bound of its own."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``. Returns 1 where a difference is above its bound."""
    from megatron_solopo.conversion.start import model_config
    from megatron_solopo.model.transformer_engine import check_machine
    from megatron_solopo.parallel.platform import choose

    parser = Parser(
        description="Compares one step's loss and gradient under parallel layouts with those of one process, from the "
        "weights of --hf-path; stages are even.",
        epilog="Every other option is one of pretrain_solopo.py (--config FILE, --hf-path, --train-data, ...); "
        "--save is not needed and nothing is written.",
    )
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help='"tp2 sp", cp2, "pp2 dp2", ...')
    parser.add_argument(
        "--base", default="1", metavar="LAYOUT", help="what they are compared with (default: 1 process)"
    )
    parser.add_argument("--float64", action="store_true", help="model and gradient in float64: only wrong code differs")
    parser.add_argument("--bound", type=float, help="largest relative difference (default: by dtype; bfloat16: none)")
    parser.add_argument("--tensors", type=int, default=3, metavar="N", help="worst tensors to show (default: 3)")
    parser.add_argument("--save", help=argparse.SUPPRESS)  # of a training run's command line
    given, rest = parser.parse_known_args(argv)
    quiet()
    layouts = [parse_layout(name) for name in dict.fromkeys([given.base, *given.layouts])]
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        arguments = [*rest, "--save", str(Path(folder) / "run")]
        config, _ = config_load.load(arguments)
        hf_config = model_config(config.model)
        dated_tokenizer(config)
        if config.model.chat_template_date is not None and "chat_template_date" not in config.explicit:
            # For all launches: midnight may come between two of them.
            arguments += [template_kwargs.DATE_FLAG, config.model.chat_template_date]
        for layout in layouts:
            _check(arguments, layout, hf_config)
        check_machine(config, choose(config.parallel.device))
        if given.float64 and config.model.transformer_impl != "portable":
            raise UserError(f"--float64 with --transformer-impl {config.model.transformer_impl}: take portable")
        dtype = "float64" if given.float64 else "bfloat16" if config.model.bf16 else "float32"
        _measure(Path(folder), arguments, layouts, dtype)
        bound = given.bound if given.bound is not None else BOUNDS.get(dtype)
        return _report(Path(folder), layouts, dtype, bound, given.tensors)


def _config(argv: list[str], layout: Layout) -> Config:
    """The run's options under a layout; packs are as large as under the run's own."""
    config, _ = config_load.load(argv)
    pack = most_tokens_of_a_pack(config)
    config.parallel = layout.applied(config.parallel)
    if pack is not None:
        config.training.max_tokens_per_rank = math.ceil(pack / config.parallel.context_parallel_size)
    config.explicit -= vars(config.parallel).keys()
    check(config)
    return config


def _check(argv: list[str], layout: Layout, hf_config: Any) -> None:
    """Refuses what this model or machine cannot do, before anything starts."""
    import torch

    from megatron_solopo.model.build import padded_vocab_size
    from megatron_solopo.parallel.platform import choose
    from megatron_solopo.parallel.topology import check_layout

    try:
        config = _config(argv, layout)
        padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
        check_layout(hf_config, config, padded, layout.processes)
    except UserError as error:
        raise UserError(f"layout {layout.name!r}: {error}") from None
    if choose(config.parallel.device) == "cuda" and layout.processes > torch.cuda.device_count():
        raise UserError(
            f"layout {layout.name!r}: needs {layout.processes} GPUs, {torch.cuda.device_count()} are here; "
            "give a smaller one, or --device cpu"
        )


def _measure(folder: Path, argv: list[str], layouts: list[Layout], dtype: str) -> None:
    """Writes each layout's loss and gradient; the first one, the base, also the reference that all use."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for layout in layouts[1:]:
        by_size[layout.processes].append(layout.name)
    launches = [(layouts[0].processes, [layouts[0].name]), *sorted(by_size.items())]
    for processes, names in ProgressBar(launches, desc="layouts", unit="launch", leave=False):
        job = {"folder": str(folder), "argv": argv, "layouts": names, "dtype": dtype}
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "megatron_solopo.training.verify", str(folder / "job.json")]
        print(f"{processes} processes: {', '.join(names)}", file=sys.stderr)
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        if done.returncode == launch.REPORTED:
            raise SystemExit(launch.REPORTED)  # in a line of its own
        if done.returncode:
            raise UserError(f"the {processes} processes of {', '.join(names)} failed; their messages stand above")


def _report(folder: Path, layouts: list[Layout], dtype: str, bound: float | None, tensors: int) -> int:
    """Prints the table; 1 where a difference is above the bound."""
    from safetensors.torch import load_file

    base = layouts[0].name
    results = {layout.name: json.loads((folder / f"{layout.name}.json").read_text()) for layout in layouts}
    theirs = load_file(folder / f"{base}.safetensors")
    whole = sum(tensor.double().norm() ** 2 for tensor in theirs.values()) ** 0.5
    print(
        f"one step of {results[base]['groups']} examples, {dtype}; base {base}: loss {results[base]['loss']:.10g}, ",
        end="",
    )
    print(f"gradient norm {whole:.6g}")
    print(f"{'layout':<24} {'loss':>9} {'gradient':>9}  worst tensors (|a - b| / |b|)")
    wrong = 0
    for layout in layouts[1:]:
        ours = load_file(folder / f"{layout.name}.safetensors")
        off = {name: (ours[name].double() - theirs[name].double()).norm() for name in theirs}
        worst = sorted(
            ((value / theirs[name].double().norm().clamp(min=1e-300)).item(), name) for name, value in off.items()
        )[::-1]
        loss = abs(results[layout.name]["loss"] - results[base]["loss"]) / max(1, abs(results[base]["loss"]))
        gradient = (sum(value**2 for value in off.values()) ** 0.5 / whole).item()
        # What is not a number is no agreement.
        above = bound is not None and not all(value <= bound for value in (loss, *(each for each, _ in worst)))
        wrong += above
        shown = ", ".join(f"{value:.1e} {name}" for value, name in worst[:tensors])
        print(f"{layout.name:<24} {loss:>9.1e} {gradient:>9.1e}  {shown}" + ("  ABOVE THE BOUND" if above else ""))
    if bound is not None:
        print(
            f"bound {bound:g}: " + (f"{wrong} of {len(layouts) - 1} layouts differ" if wrong else "all layouts agree")
        )
    return 1 if wrong else 0


def _worker(job_file: str) -> None:
    """One process of a launch: each layout's step in turn."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from megatron_solopo.parallel import platform

    quiet()
    job = json.loads(Path(job_file).read_text())
    folder, configs = Path(job["folder"]), {name: _config(job["argv"], parse_layout(name)) for name in job["layouts"]}
    first = next(iter(configs.values()))
    here = platform.start(first.parallel.device, first.parallel.distributed_timeout_minutes)
    from megatron_solopo.training.engine import initialize_parallel
    from megatron_solopo.training.gradients import whole_gradients

    try:
        with platform.losses_explained():
            for name, config in configs.items():
                initialize_parallel(config)
                engine, sums = _step(here, config, getattr(torch, job["dtype"]), folder)
                gradients = whole_gradients(engine)
                if dist.get_rank() == 0:
                    save_file(gradients, folder / f"{name}.safetensors")
                    result = {"loss": sums.means()["loss"], "groups": sums.groups}
                    (folder / f"{name}.json").write_text(json.dumps(result))
                engine.close()
                del engine, gradients
                platform.end_model_parallel()
    finally:
        platform.stop(here)


def _step(here: Any, config: Config, dtype: Any, folder: Path) -> tuple[Any, Any]:
    """The engine after forward and backward of the run's first step, and the step's sums."""
    import torch
    import torch.distributed as dist

    from megatron_solopo.losses.solopo import needs_reference, reference_roles
    from megatron_solopo.model.transformer_engine import check_machine
    from megatron_solopo.training.engine import build_engine
    from megatron_solopo.training.preparation import check_model, load_data, run_schedule
    from megatron_solopo.training.step import make_packs, run_step, segment_table

    hf_config, data = check_model(config), load_data(config)
    check_machine(config, here.name)
    indices = run_schedule(config, data).step(0)
    engine = build_engine(here, hf_config, config, dtype)
    reference = None
    if needs_reference(config.method):
        table = folder / "reference.pt"
        if not table.exists():
            dist.barrier()
            names, dataset = reference_roles(config.method), data.reference["train"]
            found = torch.zeros(len(dataset.groups), len(names), dtype=torch.float64)
            found[indices] = segment_table(engine, names, indices, make_packs(engine, dataset, indices, config)).cpu()
            # Policy = reference is the alignment's kink, where the gradient is the sign of rounding noise.
            found += torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
            if dist.get_rank() == 0:
                torch.save(found, table)
            dist.barrier()
        reference = torch.load(table)
    engine.train()
    engine.zero_gradients()
    packs = make_packs(engine, data.train, indices, config)
    return engine, run_step(engine, packs, len(indices), config.method, reference)


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(lambda argv: _worker(sys.argv[1]) or 0))
