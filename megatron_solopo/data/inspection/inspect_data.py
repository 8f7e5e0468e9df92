"""``solopo inspect-data``: one example on the terminal, as a reader and as the loss sees it; a whole file as a page."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.config import OWNER, Config, flag
from megatron_solopo.config_load import load, read_yaml
from megatron_solopo.data.files.inputs import first_field
from megatron_solopo.data.inspection.blocks import console
from megatron_solopo.data.inspection.charts import charts, distribution_table
from megatron_solopo.data.inspection.examples import Example, holds_groups, read_examples, sample
from megatron_solopo.data.inspection.facts import measure, measure_all
from megatron_solopo.data.inspection.page import Source, write_page
from megatron_solopo.data.inspection.statistics import Statistics
from megatron_solopo.data.inspection.view import make_view
from megatron_solopo.data.options import TokenizerOptions, add_tokenizer_options, check_outputs, files_of
from megatron_solopo.data.tokenized.stretch import Stretch
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import all_scores
from megatron_solopo.progress import ProgressBar

METHOD_OPTIONS = (
    "context_mode",
    "preference_loss",
    "alignment_target",
    "alignment_reference",
    "alignment_stop_short_gradient",
    "sft_weight",
    "stretch_positions",
    "stretch_fraction",
)
"""Options of training that decide which responses are scored on which context, what they enter, and positions."""

TOKENIZER = ("chat_template", "chat_template_kwargs", "chat_template_date", "add_special_tokens", "eos_token")
"""Options of training that decide the tokens."""


def build_parser() -> Parser:
    parser = Parser(
        config=False,  # its --config is that of a training run
        prog="solopo inspect-data",
        description="Show one preference group, or one question's contexts, as text and as the tokens of the loss, and "
        "write a page with distributions, oddities and samples of the whole file.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="preference groups, JSONL or Parquet (also TRL's prompt / chosen / rejected), or what prepare-data wrote",
    )
    add_tokenizer_options(parser)
    group = parser.add_argument_group("which example to print (default: the first, or none with --output)")
    group.add_argument("--id", metavar="ID", help="example with this id")
    group.add_argument("--index", type=int, metavar="N", help="N-th example of the file, from 0")
    group.add_argument("--random", action="store_true", help="example drawn with --seed")
    group.add_argument(
        "--full", action="store_true", help="show every document in full, on the terminal and on the page"
    )
    group = parser.add_argument_group("page")
    group.add_argument("--output", metavar="FILE", help="HTML page about the whole file to write; it needs no network")
    group.add_argument("--samples", type=int, metavar="N", help="examples that the page shows (default: 50)")
    group.add_argument("--limit", type=int, metavar="N", help="count the first N examples only (default: all)")
    group.add_argument(
        "--workers", type=int, metavar="N", help="threads that tokenize (default: as many as there are cores)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="random seed of --random and of the page's samples (default: 0)"
    )
    group = parser.add_argument_group("tokens of the loss; options of training, with its defaults")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="read these options, the chat template and new special tokens from a run's YAML file",
    )
    group.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="count examples that exceed this --seq-length of training (default: do not)",
    )
    for name in METHOD_OPTIONS:
        spec = OWNER[name].spec
        text, default = spec.metadata["help"].replace("%", "%%"), spec.default
        if isinstance(default, bool):
            text = f"{text} (default: {'on' if default else 'off'})"
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            form = "|".join(spec.metadata["choices"] or "X")
            text += "" if default is None else f" (default: {default})"
            group.add_argument(flag(name), metavar=form, help=text)
    return parser


def training_config(options: argparse.Namespace) -> Config:
    """Returns the configuration of the training run that the options describe, with the checks of training.

    Raises:
        UserError: what training itself would refuse, in its words.
    """
    argv = ["--hf-path", options.tokenizer, "--train-data", options.data, "--save", "-", "--train-iters", "1"]
    if options.config:
        # The training command line may set how long to train.
        sets_length = {"train_iters", "train_epochs"} & read_yaml(options.config).keys()
        argv = ["--config", options.config, *(argv[:-2] if sets_length else argv)]
    if options.seq_length is not None:
        argv += ["--seq-length", str(options.seq_length)]
    for name in METHOD_OPTIONS:
        value = getattr(options, name)
        if isinstance(value, bool):
            argv.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        elif value is not None:
            argv += [flag(name), value]
    config, _ = load(argv)
    if config.method.objective != "preference":
        raise UserError(
            "option-conflict",
            f"--config {options.config}: --objective sft has no preference groups; set the config of a preference run",
        )
    return config


def _check(options: argparse.Namespace, groups: bool) -> None:
    selectors = {"--id": options.id is not None, "--index": options.index is not None, "--random": options.random}
    picked = [name for name, is_set in selectors.items() if is_set]
    if len(picked) > 1:
        raise UserError("option-conflict", f"{picked[0]} and {picked[1]}: set one of them; each names one example")
    if options.index is not None and options.index < 0:
        raise UserError("option-value", f"--index {options.index}: examples are counted from 0")
    for name in ("samples", "limit", "workers"):
        value = getattr(options, name)
        if value is None:
            continue
        if not options.output:
            raise UserError("option-unused", f"{flag(name)} has no effect without --output")
        if value < 1:
            raise UserError("option-value", f"{flag(name)} {value}: must be at least 1")
    if options.seed is not None and not (options.output or options.random):
        raise UserError("option-unused", "--seed has no effect without --random or --output")
    if not groups:
        unused = [name for name in (*METHOD_OPTIONS, "seq_length", "config") if getattr(options, name) is not None]
        if unused:
            raise UserError(
                "option-unused",
                f"{flag(unused[0])}: {options.data} holds contexts without responses, which no loss is computed of; "
                "set the groups that build-pairs wrote from them",
            )
    read = [("--data", options.data), ("--config", options.config), *files_of(options)]
    check_outputs([("--output", options.output)], read)


def find(options: argparse.Namespace) -> Example:
    """Returns the example that --id, --index or --random names, else the first.

    Raises:
        UserError: there is no such example; the nearest ids or the range are named.
    """
    ids: list[str] = []
    examples = read_examples(options.data)
    for example in sample(examples, 1, options.seed or 0) if options.random else examples:
        by_id = options.id is not None
        if options.random or (example.id == options.id if by_id else example.index == (options.index or 0)):
            return example
        ids.append(example.id)
    if options.id is not None:
        near = difflib.get_close_matches(options.id, ids, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            "example-unknown", f"--id {options.id}: no such id among the {len(ids):,} of {options.data}{hint}"
        )
    if not ids:
        raise UserError("data-empty", f"--data {options.data}: holds no record")
    raise UserError(
        "example-unknown", f"--index {options.index}: {options.data} holds {len(ids):,} examples, 0 to {len(ids) - 1}"
    )


def _page(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, config: Config | None) -> None:
    seed, method, limit = options.seed or 0, config.method if config else None, _seq_length(config)
    scored, statistics = all_scores(method) if method else frozenset(), Statistics()
    count = partial(measure, tokenizer=tokenizer, scored=scored, seq_length=limit)
    examples = islice(read_examples(options.data), options.limit)
    measured = measure_all(examples, count, options.workers or len(os.sched_getaffinity(0)))

    def counted() -> Iterator[Example]:
        for example, facts in ProgressBar(measured, desc="counting", unit="example"):
            statistics.add(example, facts)
            yield example

    shown = sample(counted(), options.samples or 50, seed)
    if not statistics.examples:
        raise UserError("data-empty", f"--data {options.data}: holds no record")
    stretch = Stretch.of(config) if config else None
    views = [make_view(one, tokenizer, method or Config().method, limit, options.full, stretch) for one in shown]
    kind = "contexts" if method is None else "groups"
    source = Source(Path(options.data).name, kind, options.tokenizer, method, seed, options.full, limit)
    size = write_page(Path(options.output), source, statistics, views)
    print(f"{statistics.examples:,} {kind} counted, {len(views)} sampled")
    if bias := statistics.length_bias():
        print(("warning: " if bias[1] else "") + bias[0])
    odd = [f"{number} {words}" for _, words, number in statistics.checks() if number]
    print("oddities: " + ("; ".join(odd) or "none"))
    console().print(distribution_table(charts(statistics)))
    print(f"wrote {options.output} ({size / 1e6:.1f} MB)")


def _seq_length(config: Config | None) -> int | None:
    """Returns the length to check, where one was asked for."""
    return config.data.seq_length if config and "seq_length" in config.explicit else None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    groups = holds_groups(options.data)
    _check(options, groups)
    config = training_config(options) if groups else None
    if config is not None:
        for name in TOKENIZER:
            setattr(options, name, getattr(options, name) or getattr(config.model, name))
    tokenizer = TokenizerOptions.of(options).load(of_data=first_field(options.data, template_kwargs.DATE))
    if not options.output or options.id is not None or options.index is not None or options.random:
        method = (config or Config()).method
        stretch = Stretch.of(config) if config else None
        view = make_view(find(options), tokenizer, method, _seq_length(config), options.full, stretch)
        console().print(*view.printed(options.data), sep="\n")
    if options.output:
        _page(options, tokenizer, config)
    return 0
