"""The `solopo` command: one sub-command for each program of the package."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_solopo import __version__, launch
from megatron_solopo.errors import LostProcess, UserError, files_explained
from megatron_solopo.terminal import name_lines, rank_and_host, write_line

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("megatron_solopo.pipeline", "runs the stages of a recipe: data, training, evaluation, report"),
    "train": (
        "megatron_solopo.training.run",
        "trains by preference optimization or sft (pretrain_solopo.py under torchrun)",
    ),
    "prepare-data": (
        "megatron_solopo.data.building.prepare_data",
        "builds short and long contexts of questions with documents",
    ),
    "sample-responses": (
        "megatron_solopo.data.sampling.sample_responses",
        "samples responses to the contexts from a model",
    ),
    "build-pairs": (
        "megatron_solopo.data.pairing.build_pairs",
        "builds preference groups of contexts and scored responses",
    ),
    "tokenize-data": (
        "megatron_solopo.data.tokenized.tokenize_data",
        "tokenizes preference groups before training",
    ),
    "inspect-data": (
        "megatron_solopo.data.inspection.inspect_data",
        "shows a group with the tokens of the loss; writes a page about a file",
    ),
    "evaluate": ("megatron_solopo.evaluation.evaluate", "measures a Hugging Face model's accuracy by context length"),
    "report": ("megatron_solopo.evaluation.report", "draws curves and tables of runs and evaluations (PNG, Markdown)"),
    "ask": ("megatron_solopo.evaluation.ask", "asks models one question about one document"),
    "convert-checkpoint": (
        "megatron_solopo.training.convert",
        "converts weights between Hugging Face and Megatron, or compares them",
    ),
    "plan": (
        "megatron_solopo.planning.plan",
        "finds layouts of a model that fit the GPUs, and writes the best as YAML",
    ),
    "verify-parallelism": (
        "megatron_solopo.training.verify",
        "compares loss and gradient of a step under parallel layouts",
    ),
    "benchmark": (
        "megatron_solopo.benchmark.command",
        "measures speed and memory of training, against its FLOP floor, a baseline and TRL",
    ),
    "launch": ("megatron_solopo.launch", "starts processes as torchrun does; they report a mistake once"),
    "env": ("megatron_solopo.environment", "prints versions, devices, cores and memory of this machine"),
}
"""Sub-command -> (module with `main(argv) -> exit status`, one line of help)."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: solopo COMMAND [options]",
            "",
            *lines,
            "",
            "solopo COMMAND --help explains a command; solopo --version prints the version.",
        ]
    )


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Calls ``main(argv)`` and reports a user's mistake in one line on stderr.

    Returns:
        ``main``'s exit status; 2 after a `UserError` or a file that cannot be read or written; 130 after Ctrl-C.
    """
    quiet()
    before = sys.stderr
    name_lines()
    try:
        with files_explained():
            status = main(argv)
    except UserError as error:
        _report(error)
        status = launch.REPORTED
    except KeyboardInterrupt:
        if launch.first_to_report("interrupted"):
            write_line("interrupted", names_rank=True)
        status = 130
    sys.stderr = before  # not where another exception ends the process: its traceback is named too
    return status


def quiet() -> None:
    """Silences torch's and megatron-core's warnings of deprecations inside them and of absent CUDA extensions.

    Every command comes through `run` before it imports them.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    # The CPU platform intercepts every torch call, so torch's warnings about megatron-core name its file.
    warnings.filterwarnings("ignore", module=r"megatron_solopo\.parallel\.cpu_shim")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _report(error: UserError) -> None:
    """Prints a mistake, unless another process of this machine printed the same one."""
    message = f"{error.message} [{error.code}]"
    if launch.first_to_report(message, passing=isinstance(error, LostProcess)):
        # Under torchrun all ranks write to one terminal, so all but rank 0 name themselves; what `agreed` raises on
        # all of them names a rank already.
        named = os.environ.get("RANK", "0") == "0" or message.startswith("rank ")
        write_line(f"error: {message}" if named else f"error: {rank_and_host()}: {message}", names_rank=True)


def dispatch(argv: list[str] | None = None) -> int:
    """Runs the sub-command ``argv[0]`` with the rest of ``argv`` (default: the command line).

    Raises:
        UserError: there is no such sub-command; the message names the nearest one.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"solopo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else "the commands are " + ", ".join(COMMANDS)
        raise UserError("command-unknown", f"solopo {name}: no such command; {hint}")
    module = importlib.import_module(COMMANDS[name][0])
    # argparse prints this name in usage lines.
    sys.argv = [f"solopo {name}", *rest]
    return module.main(rest)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command."""
    return run(dispatch, argv)


def run_tool(path: str) -> None:
    """Runs the sub-command that a file of tools/ is named after, with the rest of the command line, and exits."""
    sys.exit(main([Path(path).stem.replace("_", "-"), *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
