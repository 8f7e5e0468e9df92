"""What evaluations and training runs leave on disk, read back, and averaged over seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from megatron_solopo import json_text
from megatron_solopo.data.files.records import Record, read_jsonl, read_text
from megatron_solopo.data.validation import Number, Whole, missing, validated
from megatron_solopo.errors import UserError
from megatron_solopo.metrics import LABELS, Metric, from_json

if TYPE_CHECKING:
    import pandas

NOT_SHARED = ("seed", "context_documents", "context_tokens", "left_out", "gold_log_prob")
"""Settings in which the evaluations of one label may differ: seed, lengths, what these left out, a further score."""


def length_label(length: int, unit: str, task: str = "") -> str:
    """Returns the key of a context length in an evaluation file: ``8 documents``, ``ruler_vt: 4096 tokens``."""
    return f"{task}: {length} {unit}" if task else f"{length} {unit}"


def predictions_path(output: str | Path) -> Path:
    """Returns where the predictions of a results file are: ``results.json`` -> ``results.predictions.jsonl``."""
    path = Path(output)
    return path.parent / f"{path.stem}.predictions.jsonl"


@dataclass(frozen=True)
class LengthResult:
    """Scores at one context length.

    Attributes:
        length, unit: the length asked for and what it counts (``documents``, ``tokens``; of multiple-choice questions
            ``choices``).
        means, intervals: by metric, those that the file has; intervals are 95 % over questions.
        count: number of questions.
        mean_prompt_tokens: tokens of a whole prompt, on average.
        methods: by metric, how its interval was computed (`INTERVAL_METHODS`); {} in older files.
        cut: answers that did not end within --max-new-tokens; None in older files.
        task: of --tasks; "" of --data.
        depths: by metric, the mean at each depth of --depths; {} without that option.
    """

    length: int
    unit: str
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    count: int
    mean_prompt_tokens: float
    methods: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    task: str = ""
    depths: dict[str, dict[float, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its key in an evaluation file."""
        return length_label(self.length, self.unit, self.task)

    def record(self) -> Record:
        """Returns what an evaluation file holds of it; `read_evaluation` reads it."""
        return {
            **self.means,
            "count": self.count,
            "cut": self.cut,
            "mean_prompt_tokens": self.mean_prompt_tokens,
            "interval": {name: list(interval) for name, interval in self.intervals.items()},
            "interval_method": self.methods,
            **({"depths": self.depths} if self.depths else {}),
        }


@dataclass(frozen=True)
class Evaluation:
    """One evaluation file."""

    label: str
    path: Path
    model: str
    data: str
    results: tuple[LengthResult, ...]
    settings: Record

    @property
    def shared(self) -> Record:
        """The settings that averaged evaluations share, unless LABEL= declares them as seeds."""
        settings = {name: value for name, value in self.settings.items() if name not in NOT_SHARED}
        data = [Path(name).resolve() for name in self.data.split(", ")]
        return {"model": Path(self.model).resolve(), "data": data, **settings}


Row = dict[str, Any]
"""A line of metrics.jsonl: numbers by name, NaN for what was not finite; ``split``, and where there is one ``skipped``,
are texts."""


@dataclass(frozen=True)
class Run:
    """One run folder: its metrics by step; a step written twice (after a resume) counts once, the last one.

    What is null in the file was not finite, and is NaN here.

    Attributes:
        saves: the time and memory of checkpoints and exports; () in older runs.
        metrics: what its loss declared of what it measures, by name.
    """

    label: str
    folder: Path
    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    saves: tuple[Row, ...] = ()
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return metrics_file(self.folder)

    @property
    def shared(self) -> Record:
        """The settings that averaged runs share, unless LABEL= declares them as seeds."""
        return {"folder": self.folder.resolve()}


class NoSteps(UserError):
    """A run folder whose metrics hold no step yet."""


@dataclass(frozen=True)
class Point:
    """A mean over seeds with its spread: lowest to highest seed, or the 95 % interval of a single one."""

    x: float
    mean: float
    low: float
    high: float
    seeds: int


def labelled(argument: str, fallback: str) -> tuple[str, Path]:
    """``LABEL=PATH`` or ``PATH`` -> (label, path); a path that exists as written is never split."""
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():
        if not label or not path:
            raise UserError("option-value", f"{argument}: write LABEL=PATH, or PATH alone")
        return label, Path(path)
    return fallback, Path(argument)


