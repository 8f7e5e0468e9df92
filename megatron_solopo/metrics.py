"""Metrics: each is declared once, with its label, unit and figure.

Training's printed lines, the report's figures and tables, and the tables of an evaluation use these labels and units.
This file declares the metrics of every run, data/scoring.py the scores of answers, and each loss its metrics. An
undeclared metric is shown by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

TRAINING, ACCURACY = "training", "accuracy"
"""Figures: curves over the steps of a run; scores of answers by context length."""


LABELS = "metric_labels.json"
"""The file of a run folder with the declarations of its loss's metrics."""


@dataclass(frozen=True)
class Metric:
    """A number that training or an evaluation records.

    Attributes:
        name: its field in metrics.jsonl, or in the results of an evaluation.
        label: its name in tables and figures, in lower case; default: ``name``.
        unit: the label of its axis.
        higher_is_better: None if neither direction is better, or if that is unknown.
        figure: the figure that draws it; None: no figure.
        column: whether the report's table of training results has a column for it.
        line: its format in a step's printed line, such as ``"po {:.4g}"``; "": it is not printed.
        limits: the ends of its axis, if they are fixed.
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
        """The label as the title of a panel, capitalized unless it is the name."""
        return self.label if self.label == self.name else self.label[:1].upper() + self.label[1:]

    @property
    def is_share(self) -> bool:
        """Whether a score is from 0 to 1, as accuracies are; scores that nobody declared are taken for such."""
        return self.figure != ACCURACY or self.limits == (0, 1)

    @property
    def head(self) -> str:
        """The label with its unit as the head of a column, with an arrow in the better direction."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return self.label + (f" ({self.unit})" if self.unit else "") + arrow


_DECLARED: dict[str, Metric] = {}


def register(*metrics: Metric) -> None:
    """Declares metrics, in the order of panels, columns and printed lines.

    Raises:
        ValueError: a different metric of the same name is declared.
    """
    for metric in metrics:
        if _DECLARED.setdefault(metric.name, metric) != metric:
            raise ValueError(f"two metrics are named {metric.name!r}")


def metric_of(name: str, more: Mapping[str, Metric] | None = None) -> Metric:
    """Returns the metric of a name, declared here or in ``more``; else an undeclared one, which is shown by its
    name."""
    return _DECLARED.get(name) or (more or {}).get(name) or Metric(name)


def declared() -> list[Metric]:
    """Returns all metrics, in the order of their declaration."""
    return list(_DECLARED.values())


def of_records(records: Iterable[Mapping[str, object]], more: Mapping[str, Metric] | None = None) -> list[Metric]:
    """Returns the training metrics with numbers in the records: declared ones in their order, then others by
    appearance."""
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    declared_first = dict.fromkeys([*(name for name in _DECLARED if name in names), *names])
    metrics = (metric_of(name, more) for name in declared_first)
    return [metric for metric in metrics if metric.figure == TRAINING]


def to_json(metrics: Iterable[Metric]) -> dict[str, dict[str, object]]:
    """Declarations as JSON, by name, without the name."""
    return {metric.name: {key: value for key, value in asdict(metric).items() if key != "name"} for metric in metrics}


def from_json(written: object) -> dict[str, Metric]:
    """Declarations that `to_json` wrote, by name; without those that this version cannot read."""
    metrics = {}
    for name, fields in written.items() if isinstance(written, dict) else ():
        try:
            metrics[name] = Metric(name, **fields)
        except TypeError:
            continue
    return metrics


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
            ("data_seconds", "seconds waited for data", "", "data {:.2g} s"),
            ("data_rank", "rank that waited longest for data", "", ""),
            ("slowest_ratio", "time of the slowest copy of the model", "of the others' median", ""),
            ("slowest_seconds", "seconds a step lost to it", "", ""),
        )
    ),
)
