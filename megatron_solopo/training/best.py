"""The best evaluation of a run so far (--save-best), and when a run no longer improves (--early-stop)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path

from megatron_solopo.atomic import write_text
from megatron_solopo.errors import UserError
from megatron_solopo.metrics import metric_of
from megatron_solopo.training.log import Line

FILE = "best.json"
"""The file of a run folder with the step, the metric and its value of the best evaluation."""


class Best:
    """Reads the lines of evaluations in order. A resumed run reads its earlier lines again.

    Args:
        metric: the one that decides; its declaration says which direction is better.
        patience: evaluations without a better value after which the run stops; None: never.

    Attributes:
        step: the step of the best value; 0: before the first step, None: not evaluated yet.
        value: the best value.
    """

    def __init__(self, metric: str, patience: int | None = None) -> None:
        self.metric, self._patience = metric, patience
        self.step: int | None = None
        self.value = math.nan
        self._without = 0

    def read(self, line: Line) -> bool:
        """Reads the line of an evaluation; returns whether its value is the best so far. Other lines, and lines
        without a finite value of the metric, change nothing."""
        value = line.get(self.metric)
        if line["split"] not in EVALUATIONS or not isinstance(value, int | float):
            return False
        sign = 1 if metric_of(self.metric).higher_is_better else -1
        better = math.isfinite(value) and (self.step is None or sign * value > sign * self.value)
        if better:
            self.step, self.value, self._without = line["step"], float(value), 0
        else:
            self._without += 1
        return better

    def replay(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.read(line)

    @property
    def exhausted(self) -> bool:
        """Whether the last evaluations of the patience brought nothing better."""
        return self._patience is not None and self._without >= self._patience

    def describe(self) -> str:
        return f"{self.metric} {self.value:.4g} of step {self.step}"

    def write(self, folder: Path, stopped: int | None = None) -> None:
        """Writes `FILE`; ``stopped``: the step that --early-stop ended the run after."""
        record = {"step": self.step, "metric": self.metric, "value": self.value, "stopped": stopped}
        write_text(folder / FILE, json.dumps(record) + "\n")


EVALUATIONS = ("valid", "generate")
"""The splits of lines of metrics.jsonl that --save-best reads."""


def check_metric(metric: str, measured: Collection[str]) -> None:
    """Refuses a metric of --save-best that no evaluation measures, or that has no better direction.

    Raises:
        UserError: names the metrics that there are.
    """
    usable = [name for name in measured if metric_of(name).higher_is_better is not None]
    if metric not in usable:
        raise UserError("metric-unknown", f"--save-best {metric}: set one of {', '.join(usable)}")


def stopped_early(folder: Path) -> int | None:
    """Returns the step that --early-stop ended a run after; None where it did not."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return record["stopped"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
