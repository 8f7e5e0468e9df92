"""``solopo plan``: the layouts of a model that fit so many GPUs, ranked, with the YAML of the best."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from megatron_solopo import config_load
from megatron_solopo.arguments import Parser
from megatron_solopo.config import Config, flag
from megatron_solopo.data.tokenized.batches import most_tokens_of_a_pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import check_lengths, read_config_file, read_hf_config
from megatron_solopo.planning.calibration import calibrate
from megatron_solopo.planning.candidate import GIB, PROCESS_GIB, Candidate, Request
from megatron_solopo.planning.forecast import uses_host
from megatron_solopo.planning.machines import Machine, load_machine, names
from megatron_solopo.planning.memory import GRADIENTS, INPUTS, KINDS, LOG_PROBS, OPTIMIZER, WEIGHTS
from megatron_solopo.planning.plan_file import write_plan
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.search import NEAREST, Plan, SearchResult, plan, search
from megatron_solopo.planning.table import columns, not_rehearsed
from megatron_solopo.planning.workers import Rehearsals
from megatron_solopo.training.objective import check_loss
from megatron_solopo.training.parameters import describe_parameters


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo plan",
        description="Searches all parallel layouts of a model on so many GPUs, without any of them, with the cheapest "
        "recomputation, tiles, offload and optimizer that fit. Options of solopo train hold for every layout: "
        "--no-share-prompts, --preference-loss, or --tensor-model-parallel-size 4, which is then not varied. --bf16 is "
        "on unless --no-bf16 is set.",
        config=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder, or a config.json")
    add("--gpus", type=_at_least(1), required=True, help="GPUs of the run")
    add("--machine", default="h100", metavar="NAME", help=f"kind of GPU, {', '.join(names())}, or a machine file")
    add("--calibrate", metavar="DIR", help="folder of a run on this kind of GPU, whose measured step scales forecasts")
    add("--gpus-per-node", type=_at_least(1), help="default: the machine's; tensor parallelism stays within a node")
    add("--gpu-memory", type=float, metavar="GIB", help="of a GPU, GiB; default: the machine's")
    add(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of it, what stays free: about 2 for the CUDA context and NCCL, the rest for fragmentation (assumed; "
        "default: 4)",
    )
    add(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="main memory of a node, GiB, of which each GPU has an equal share; default: the machine's",
    )
    add("--long-tokens", type=_at_least(3), required=True, help="longest prompt with its response, --seq-length")
    add("--short-tokens", type=_at_least(3), default=1024, help="short prompt with its response (default: 1024)")
    add("--response-tokens", type=_at_least(2), default=256, help="longest response (default: 256)")
    add("--top", type=_at_least(1), default=20, help="layouts that are rehearsed and shown (default: 20)")
    add("--output", type=Path, metavar="FILE", help="write the best layout as YAML for solopo train --config")
    return parser


def _at_least(minimum: int) -> type[int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, found {value}")
        return value

    return convert  # pyright: ignore[reportReturnType]  # argparse calls it


def main(argv: list[str] | None = None) -> int:
    """Prints the layouts that fit; returns the exit status.

    Raises:
        UserError: an option or the model is refused, or no layout fits.
    """
    words = sys.argv[1:] if argv is None else argv
    arguments, config = read_options(words)
    machine = load_machine(arguments.machine)
    if arguments.calibrate is not None:
        machine = calibrate(machine, arguments.calibrate)
    request = request_of(arguments, config, machine)
    begin = time.monotonic()
    searched = search(request)
    print("\n".join(_heading(request, searched, arguments.top)), flush=True)
    with Rehearsals() as rehearsals:
        result = plan(request, arguments.top, rehearsals, searched)
    if result.best:
        print("\n".join(_layouts(request, result, time.monotonic() - begin)))
    print("\n".join(_reasons(request, result)))
    if not result.fitting:
        raise nothing_fits(request, result)
    facts = facts_of(request, result.fitting[0])
    print("\n".join(("", "the best", *(f"  {fact}" for fact in facts))))
    if arguments.output is not None:
        write_plan(arguments.output, result.fitting[0].config, ["solopo", "plan", *words], facts)
        print(f"\nsolopo train --config {arguments.output}")
    return 0


def read_options(words: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parses the options of a plan, and of the run that it is for.

    Raises:
        UserError: an option is unknown, wrong, or one that the plan sets.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    known = config_load.build_parser(command=False)._option_string_actions
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
    parser.refuse_unknown(unknown, arguments)
    config, _ = config_load.parsed(list(rest), command=False)
    most_tokens_of_a_pack(config)  # refuses auto: a plan has a pack for each --micro-batch-size
    if "seq_length" in config.explicit and config.data.seq_length < arguments.long_tokens:
        raise UserError(
            "option-conflict",
            f"--seq-length {config.data.seq_length}: is below --long-tokens {arguments.long_tokens}; leave it out",
        )
    if min(arguments.short_tokens, arguments.long_tokens) <= arguments.response_tokens:
        raise UserError(
            "option-conflict",
            f"--response-tokens {arguments.response_tokens}: leaves no prompt of --short-tokens "
            f"{arguments.short_tokens} and --long-tokens {arguments.long_tokens}; lower it",
        )
    _complete(config, arguments)
    return arguments, config


def _complete(config: Config, arguments: argparse.Namespace) -> None:
    """Sets options that every run needs and a plan does not ask for; those of a layout stay as they are."""
    model = Path(arguments.model)
    defaults = {
        "hf_path": str(model.parent if model.is_file() else model),
        "train_data": "data/train.jsonl",
        "save": "runs/planned",
        "bf16": True,
        "seq_length": arguments.long_tokens,
    }
    if not config.explicit & {"train_iters", "train_epochs"}:
        config.training.train_epochs = 1.0
    for name, value in defaults.items():
        if name not in config.explicit:
            config.assign(name, value)
    one = Config(**{**vars(config), "parallel": Config().parallel, "explicit": set()})
    config_load.resolve(one)  # fills the method's defaults, which layouts share


def request_of(arguments: argparse.Namespace, config: Config, machine: Machine) -> Request:
    """Returns what is searched.

    Raises:
        UserError: the model is refused, or the memory.
    """
    hf_config = _model(arguments.model, config)
    check_loss(config.method)
    memory = machine.memory_gib if arguments.gpu_memory is None else arguments.gpu_memory
    if not memory > arguments.reserve >= 0:
        raise UserError("option-value", f"--gpu-memory {memory:g}: must be above --reserve {arguments.reserve:g}")
    response = arguments.response_tokens
    group = example(config.method, arguments.short_tokens - response, arguments.long_tokens - response, response)
    machine = replace(machine, gpus_per_node=arguments.gpus_per_node or machine.gpus_per_node)
    if arguments.host_memory is not None:
        if not 0 < arguments.host_memory < math.inf:
            raise UserError("option-value", f"--host-memory {arguments.host_memory:g}: must be above 0")
        machine = machine.with_host_memory(arguments.host_memory)
    if uses_host(config):
        machine.host_share()  # or its error
    return Request(hf_config, config, group, arguments.gpus, int((memory - arguments.reserve) * GIB), machine)


def _model(path: str, config: Config) -> PretrainedConfig:
    scaling = config.model.rope_scaling
    is_file = Path(path).is_file()
    hf_config = read_config_file(Path(path), scaling) if is_file else read_hf_config(path, scaling, "--model")
    family_of(hf_config)
    try:
        check_lengths(hf_config, config.data)
    except UserError as error:
        if "seq_length" in config.explicit:
            raise
        raise UserError(error.code, error.message.replace(flag("seq_length"), "--long-tokens")) from None
    if (why := not_rehearsed(config)) is not None:
        raise UserError("plan-implementation", f"{why}, so nothing can be rehearsed; leave it out")
    return hf_config


def _heading(request: Request, searched: SearchResult, top: int) -> list[str]:
    examples = request.config.training.global_batch_size
    lengths = ", ".join(f"{len(prompt.ids):,}" for prompt in request.group.prompts)
    return [
        f"{request.gpus} x {request.machine.name}, {request.limit / GIB:.4g} GiB of each; {examples} examples a step, "
        f"the longest with prompts of {lengths} tokens",
        describe_parameters(request.hf_config, request.config.model),
        f"{searched.layouts:,} layouts: training refuses {sum(searched.refused.values()):,}; of the others, with each "
        f"micro-batch, {len(searched.fitting):,} fit by estimate and {len(searched.others):,} do not",
        f"rehearsed: the {min(top, len(searched.fitting))} fastest by estimate (--top)"
        if searched.fitting
        else f"rehearsed: the {min(NEAREST, len(searched.others))} with the least memory by estimate",
    ]


def _layouts(request: Request, result: Plan, seconds: float) -> list[str]:
    candidates = result.fitting or result.best
    largest = max(abs(candidate.error) for candidate in result.best)
    shown = [kind for kind in KINDS if any(it.peak.held[kind] >= GIB / 20 for it in candidates)]
    header = ["step, s", *shown, "peak GiB", "free", "estimate", "layout"]
    rows = [
        [
            f"{candidate.step.low:.1f}-{candidate.step.high:.1f}",
            *(f"{candidate.peak.held[kind] / GIB:.1f}" for kind in shown),
            f"{candidate.peak.total / GIB:.1f}",
            f"{(request.limit - candidate.peak.total) / GIB:.1f}",
            f"{candidate.error:+.1%}",
            candidate.name,
        ]
        for candidate in candidates
    ]
    return [
        "",
        *columns([header, *rows]),
        f"{len(result.best)} rehearsed in {seconds:.0f} s. Steps are forecasts, not measured ({request.machine.name}); "
        f"GiB of the stage with the larger peak. Estimates, by which others were left out, are up to {largest:.1%} off "
        "these peaks",
    ]


def _on_device(candidate: Candidate) -> float:
    return candidate.peak.total


def _on_host(candidate: Candidate) -> float:
    return candidate.host


def _reasons(request: Request, result: Plan) -> list[str]:
    """Says why the others are not in the table, those alike in a line."""
    short: dict[str, list[Candidate]] = defaultdict(list)
    over = [candidate for candidate in result.best if not candidate.fits(request)]
    for candidate in (*over, *(one for one in result.searched.others if not one.outcomes)):
        on_device = candidate.peak.total > request.limit
        short[max(candidate.peak.held, key=candidate.peak.held.__getitem__) if on_device else ""].append(candidate)
    lines = []
    for kind, candidates in short.items():
        size = _on_device if kind else _on_host
        nearest = min(candidates, key=size)
        most = f", most of it {kind}" if kind else f", of a GPU's {request.host_limit / GIB:.0f}"
        lines.append(f"  {len(candidates):,} lack {nearest.lacks(request)} and more{most}; least: {nearest.name}")
    refused = [f"  {count:,}: {message}" for message, count in result.searched.refused.most_common()]
    return [
        *(["", "do not fit (estimated where not rehearsed)", *lines] if lines else []),
        *(["", "refused by training", *refused] if refused else []),
    ]


def nothing_fits(request: Request, result: Plan) -> UserError:
    """Returns the error of a plan without a layout: what the nearest lacks, and what would help."""
    if not result.best:
        message, _ = result.searched.refused.most_common(1)[0]
        return UserError("plan-nothing-fits", f"training refuses every layout of {request.gpus} GPUs: {message}")
    nearest = result.nearest
    if nearest.peak.total <= request.limit:
        return UserError(
            "plan-nothing-fits",
            f"no layout fits {request.gpus} GPUs with {request.host_limit / GIB:.4g} GiB of main memory each: the "
            f"nearest ({nearest.name}) lacks {nearest.lacks(request)}; use --host-memory of a larger node, or more "
            "--gpus",
        )
    held = nearest.peak.held
    of_model = sum(held[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER, LOG_PROBS))
    of_tokens = nearest.peak.total - of_model - held[INPUTS]
    remedy = (
        "weights, gradients, optimizer and log-prob head need more --gpus"
        if of_model > of_tokens
        else "lower --long-tokens, or divide the tokens by more --gpus (--context-parallel-size)"
    )
    return UserError(
        "plan-nothing-fits",
        f"no layout fits {request.gpus} GPUs of {request.limit / GIB:.4g} GiB: the nearest ({nearest.name}) lacks "
        f"{nearest.lacks(request)}; {remedy}, or use GPUs with more memory",
    )


def facts_of(request: Request, candidate: Candidate) -> list[str]:
    """Describes a rehearsed layout in lines: packs, copies, peaks, host memory."""
    peaks = " and ".join(f"{outcome.peak.total / GIB:.1f} GiB on rank {outcome.rank}" for outcome in candidate.outcomes)
    copies = candidate.process.copies // candidate.process.context
    parts = sorted(candidate.step.parts.items(), key=lambda part: -part[1])
    return [
        f"{candidate.name}: {candidate.packs} packs of a process and step"
        + (f", {copies} copies of the model" if copies > 1 else ""),
        f"rehearsed peak: {peaks}, of {request.limit / GIB:.4g} GiB",
        f"a step, forecast and not measured, on {request.machine.name}: {candidate.step.low:.1f} to "
        f"{candidate.step.high:.1f} s, {candidate.step.tokens_per_second:,.0f} tokens/s; "
        + ", ".join(f"{name} {part:.1f} s" for name, part in parts if part >= candidate.step.seconds / 50),
        *host_memory(request, candidate),
        *_conditions(candidate.config),
    ]


def _conditions(config: Config) -> list[str]:
    """Says what the optimizer of a plan costs beside memory and time."""
    training = config.training
    lines = []
    if "bf16" in (training.exp_avg_dtype, training.exp_avg_sq_dtype):
        lines.append("Adam's moments are rounded to bfloat16 once a step; --exp-avg-dtype fp32 plans without that")
    if training.optimizer_cpu_offload:
        lines.append(
            "the host's cores update the weights: set OMP_NUM_THREADS to a process's share of them, torchrun sets 1"
        )
    return lines


def host_memory(request: Request, candidate: Candidate) -> list[str]:
    """Describes the main memory of a node, as far as it is counted: processes, what the GPUs keep there (rehearsed),
    and what a save copies."""
    count = min(request.gpus, request.machine.gpus_per_node)
    away, copied = candidate.kept_on_host / GIB, candidate.saved / GIB
    offloaded = f", {count * away:.0f} GiB of states and activations" if away >= 0.1 else ""
    of_node = f", of {count * request.host_limit / GIB:.0f} GiB" if request.machine.host is not None else ""
    return [
        f"host memory of a node with {count} processes{of_node}: {count * PROCESS_GIB:.0f} GiB of libraries "
        f"(assumed){offloaded} and, while a checkpoint is saved, {count * copied:.0f} GiB (each process copies "
        f"{copied:.1f} GiB from its GPU)",
        "not counted: the page cache of the token store and of checkpoints, and data loading before the first step",
    ]