def folder_names(folders: Sequence[str | Path]) -> list[str]:
    """Returns the shortest path ends that distinguish the folders: ``runs/a/hf``, ``runs/b/hf`` -> ``a/hf``,
    ``b/hf``."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = []
    for path in parts:
        depth = 1
        while depth < len(path) and sum(other[-depth:] == path[-depth:] for other in set(parts)) > 1:
            depth += 1
        names.append("/".join(path[-depth:]))
    return names


def read_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """Reads several evaluations, see `read_evaluation`; without LABEL, differing models get differing labels.

    Raises:
        UserError: as `read_evaluation`, or evaluations would be averaged that are no seeds of one thing.
    """
    evaluations = [read_evaluation(argument) for argument in arguments]
    return _with_distinct_labels(arguments, evaluations, [one.model for one in evaluations])


def read_runs(arguments: Sequence[str], required: bool = True) -> list[Run]:
    """Reads several runs, see `read_run`; without LABEL, differing folders get differing labels.

    A run without a step is left out with a warning.

    Raises:
        NoSteps: no run has a step, and ``required`` is set.
        UserError: as `read_run`, or the name of one folder is the LABEL of another.
    """
    read, runs, empty = [], [], []
    for argument in arguments:
        try:
            runs.append(read_run(argument))
            read.append(argument)
        except NoSteps as error:
            empty.append(error)
    if empty and not runs and required:
        raise empty[0]
    for error in empty:
        print(f"warning: {error}; this run is left out")
    return _with_distinct_labels(read, runs, [run.folder for run in runs])


def _with_distinct_labels[Item: (Evaluation, Run)](
    arguments: Sequence[str], items: Sequence[Item], folders: Sequence[str | Path]
) -> list[Item]:
    """Returns the items; an argument without LABEL gets the name of its folder as label."""
    unnamed = [index for index, argument in enumerate(arguments) if not labelled(argument, "")[0]]
    names = dict(zip(unnamed, folder_names([folders[index] for index in unnamed]), strict=True))
    items = [replace(item, label=names.get(index, item.label)) for index, item in enumerate(items)]
    for one in (items[index] for index in unnamed):
        for other in items:
            keys = dict.fromkeys([*one.shared, *other.shared])
            differing = [key for key in keys if one.shared.get(key) != other.shared.get(key)]
            if other.label == one.label and differing:
                raise UserError(
                    "seeds-differ",
                    f"{one.path} and {other.path} would be averaged as seeds of '{one.label}', but differ in "
                    f"{', '.join(differing)}; write each as LABEL=PATH, or write a report of each",
                )
    return items


def labelled_json(option: str, argument: str, what: str) -> tuple[str, Path, Any]:
    """Reads ``PATH`` or ``LABEL=PATH`` -> (label or "", path, content).

    Raises:
        UserError: the file is missing or not JSON; ``what`` says which one to set.
    """
    label, path = labelled(argument, "")
    if not path.is_file():
        raise UserError("file-missing", f"{option} {path}: no such file; set a {what}")
    try:
        return label, path, json.loads(read_text(option, path))
    except json.JSONDecodeError as error:
        raise UserError(
            "not-json",
            f"{option} {path}: not valid JSON ({json_text.fault(error)} at line {error.lineno}); set a {what}",
        ) from None


def read_evaluation(argument: str) -> Evaluation:
    """Reads an evaluation's JSON file, ``PATH`` or ``LABEL=PATH``; LABEL defaults to the model folder's name.

    Raises:
        UserError: the file is missing or is not an evaluation.
    """
    label, path, record = labelled_json("--evaluations", argument, "results file written by evaluate")
    if not isinstance(record, dict):
        raise UserError("field-type", f"{path}: must be a JSON object; set a results file written by evaluate")
    file = validated(_FILE, record, str(path))
    if not file.metrics:
        raise UserError("results-empty", f"{path}: 'metrics' holds no context length")
    results = [_at_length(key, values, f"{path}: metrics['{key}']") for key, values in file.metrics.items()]
    return Evaluation(
        label or folder_names([file.model])[0], path, file.model, file.data, tuple(results), dict(file.settings)
    )


@dataclass(frozen=True)
class _File:
    metrics: dict[str, Record]
    model: str
    data: str
    settings: Record = field(default_factory=dict)


@dataclass(frozen=True)
class _AtLength:
    interval: dict[str, tuple[Number, Number]]
    count: Whole
    mean_prompt_tokens: Number
    interval_method: dict[str, str] = field(default_factory=dict)
    cut: Whole | None = None
    depths: dict[str, dict[str, Number]] = field(default_factory=dict)


_FILE, _AT_LENGTH, _NUMBERS = TypeAdapter(_File), TypeAdapter(_AtLength), TypeAdapter(dict[str, Number])


def _at_length(key: str, values: dict[str, object], where: str) -> LengthResult:
    match = re.fullmatch(r"(?:(\S+): )?(\d+) (\w+)", key)
    if not match:
        raise UserError("field-value", f"{where}: a context length is written like '8 documents' or '4096 tokens'")
    read = validated(_AT_LENGTH, values, where)
    intervals = dict(read.interval)
    if "sub_em_plain" not in values and "sub_em" in intervals:  # an older file, whose sub-EM is the plain one
        values, intervals["sub_em_plain"] = values | {"sub_em_plain": values.get("sub_em")}, intervals["sub_em"]
    if not intervals:
        raise UserError(
            "results-empty", f"{where}: holds no score with an interval; set a results file written by evaluate"
        )
    means = validated(_NUMBERS, {name: values.get(name) for name in intervals}, where)
    if absent := intervals.keys() - means.keys():
        raise UserError("field-missing", missing(values, min(absent), where))
    return LengthResult(
        int(match[2]),
        match[3],
        means,
        intervals,
        read.count,
        read.mean_prompt_tokens,
        read.interval_method,
        read.cut,
        match[1] or "",
        {metric: {float(depth): mean for depth, mean in of.items()} for metric, of in read.depths.items()},
    )


@dataclass(frozen=True)
class _Line:
    step: Whole
    split: str = "train"


_LINE = TypeAdapter(_Line)


def metrics_file(folder: Path) -> Path:
    """Returns the metrics file of a run folder."""
    return folder / "metrics.jsonl"


def read_run(argument: str) -> Run:
    """Reads the metrics of a run folder, ``DIR`` or ``LABEL=DIR``; the label defaults to the folder's name.

    A last line that a killed run left unfinished is skipped with a note.

    Raises:
        NoSteps: the run has not done any.
        UserError: no metrics in the folder.
    """
    label, folder = labelled(argument, "")
    path = metrics_file(folder)
    if not path.is_file():
        raise UserError("file-missing", f"{path}: no such file; set the folder of a training run")
    by_split: dict[str, dict[int, Row]] = {split: {} for split in ("train", "valid", "save", "export")}
    written = path.read_bytes()
    lines = sum(1 for line in written.split(b"\n") if line.strip())
    read = 0
    try:
        for where, record in read_jsonl(path):
            read += 1
            line = validated(_LINE, record, where)
            row = {name: math.nan if value is None else value for name, value in record.items()}
            by_split.setdefault(line.split, {})[line.step] = row
    except UserError:
        unfinished = read == lines - 1 and not written.endswith(b"\n")
        if not unfinished:
            raise
        print(f"note: {path}: the last line is unfinished and was skipped")
    train, valid, save, export, *_ = (tuple(steps[step] for step in sorted(steps)) for steps in by_split.values())
    if not train and not valid:
        raise NoSteps("run-without-steps", f"{path}: no steps in it yet; wait for the first step of the run")
    return Run(
        label or folder.resolve().name,
        folder,
        train,
        valid,
        save + export,
        _declared(folder),
    )


def _declared(folder: Path) -> dict[str, Metric]:
    try:
        return from_json(json.loads((folder / LABELS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def labels_of(*groups: Iterable[Evaluation | Run]) -> list[str]:
    """Returns every label once, in the order of the arguments."""
    return list(dict.fromkeys(item.label for group in groups for item in group))


def accuracy_by_length(
    evaluations: Iterable[Evaluation], label: str, unit: str, metric: str, task: str = ""
) -> list[Point]:
    """Returns the scores of one label by context length, shortest first, averaged over its evaluations."""
    import pandas  # of the extra "report"

    results = [one for evaluation in evaluations if evaluation.label == label for one in evaluation.results]
    results = [one for one in results if (one.task, one.unit) == (task, unit) and metric in one.means]
    frame = pandas.DataFrame({"x": [one.length for one in results], "value": [one.means[metric] for one in results]})
    points = _points(frame)
    interval: dict[float, tuple[float, float]] = {one.length: one.intervals[metric] for one in results}
    return [
        replace(point, low=interval[point.x][0], high=interval[point.x][1]) if point.seeds == 1 else point
        for point in points
    ]


def curve(runs: Iterable[Run], label: str, metric: str, split: str = "train") -> list[Point]:
    """Returns a metric of one label by step, averaged over its runs at the steps that all of them have."""
    import pandas  # of the extra "report"

    rows = [
        (index, record["step"], record[metric])
        for index, run in enumerate(runs)
        if run.label == label
        for record in getattr(run, split)
        if finite(record.get(metric))
    ]
    frame = pandas.DataFrame(rows, columns=["run", "x", "value"])
    return [point for point in _points(frame) if point.seeds == frame["run"].nunique()]


def _points(frame: pandas.DataFrame) -> list[Point]:
    """Returns the mean, the lowest and the highest ``value`` of a DataFrame for each ``x``, ascending."""
    spread = frame.groupby("x")["value"].agg(["mean", "min", "max", "count"])
    return [
        Point(x, float(mean), float(low), float(high), int(count)) for x, mean, low, high, count in spread.itertuples()
    ]


def finite(value: object) -> bool:
    """Whether a value of metrics.jsonl is a number that can be drawn and averaged."""
    return isinstance(value, (int, float)) and math.isfinite(value)
