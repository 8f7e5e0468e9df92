"""``solopo sample-responses``: N responses per question, sampled in process or from an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.data.building.contexts import read_contexts
from megatron_solopo.data.files.inputs import first_field
from megatron_solopo.data.hf_model import DTYPES
from megatron_solopo.data.options import TokenizerOptions, add_tokenizer_options, check_jsonl, check_outputs, files_of
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import SampledJobs, check_output, output_settings
from megatron_solopo.data.sampling.sampled import Statistics
from megatron_solopo.data.sampling.server_options import (
    SERVER,
    TITLE,
    add_server_options,
    check_server_options,
    set_defaults,
)
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar

IN_PROCESS = {"device": "auto", "dtype": "auto", "batch_size": 64}
OF_SERVER = {**SERVER, "server_api": "chat", "samples_per_request": None}
"""Options that only one of the two backends has, and their defaults."""


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo sample-responses",
        description="Sample responses to every question of a contexts file, with a Hugging Face model in this process "
        "or from a server. To resume a stopped run, repeat the command. A larger --samples or --limit extends "
        "a complete output.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--contexts", required=True, metavar="FILE", help="contexts file of prepare-data")
    group.add_argument("--output", required=True, metavar="FILE", help="responses, JSONL of {id, responses, finished}")
    group.add_argument("--overwrite", action="store_true", help="replace a complete output")
    group.add_argument("--limit", type=int, metavar="N", help="use the first N questions (default: all)")
    group.add_argument(
        "--sample-on",
        choices=("short", "long"),
        default="short",
        help="context the responses are sampled on (default: short, as SoLoPO does)",
    )
    parser.add_argument_group("model").add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help="Hugging Face folder; with --server the name of the model on the server",
    )
    add_tokenizer_options(parser, required=False)
    group = parser.add_argument_group("sampling")
    group.add_argument("--samples", type=int, default=32, metavar="N", help="responses per question (default: 32)")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.85,
        metavar="T",
        help="sampling temperature; 0: always the most probable token (default: 0.85)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens whose probabilities sum to P (default: 1)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="cut a response after N tokens and mark it as unfinished (default: 512)",
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    group = parser.add_argument_group("in this process")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="device of the model; auto: a GPU if there is one (default)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        help="type of the weights; auto: the checkpoint's on a GPU, float32 on a CPU (default)",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences decoded at once (default: 64)")
    group = parser.add_argument_group(TITLE)
    add_server_options(group, "chat")
    group.add_argument(
        "--samples-per-request",
        type=int,
        metavar="N",
        help="responses per request (default: 8; 1 at temperature 0 and where the server returns only one)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Sets the defaults of options that were not passed.

    Raises:
        UserError: a value is wrong, or an option would have no effect.
    """
    set_defaults(options, IN_PROCESS, OF_SERVER)
    for name, low in (
        ("samples", 1),
        ("max_new_tokens", 1),
        ("batch_size", 1),
        ("limit", 1),
        ("samples_per_request", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError("option-value", f"--{name.replace('_', '-')} {value}: set a number of at least {low}")
    check_server_options(options)
    if not options.temperature >= 0:
        raise UserError(
            "option-value", f"--temperature {options.temperature}: set 0 (most probable token) or a positive number"
        )
    if not 0 < options.top_p <= 1:
        raise UserError("option-value", f"--top-p {options.top_p}: set a number above 0 and at most 1")
    if (options.samples_per_request or 1) > 1 and options.temperature == 0:
        raise UserError(
            "option-conflict",
            f"--samples-per-request {options.samples_per_request} with --temperature 0: servers answer such a request "
            "with one response; leave it out",
        )
    check_outputs([("--output", options.output)], [("--contexts", options.contexts), *files_of(options)])
    check_jsonl("--output", options.output)


def _prompts(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[Prompt]:
    for pair in ProgressBar(read_contexts(options.contexts), desc="prompts", unit="question", leave=False):
        chat = getattr(pair, f"{options.sample_on}_messages")
        try:
            yield Prompt(pair.id, chat, prompt_ids(tokenizer, chat))
        except UserError as error:
            raise error.at(f"--contexts {options.contexts}: question {pair.id!r}") from None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    _check(options)
    named = TokenizerOptions.of(options, options.model)
    with SampledJobs(Path(options.output)) as jobs:  # locked before anything is written
        return _sample(options, named, jobs)


def _sample(options: argparse.Namespace, named: TokenizerOptions, jobs: SampledJobs) -> int:
    output = Path(options.output)
    earlier = jobs.settings
    if not earlier and not options.overwrite:
        earlier = output_settings(output) or {}
    tokenizer = named.load(
        of_resumed=template_kwargs.recorded_date(earlier.get(template_kwargs.DATE)),
        of_data=first_field(options.contexts, template_kwargs.DATE),
    )
    prompts = Prompts(output.parent, islice(_prompts(options, tokenizer), options.limit))
    if not prompts:
        raise UserError("data-empty", f"--contexts {options.contexts}: holds no question")
    if options.server:  # its client is an optional package
        from megatron_solopo.data.sampling.server import FromServer as Backend
    else:
        from megatron_solopo.data.sampling.sampler import InProcess as Backend
    with Path(options.contexts).open("rb") as file:
        contexts = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        "contexts": contexts,
        "model": str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        **text_facts(named.folder, tokenizer),
        "num_samples_context": options.sample_on,  # the option's name in version 0.1, whose outputs are extended too
        **{name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")},
    }
    if output.exists() and not options.overwrite:  # before a model is loaded
        check_output(output, settings)
    backend = Backend(options, tokenizer, prompts)
    statistics = Statistics()
    jobs.begin_sampling(settings | backend.settings, anew=options.overwrite)
    if not jobs.extend(prompts.names, options.samples):
        print(f"{output} holds {options.samples} responses to each of {len(prompts)} questions already")
        return 0
    start = time.monotonic()
    backend.run(jobs, statistics)
    seconds = time.monotonic() - start
    complete = jobs.finish(prompts.names, options.samples, backend.notes)
    print(f"wrote {len(prompts)} questions x {options.samples} responses to {options.output}")
    if not complete:
        print(f"  more samples or questions are in {jobs.place}, for a larger --samples or --limit")
    if statistics.responses:
        speed, mean = statistics.tokens / max(seconds, 1e-9), statistics.tokens / statistics.responses
        print(
            f"sampled now: {statistics.responses} responses, {statistics.tokens} tokens in {seconds:.1f} s "
            f"({speed:.0f} tokens/s), mean length {mean:.1f} tokens"
        )
        print(
            f"  unfinished after {options.max_new_tokens} tokens: {statistics.unfinished}; empty: {statistics.empty}; "
            f"text re-tokenizes to other ids: {statistics.mismatches}"
        )
    return 0
