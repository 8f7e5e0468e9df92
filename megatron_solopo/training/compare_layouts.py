"""The work of `solopo verify-parallelism`: launches of a step under each layout, the step itself, the comparison."""

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
from typing import TypedDict

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from megatron_solopo import config_load, launch, template_kwargs
from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.config_checks import check
from megatron_solopo.data.tokenized.batches import most_tokens_of_a_pack
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import needs_reference
from megatron_solopo.model.transformer_engine import check_machine
from megatron_solopo.parallel.layouts import Layout, parse_layout
from megatron_solopo.parallel.platform import Platform, choose, end_model_parallel
from megatron_solopo.progress import ProgressBar
from megatron_solopo.terminal import write_line
from megatron_solopo.training.engine import Engine, build_engine, initialize_parallel
from megatron_solopo.training.gradients import full_gradients
from megatron_solopo.training.preflight import check_cut, check_run_inputs, dated_tokenizer, read_model
from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
from megatron_solopo.training.step import StepSums, run_step, segment_table
from megatron_solopo.training.step_work import make_packs

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
"""Largest relative differences, which the order of sums explains; bfloat16 rounds to 8 bits and has no bound."""


class Job(TypedDict):
    """The job file of a launch.

    Attributes:
        folder: the folder of the results.
        argv: the command line of the training run.
        layouts: names of the layouts to measure.
        dtype: name of the torch dtype.
    """

    folder: str
    argv: list[str]
    layouts: list[str]
    dtype: str
    device: str
    timeout_minutes: float


def compare(options: argparse.Namespace, rest: list[str]) -> int:
    """Measures the layouts and prints the table; returns 1 where a difference is above its bound.

    Args:
        options: the options of `verify.main`.
        rest: the options of the training run.

    Raises:
        UserError: a layout does not fit the model or this machine, or a launch failed.
    """
    layouts = [parse_layout(name) for name in dict.fromkeys([options.base, *options.layouts])]
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        arguments = [*rest, "--save", str(Path(folder) / "run")]
        config, _ = config_load.load(arguments)
        hf_config = read_model(config)
        dated_tokenizer(config)
        if config.model.chat_template_date is not None and "chat_template_date" not in config.explicit:
            # For all launches: midnight may come between two of them.
            arguments += [template_kwargs.DATE_FLAG, config.model.chat_template_date]
        for layout in layouts:
            _check(arguments, layout, hf_config)
        check_machine(config, choose(config.parallel.device))
        if options.float64 and config.model.transformer_impl != "portable":
            raise UserError(
                "option-conflict",
                f"--float64 with --transformer-impl {config.model.transformer_impl}: use --transformer-impl portable",
            )
        dtype = "float64" if options.float64 else "bfloat16" if config.model.bf16 else "float32"
        _launch(Path(folder), arguments, layouts, dtype, config.parallel)
        bound = options.bound if options.bound is not None else BOUNDS.get(dtype)
        return _report(Path(folder), layouts, dtype, bound, options.tensors)


def _config(argv: list[str], layout: Layout) -> Config:
    """Returns the run's options under a layout; packs are as large as under the run's layout."""
    config, _ = config_load.load(argv)
    pack = most_tokens_of_a_pack(config)
    config.parallel = layout.applied(config.parallel)
    if pack is not None:
        config.training.max_tokens_per_rank = math.ceil(pack / config.parallel.context_parallel_size)
    config.explicit -= vars(config.parallel).keys()
    check(config)
    return config


def _check(argv: list[str], layout: Layout, hf_config: PretrainedConfig) -> None:
    """Refuses a layout that this model or machine does not support, before anything starts."""
    try:
        config = _config(argv, layout)
        check_cut(hf_config, config, layout.processes)
    except UserError as error:
        raise error.at(f"layout {layout.name!r}") from None
    if choose(config.parallel.device) == "cuda" and layout.processes > torch.cuda.device_count():
        raise UserError(
            "gpus-too-few",
            f"layout {layout.name!r}: needs {layout.processes} GPUs, this machine has {torch.cuda.device_count()}; "
            "use a smaller one, or --device cpu",
        )


