"""A report of runs and evaluations: Markdown with tables, and figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.data.options import check_outputs
from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.errors import UserError, require
from megatron_solopo.evaluation.results import (
    Evaluation,
    Run,
    labelled,
    labels_of,
    metrics_file,
    read_evaluations,
    read_runs,
)
from megatron_solopo.evaluation.scorers import BENCHMARK_SCORERS, GOLD_LOG_PROB


def write_report(
    output: str | Path,
    runs: Sequence[Run] = (),
    evaluations: Sequence[Evaluation] = (),
    counts: Sequence[str] = (),
    title: str = "Report",
    text: str = "",
    closing: str = "",
    metric: str = "sub_em",
) -> tuple[Path, list[Path]]:
    """Writes the Markdown file and its figures (``<name>-*.png`` beside it); returns the paths of both.

    Runs and evaluations with the same label are seeds of one thing: they are averaged, and the spread is shown.

    Args:
        counts: [LABEL=]FILE of build-pairs --counts-output.
        text, closing: Markdown put after the title and at the end.
        metric: the one that is drawn, a key of `SCORERS` or `BENCHMARK_SCORERS`, or `GOLD_LOG_PROB`.

    Raises:
        UserError: nothing to report, or a package of the extra "report" is missing.
    """
    _check_packages()
    from megatron_solopo.evaluation.accuracy import accuracy_section
    from megatron_solopo.evaluation.curves import training_section
    from megatron_solopo.evaluation.plots import look
    from megatron_solopo.evaluation.sampled import read_counts, sampled_section

    output = Path(output)
    if not runs and not evaluations and not counts:
        raise UserError("option-missing", "nothing to report: set --runs, --evaluations or --counts")
    output.parent.mkdir(parents=True, exist_ok=True)
    looks = look(labels_of(evaluations, runs))
    figures: list[Path] = []
    parts = [f"# {title}", text.strip()]
    if counts:
        parts += sampled_section([read_counts(one) for one in counts])
    if evaluations:
        parts += accuracy_section(output, evaluations, looks, metric, figures)
    if runs:
        parts += training_section(output, runs, looks, figures)
    write_text(output, "\n\n".join(filter(None, [*parts, closing.strip()])) + "\n")
    return output, figures


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo report",
        description="Draws training curves and accuracy by context length, and writes them with tables as Markdown.",
    )
    inputs = parser.add_argument_group(
        "input", "The same LABEL several times means several seeds: they are averaged, and their spread is shown."
    )
    inputs.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="[LABEL=]DIR",
        help="run folders (metrics.jsonl is read); LABEL defaults to the folder's name, with those above it where "
        "that distinguishes runs",
    )
    inputs.add_argument(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="[LABEL=]FILE",
        help="results written by evaluate; LABEL defaults to the name of the model's folder, with those above it "
        "where that distinguishes models",
    )
    inputs.add_argument(
        "--counts",
        nargs="+",
        default=[],
        metavar="[LABEL=]FILE",
        help="counts written by build-pairs --counts-output; LABEL defaults to the file's name",
    )
    outputs = parser.add_argument_group("output")
    outputs.add_argument(
        "--output", required=True, metavar="FILE.md", help="the Markdown file; the figures go beside it"
    )
    outputs.add_argument("--title", default="Report", help="first line of the report (default: %(default)s)")
    outputs.add_argument(
        "--metric",
        choices=[*SCORERS, *BENCHMARK_SCORERS, GOLD_LOG_PROB],
        default="sub_em",
        help="the metric that is drawn (default: %(default)s; of a task its benchmark's)",
    )
    return parser


def _check_packages() -> None:
    for package in ("matplotlib", "pandas", "tabulate"):
        require("solopo report", package, "report")


def main(argv: list[str] | None = None) -> int:
    """``solopo report``."""
    args = build_parser().parse_args(argv)
    _check_packages()  # before a run is read, which may take long
    read = [("--evaluations", labelled(argument, "")[1]) for argument in args.evaluations]
    read += [("--runs", metrics_file(labelled(argument, "")[1])) for argument in args.runs]
    read += [("--counts", labelled(argument, "")[1]) for argument in args.counts]
    check_outputs([("--output", args.output)], read)
    path, figures = write_report(
        args.output,
        read_runs(args.runs, required=not args.evaluations and not args.counts),
        read_evaluations(args.evaluations),
        args.counts,
        title=args.title,
        metric=args.metric,
    )
    print(f"wrote {path} and {len(figures)} {'figure' if len(figures) == 1 else 'figures'} beside it")
    return 0
