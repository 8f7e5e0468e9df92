"""Markdown and figure of measured tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_solopo.atomic import write_text
from megatron_solopo.benchmark.cases import LONGEST
from megatron_solopo.benchmark.flops import FLOPS_COUNTED
from megatron_solopo.benchmark.ratios import Ratio, outside, ratios_of
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.plots import COLOURS, save_figure, styled
from megatron_solopo.evaluation.tables import markdown_table

Figures = Mapping[str, Any]

NOISY = 0.05
"""Spread of the rounds from which on a row is marked as not measured on an idle machine."""
MARK = "*"
PARTS = {"forward": COLOURS[0], "backward": COLOURS[5], "outside": COLOURS[1], "TRL's step": "#BBBBBB"}
"""Parts of a step in the figure -> colour; TRL's is not divided."""
START, END = "<!-- tables: solopo benchmark -->", "<!-- end of tables -->"

LEGEND = (
    "Medians of the rounds; {clock}spread = (largest - smallest) / median. "
    f"{MARK} = spread above {NOISY:.0%}: not measured on an idle machine. "
    f"FLOPs: {FLOPS_COUNTED}. Ceiling = best product of two square matrices of the table's processes. Peak = resident "
    "memory above that before the model was built (CPU), allocated tensors (CUDA). Outside = share of the step outside "
    "forward and backward."
)


def markdown(records: Sequence[Figures], clock: str) -> str:
    """Returns all tables with their ratios, which are of times by the ``clock``."""
    of_cpu = "ratios, FLOP/s and shares are of processor time, all others of the clock; "
    parts = [LEGEND.format(clock=of_cpu if clock == "cpu" else "")]
    for record in records:
        parts += [f"### {record['table']['title']}", _described(record), _rows(record, clock)]
        ratios = ratios_of(record, clock)
        parts += [_ratios(ratios)] if ratios else []
        parts += _phases(record)
        parts += _memory(record)
        parts += _costs(record)
        parts += _options(record)
    return "\n\n".join(parts) + "\n"


def _described(record: Figures) -> str:
    """The machine, the date and the sizes of a table."""
    table, machine, setting = record["table"], record["machine"], record["table"]["setting"]
    vocabulary = f", vocabulary of {setting['vocab_size']:,}" if "-l" in setting["model"] else ""
    sizes = (
        f"{setting['model']}{vocabulary}, {'bf16' if setting['bf16'] else 'fp32'}, prompts of {setting['long']:,} and "
        f"{setting['short']:,} tokens, responses of {setting['response']}, {setting['pairs']} pairs a step"
    )
    steps = f"{table['rounds']} rounds of {table['steps']} steps" if table["kind"] != LONGEST else "one step a length"
    return (
        f"{sizes}; {steps}. {machine['name']}, {setting['threads']} threads, {setting['device']}, torch "
        f"{machine['torch']}, {record['when']}."
    )


def _rows(record: Figures, clock: str) -> str:
    if record["table"]["kind"] == LONGEST:
        rows = [
            {
                "case": case["name"],
                "limit GiB": f"{case['limit_gib']:.2f}",
                "longest, tokens": f"{case['longest']:,}",
                "too long": f"{case['too_long']:,}",
                "peak GiB": f"{case['tries'][str(case['longest'])]:.2f}",
            }
            for case in record["cases"]
        ]
        return markdown_table(pandas.DataFrame(rows))
    best = max(one["ceiling"][clock] for case in record["cases"] for one in case["rounds"])
    return markdown_table(pandas.DataFrame([_row(case, best, clock) for case in record["cases"]]))


def _row(case: Figures, ceiling: float, clock: str) -> dict[str, str]:
    rounds = case["rounds"]
    seconds = [statistics.median(one["seconds"]) for one in rounds]
    cpu = statistics.median(statistics.median(one["cpu"]) for one in rounds)
    step, spread = statistics.median(seconds), spread_of(seconds)
    rate = sum(rounds[0]["flops"]) / (step if clock == "seconds" else cpu)
    timed = rounds[0]["phases"] is not None
    share = statistics.median(outside(one, clock) for one in rounds) if timed else None
    return {
        "case": case["name"] + (f" {MARK}" if spread > NOISY else ""),
        "step s": f"{step:.2f}",
        "spread": f"{spread:.0%}",
        "CPU s": f"{cpu:.2f}",
        "pairs/s": f"{rounds[0]['pairs'] / step:.3f}",
        "tokens/s": f"{rounds[0]['tokens'] / step:,.0f}",
        "GFLOP/s": f"{rate / 1e9:,.0f}",
        "of ceiling": f"{rate / ceiling:.0%}",
        "peak GiB": f"{statistics.median(one['peak_gib'] for one in rounds):.2f}",
        "outside": "" if share is None else f"{share:.1%}",
    }