def _launch(folder: Path, argv: list[str], layouts: list[Layout], dtype: str, run: ParallelConfig) -> None:
    """Launches every layout, which writes its loss and gradient; the first one, the base, also writes the reference
    log-probs that all use."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for layout in layouts[1:]:
        by_size[layout.processes].append(layout.name)
    launches = [(layouts[0].processes, [layouts[0].name]), *sorted(by_size.items())]
    for processes, names in ProgressBar(launches, desc="layouts", unit="launch", leave=False):
        job = Job(
            folder=str(folder),
            argv=argv,
            layouts=names,
            dtype=dtype,
            device=run.device,
            timeout_minutes=run.distributed_timeout_minutes,
        )
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "megatron_solopo.training.verify", str(folder / "job.json")]
        write_line(f"{processes} processes: {', '.join(names)}")
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        if done.returncode == launch.REPORTED:
            raise SystemExit(launch.REPORTED)  # the process has printed its error
        if done.returncode:
            raise UserError(
                "launch-failed", f"the {processes} processes of {', '.join(names)} failed; see their messages above"
            )


def _report(folder: Path, layouts: list[Layout], dtype: str, bound: float | None, tensors: int) -> int:
    """Prints the table; returns 1 where a difference is above the bound."""
    base = layouts[0].name
    results = {layout.name: json.loads((folder / f"{layout.name}.json").read_text()) for layout in layouts}
    expected = load_file(folder / f"{base}.safetensors")
    norm = sum(tensor.double().norm() ** 2 for tensor in expected.values()) ** 0.5
    print(
        f"one step of {results[base]['groups']} examples, {dtype}; base {base}: loss {results[base]['loss']:.10g}, ",
        end="",
    )
    print(f"gradient norm {norm:.6g}")
    print(f"{'layout':<24} {'loss':>9} {'gradient':>9}  worst tensors (|a - b| / |b|)")
    wrong = 0
    for layout in layouts[1:]:
        actual = load_file(folder / f"{layout.name}.safetensors")
        off = {name: (actual[name].double() - expected[name].double()).norm() for name in expected}
        worst = sorted(
            ((value / expected[name].double().norm().clamp(min=1e-300)).item(), name) for name, value in off.items()
        )[::-1]
        loss = abs(results[layout.name]["loss"] - results[base]["loss"]) / max(1, abs(results[base]["loss"]))
        gradient = (sum(value**2 for value in off.values()) ** 0.5 / norm).item()
        # Written so that NaN counts as a difference.
        above = bound is not None and not all(value <= bound for value in (loss, *(each for each, _ in worst)))
        wrong += above
        shown = ", ".join(f"{value:.1e} {name}" for value, name in worst[:tensors])
        print(f"{layout.name:<24} {loss:>9.1e} {gradient:>9.1e}  {shown}" + ("  ABOVE THE BOUND" if above else ""))
    if bound is not None:
        print(
            f"bound {bound:g}: " + (f"{wrong} of {len(layouts) - 1} layouts differ" if wrong else "all layouts agree")
        )
    return 1 if wrong else 0


def measure(platform: Platform, job: Job) -> None:
    """Runs one step under each layout of a launch; rank 0 writes loss and gradient. Collective."""
    folder = Path(job["folder"])
    for name in job["layouts"]:
        config = _config(job["argv"], parse_layout(name))
        initialize_parallel(config)
        engine, sums = _step(platform, config, getattr(torch, job["dtype"]), folder)
        gradients = full_gradients(engine)
        if dist.get_rank() == 0:
            save_file(gradients, folder / f"{name}.safetensors")
            result = {"loss": sums.means()["loss"], "groups": sums.groups}
            (folder / f"{name}.json").write_text(json.dumps(result))
        engine.close()
        del engine, gradients
        end_model_parallel()


def _step(platform: Platform, config: Config, dtype: torch.dtype, folder: Path) -> tuple[Engine, StepSums]:
    """Returns the engine after forward and backward of the run's first step, and the step's sums."""
    inputs = check_run_inputs(config)
    indices = inputs.schedule.step(0)
    engine = build_engine(platform, inputs.hf_config, config, dtype)
    reference = None
    if needs_reference(config.method):
        reference = _reference(engine, inputs.data.reference["train"], indices, config, folder / "reference.pt")
    engine.train()
    engine.zero_gradients()
    packs = make_packs(engine, inputs.data.train, indices, config)
    return engine, run_step(engine, packs, len(indices), config.method, reference)


def _reference(
    engine: Engine, dataset: TokenDataset, indices: list[int], config: Config, path: Path
) -> ReferenceLogProbs:
    """Computes the log-probs of the step's examples under the first layout; all others read them from ``path``.
    Collective."""
    places = SegmentPlaces.of_dataset(dataset)
    if not path.exists():
        dist.barrier()
        table = segment_table(engine, places, make_packs(engine, dataset, indices, config))
        # At policy = reference the alignment has a kink, where the gradient is the sign of rounding noise.
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=table.dtype)
        if dist.get_rank() == 0:
            torch.save(table, path)
        dist.barrier()
    return ReferenceLogProbs(places, torch.load(path))
