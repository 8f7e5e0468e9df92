"""What is measured: each metric is declared once, with its name for people, its unit and the figure that draws it.

Training's lines, the report's figures and tables, and the tables of an evaluation read labels and units here. The
metrics that every run has are declared in this file, scores of answers in data/scoring.py, and a loss declares its own.
What nobody declared is shown by its plain name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TRAINING, ACCURACY = "training", "accuracy"
"""Figures: curves over the steps of a run; scores of answers by context length."""


LABELS = "metric_labels.json"
"""The file of a run folder that holds the declarations of what its loss measures besides the usual."""


@dataclass(frozen=True)
class Metric:
    """One number that is measured.

    Attributes:
        name: its field in metrics.jsonl, or in the results of an evaluation.
        label: its name for people, in lower case where it is a word; default: ``name``.
        unit: the name of its axis.
        higher_is_better: None where neither end is the better one, or that is not known.
        figure: the figure that draws it; None: none does.
        column: the report's table of what was learnt has it.
        line: a step's printed line has it, in this format: ``"po {:.4g}"``.
        limits: the ends of its axis, where they are known.
        binary: each value is 0 or 1.
    """

    name: str
    label: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    figure: str | None = TRAINING
    column: bool = True
    line: str = ""
    limits: tuple[float, float] | None = None
    binary: bool = False

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def title(self) -> str:
        """The label as the title of a panel; a plain name stays as it is."""
        return self.label if self.label == self.name else self.label[:1].upper() + self.label[1:]

    @property
    def head(self) -> str:
        """The label with its unit, as the head of a column; an arrow points to the better end."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return self.label + (f" ({self.unit})" if self.unit else "") + arrow


_DECLARED: dict[str, Metric] = {}


def register(*metrics: Metric) -> None:
    """Declares metrics; their order is that of panels, columns and printed lines.

    Raises:
        ValueError: another metric has the name of one.
    """
    for metric in metrics:
        if _DECLARED.setdefault(metric.name, metric) != metric:
            raise ValueError(f"two metrics are named {metric.name!r}")


def metric_of(name: str, more: Mapping[str, Metric] | None = None) -> Metric:
    """The metric that was declared under a name, here or in ``more``; else one that is shown by that name."""
    return _DECLARED.get(name) or (more or {}).get(name) or Metric(name)


def declared() -> list[Metric]:
    """All metrics, in the order of their declaration."""
    return list(_DECLARED.values())


def of_records(records: Iterable[Mapping[str, Any]], more: Mapping[str, Metric] | None = None) -> list[Metric]:
    """The metrics of training that records have numbers of: declared ones in their order, then others as they come."""
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    known = [name for name in _DECLARED if name in names]
    found = (metric_of(name, more) for name in dict.fromkeys([*known, *names]))
    return [one for one in found if one.figure == TRAINING]


def to_json(metrics: Iterable[Metric]) -> dict[str, dict[str, Any]]:
    """Declarations as JSON, by name, without the name."""
    return {metric.name: {key: value for key, value in asdict(metric).items() if key != "name"} for metric in metrics}


def from_json(written: Any) -> dict[str, Metric]:
    """Declarations that `to_json` wrote, by name; what this version cannot read is left out."""
    found = {}
    for name, fields in written.items() if isinstance(written, dict) else ():
        try:
            found[name] = Metric(name, **fields)
        except TypeError:
            continue
    return found


register(
    Metric("loss", "total loss", "nats", False, line="loss {:.4g}"),
    Metric("po_loss", "preference loss", "nats", False, line="po {:.4g}"),
    Metric("accuracy", "pair accuracy", "share ranked right", True, line="acc {:.4g}", limits=(0, 1)),
    Metric("margin", "reward margin", "chosen - rejected", True, line="margin {:.4g}"),
    Metric("alignment_loss", "alignment", "before alpha", False, line="align {:.4g}"),
    Metric("reward_chosen", "reward of chosen", "reward"),
    Metric("reward_rejected", "reward of rejected", "reward"),
    Metric("reward_long_chosen", "reward of chosen, long context", "reward", column=False),
    Metric("reward_long_rejected", "reward of rejected, long context", "reward", column=False),
    Metric("logp_chosen", "log-prob of chosen", "nats an answer"),
    Metric("logp_rejected", "log-prob of rejected", "nats an answer", figure=None),
    Metric("logp_long_chosen", "log-prob of chosen, long context", "nats an answer", figure=None),
    Metric("logp_long_rejected", "log-prob of rejected, long context", "nats an answer", figure=None),
    Metric("sft_loss", "likelihood term", "before its weight", False, column=False),
    Metric("nll", "negative log-likelihood", "nats per token", False, figure=None),
    Metric("short_long_gap_nats_per_token", "short-long gap", "nats per token", False),
    Metric("moe_aux_loss", "load balance of experts", "1 where balanced", False, figure=None),
    Metric("grad_norm", "gradient norm", "before clipping", column=False, line="grad {:.4g}"),
    *(
        Metric(name, label, unit, figure=None, line=line)
        for name, label, unit, line in (
            ("step", "step", "", ""),
            ("epoch", "epoch", "", ""),
            ("clip_grad", "largest gradient norm", "", ""),
            ("clipped", "clipped", "1 or 0", ""),
            ("lr", "learning rate", "", "lr {:.3g}"),
            ("groups", "examples", "", ""),
            ("tokens", "tokens", "", ""),
            ("tokens_per_second", "tokens per second", "", "{:,.0f} tok/s"),
            ("padding_share", "padding share", "", ""),
            ("compute_imbalance", "imbalance of compute", "", ""),
            ("memory_gib", "peak memory", "GiB", ""),
            ("memory_allocated_gib", "peak memory allocated by torch", "GiB", ""),
            ("seconds", "seconds a step", "", "{:.3g} s/step"),
        )
    ),
)
