"""The options of ``solopo evaluate``."""

from __future__ import annotations

import argparse

from megatron_solopo.arguments import Parser
from megatron_solopo.data.building.sources import add_source_option
from megatron_solopo.data.hf_model import DTYPES
from megatron_solopo.data.options import add_normalisation_option, add_prompt_options, add_tokenizer_options
from megatron_solopo.data.sampling.server_options import SERVER, TITLE, add_server_options
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.generation import DEFAULT_BATCH_TOKENS
from megatron_solopo.evaluation.items import Depths
from megatron_solopo.evaluation.tasks import tasks

MAX_NEW_TOKENS = 256
"""Default of --max-new-tokens; a task has the benchmark's."""
IN_PROCESS = {"device": "auto", "dtype": "auto", "batch_tokens": DEFAULT_BATCH_TOKENS}
OF_SERVER = {**SERVER, "server_api": "completions"}
"""Options that only one of the two back ends has, and their defaults."""


def lengths_option(flag: str, value: str) -> list[int]:
    """``"8,16,32"`` -> ascending lengths.

    Raises:
        UserError: not positive whole numbers separated by commas, or one occurs twice.
    """
    try:
        lengths = [int(part) for part in value.split(",")]
    except ValueError:
        raise UserError(
            "option-value", f"{flag} {value}: must be whole numbers separated by commas, such as 8,16,32"
        ) from None
    if min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise UserError("option-value", f"{flag} {value}: must be positive lengths, each once")
    return sorted(lengths)


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo evaluate",
        description="Ask a model the same questions at several context lengths and score its answers.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help="Hugging Face folder (a training run's --save-hf); with --server the name of the model on the server",
    )
    asked = group.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", nargs="+", default=[], metavar="FILE", help="question files")
    asked.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME[=FILE]",
        help="tasks of benchmarks, with the file that they read: " + _listed_tasks(),
    )
    add_source_option(group)
    group.add_argument(
        "--pool",
        nargs="+",
        default=[],
        metavar="FILE",
        help="further distractors, JSONL of {title, text}; the pool always has the paragraphs of all questions",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="ask the first N questions; the pool keeps all of them (default: all; 100 of a generated task)",
    )
    group.add_argument(
        "--training-data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="data that the model was trained on (questions, contexts, groups, conversations): questions that are part "
        "of it are left out",
    )
    group.add_argument(
        "--output",
        required=True,
        metavar="FILE.json",
        help="file of the results; the predictions go to FILE.predictions.jsonl",
    )
    group = parser.add_argument_group("context lengths")
    lengths = group.add_mutually_exclusive_group()
    lengths.add_argument(
        "--context-documents", metavar="N,N,...", help="numbers of documents, gold ones included, such as 8,16,32,64"
    )
    lengths.add_argument(
        "--context-tokens",
        metavar="N,N,...",
        help="lengths of the whole prompt in tokens (98 %% to 100 %% of N; of RULER and NIAH-Plus with the response), "
        "such as 1024,4096,8192; a longer prompt of LongBench is cut in the middle",
    )
    group.add_argument(
        "--depths",
        metavar="D,D,...",
        help="ask each question with its evidence at each of these depths, 0 at the start of the context to 1 at its "
        "end, such as 0,0.25,0.5,0.75,1 (default: once, at random places)",
    )
    add_tokenizer_options(parser, required=False)
    add_prompt_options(parser)
    group = parser.add_argument_group("generation (the most likely token each time)")
    add_generation_options(group, "256; of a task its benchmark's")
    group.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in a batch, padding and responses included; lower it when memory runs out "
        f"(default: {DEFAULT_BATCH_TOKENS})",
    )
    parser.set_defaults(max_new_tokens=None, dtype=None, device=None)
    add_server_options(parser.add_argument_group(TITLE), "completions")
    group = parser.add_argument_group(
        "scoring",
        "sub_em finds short gold answers (yes, no, one short word, a number) as whole words of a response's answer "
        "part only; sub_em_plain is the paper's, any part of the text",
    )
    add_normalisation_option(group, "unicode")
    group.add_argument(
        "--gold-log-prob",
        action="store_true",
        help="with --data: score also the log-prob of each question's first gold answer after the prompt, nats per "
        "token (gold_log_prob)",
    )
    group = parser.add_argument_group("randomness")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed; with its id it determines a question's distractors and their order (default: 0)",
    )
    return parser


def _listed_tasks() -> str:
    """Returns the tasks by name, with their files."""
    listed = [f"{name}=FILE ({task.file})" if task.file else name for name, task in tasks().items()]
    return "; ".join(listed).replace("%", "%%")


def add_generation_options(group: argparse._ArgumentGroup, new_tokens: str = "%(default)s") -> None:
    """The options that ``evaluate`` and ``ask`` share; ``new_tokens``: the default of --max-new-tokens in words."""
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"a response is cut after N tokens (default: {new_tokens})",
    )
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="type of the weights; auto: the checkpoint's on a GPU, float32 on a CPU (default)",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="device of the model; auto: a GPU if there is one (default)",
    )


def depths_option(value: str | None) -> Depths:
    """``"0,0.5,1"`` -> ascending depths; None -> (None,).

    Raises:
        UserError: not numbers from 0 to 1 separated by commas, or one occurs twice.
    """
    if value is None:
        return (None,)
    try:
        depths = sorted(float(part) for part in value.split(","))
    except ValueError:
        depths = []
    if not depths or not 0 <= depths[0] <= depths[-1] <= 1 or len(set(depths)) < len(depths):
        raise UserError(
            "option-value",
            f"--depths {value}: must be numbers from 0 to 1 separated by commas, each once, such as 0,0.5,1",
        )
    return tuple(depths)