def spread_of(values: Sequence[float]) -> float:
    """Returns the range of values over their median."""
    return (max(values) - min(values)) / statistics.median(values)


def _ratios(ratios: Sequence[Ratio]) -> str:
    rows = [
        {
            "ratio": ratio.name.partition(": ")[2],
            "value": f"{ratio.value:.3f}",
            "range": f"{ratio.low:.3f} to {ratio.high:.3f}",
            "aim": "" if ratio.aim is None else f"{'>=' if ratio.better == 'higher' else '<='} {ratio.aim:g}",
            "": "" if ratio.aim is None else "reached" if ratio.reaches else "not reached",
        }
        for ratio in ratios
    ]
    return markdown_table(pandas.DataFrame(rows))


def _phases(record: Figures) -> list[str]:
    """Seconds of each phase of the package's steps."""
    rows = []
    for case in record["cases"]:
        of_rounds = [one["phases"]["seconds"] for one in case.get("rounds", ()) if one["phases"]]
        if of_rounds:
            medians = {name: statistics.median(each[name] for each in of_rounds) for name in of_rounds[0]}
            rows.append({"seconds of a step": case["name"]} | {name: f"{value:.3f}" for name, value in medians.items()})
    return [markdown_table(pandas.DataFrame(rows))] if rows else []


def _memory(record: Figures) -> list[str]:
    """Memory by kind at the rehearsed peak."""
    rows = [
        {"memory at the peak, rehearsed, GiB": case["name"]}
        | {kind: f"{size:.3f}" for kind, size in case["memory_gib"].items() if kind != "communication"}
        for case in record["cases"]
        if case.get("memory_gib")
    ]
    return [markdown_table(pandas.DataFrame(rows))] if rows else []


def _costs(record: Figures) -> list[str]:
    lines = [
        f"- {case['name']}: " + ", ".join(f"`{name}` {share:.0%}" for name, share in case["rounds"][-1]["costs"])
        for case in record["cases"]
        if case.get("rounds") and case["rounds"][-1]["costs"]
    ]
    return ["Largest costs of a step (share of the operators' own time):\n\n" + "\n".join(lines)] if lines else []


def _options(record: Figures) -> list[str]:
    """The settings of TRL's trainer."""
    options = {
        case["rounds"][0]["options"] for case in record["cases"] if case["case"]["side"] == "trl" and case.get("rounds")
    }
    return ["Settings of TRL: " + "; ".join(f"`{text}`" for text in sorted(options)) + "."] if options else []


@styled
def draw(path: Path, records: Sequence[Figures]) -> None:
    """Draws the phases of a step of each case as bars, a panel for each table; and the longest contexts.

    Args:
        path: of the PNG file.
    """
    heights = [len(record["cases"]) + 1.8 for record in records]
    figure = Figure(figsize=(7.4, 0.3 * sum(heights) + 0.7))
    panels = figure.subplots(len(records), squeeze=False, height_ratios=heights)[:, 0]
    for axes, record in zip(panels, records, strict=True):
        cases = list(reversed(record["cases"]))
        labels = [case["name"] for case in cases]
        axes.grid(axis="x")
        axes.set_title(record["table"]["title"])
        if record["table"]["kind"] == LONGEST:
            axes.barh(labels, [case["longest"] for case in cases], color=COLOURS[5])
            axes.set_xlabel("longest context, tokens")
            continue
        done = [0.0] * len(cases)
        for name, colour in PARTS.items():
            widths = [_seconds(case, name) for case in cases]
            axes.barh(labels, widths, left=done, color=colour)
            done = [start + width for start, width in zip(done, widths, strict=True)]
        axes.set_xlabel("seconds a step")
    keys = [Patch(color=colour, label=name) for name, colour in PARTS.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys))
    save_figure(figure, path)


def _seconds(case: Figures, part: str) -> float:
    """Returns the seconds of one of `PARTS` in a step."""
    of_rounds = []
    for one in case["rounds"]:
        phases, total = one["phases"], statistics.mean(one["seconds"])
        known = phases["seconds"] if phases else {}
        of_rounds.append(
            {
                "forward": known.get("forward", 0.0),
                "backward": known.get("backward", 0.0),
                "outside": total - known["forward"] - known["backward"] if phases else 0.0,
                "TRL's step": 0.0 if phases else total,
            }[part]
        )
    return statistics.median(of_rounds)


def page_parts(path: Path) -> tuple[str, str]:
    """Returns what is before and after the tables of a page.

    Raises:
        UserError: the page has no marks.
    """
    before, mark, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError("page-markers-missing", f"--page {path}: the lines {START} and {END} are missing")
    return before, after


def write_page(path: Path, text: str) -> None:
    """Replaces the tables of a page."""
    before, after = page_parts(path)
    write_text(path, f"{before}{START}\n\n{text}\n{END}{after}")
