"""Logging of a run: a JSON line for each step, TensorBoard, Weights & Biases, and a progress bar."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_solopo import metrics
from megatron_solopo.atomic import write_text
from megatron_solopo.config import OutputConfig
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.terminal import write_line

type Line = Mapping[str, Any]
"""A line of metrics.jsonl: ``step``, ``split`` (train, valid, save or export), and values by name."""

PACE_WINDOW = 50
"""Number of last steps from which the remaining time is estimated, with the evaluations and saves between them."""


class TensorBoard:
    """Logs scalars as ``train/loss`` and so on; steps after ``first_step`` of an earlier start are hidden."""

    def __init__(self, folder: str, first_step: int, interval: int, queue_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(folder, purge_step=first_step + 1, max_queue=queue_size)
        self._interval = interval

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step % self._interval and all(name.startswith("train/") for name in scalars):
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs the scalars to Weights & Biases under the same names, with the training step as axis.

    The run's id is kept in the run folder, so that a resumed run continues the same curves; a step that is repeated
    after a kill is logged again.

    Raises:
        UserError: Weights & Biases cannot start (no login, no network).
    """

    def __init__(self, output: OutputConfig, settings: Mapping[str, Any]) -> None:
        import wandb  # optional

        folder = Path(output.save)
        id_file = folder / "wandb_run_id.txt"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=output.wandb_project,
                name=output.wandb_exp_name or folder.name,
                dir=output.wandb_save_dir or str(folder),
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                config=dict(settings),
            )
        except wandb.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                "wandb-unavailable",
                f"--wandb-project: Weights & Biases cannot start ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline",
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """Writes the log on rank 0; its methods do nothing on other ranks. Before `begin` it prints messages only.

    Args:
        output: options; ``metrics.jsonl`` is in the ``save`` folder.
        steps: total number of steps of the run.
        first_step: the last finished step of a resumed run, or 0.
        active: whether this process writes.
        settings: resolved options by section, for Weights & Biases.
    """

    def __init__(
        self, output: OutputConfig, steps: int, first_step: int, active: bool, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._output, self._settings, self._first_step = output, settings or {}, first_step
        self._active, self._steps, self._interval = active, steps, output.log_interval
        self._bar: tqdm[NoReturn] | None = None
        self._file: FileIO | None = None
        self._loggers: list[TensorBoard | WeightsAndBiases] = []
        self.earlier: list[Line] = []
        """Lines of the file up to ``first_step``."""
        self._pending = b""
        self._ends: deque[float] = deque(maxlen=PACE_WINDOW + 1)
        """Times of the ends of the last training steps, in seconds; before them, that of the first step's start."""

    def begin(self) -> None:
        """Opens loggers and files, from which lines after ``first_step`` are removed. metrics.jsonl comes last, because
        loggers can refuse the run."""
        if not self._active:
            return
        output, first_step = self._output, self._first_step
        folder = Path(output.save)
        folder.mkdir(parents=True, exist_ok=True)
        if output.wandb_project:
            self._loggers.append(WeightsAndBiases(output, self._settings))
        if output.tensorboard_dir:
            self._loggers.append(
                TensorBoard(
                    output.tensorboard_dir, first_step, output.tensorboard_log_interval, output.tensorboard_queue_size
                )
            )
        path = folder / "metrics.jsonl"
        if first_step and path.is_file():
            self.earlier = _keep_until(path, first_step)
        self._file = path.open("ab" if first_step else "wb", buffering=0)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._steps, initial=first_step, unit="step", dynamic_ncols=True)

    def message(self, text: str) -> None:
        """Prints a line on stderr."""
        if self._active:
            tqdm.write(text, file=sys.stderr) if self._bar is not None else write_line(text)

    def step(self, values: Line, warnings: Mapping[str, str] | None = None) -> None:
        """Writes a line of metrics.jsonl and logs its scalars.

        Args:
            values: values by name, with "step" and "split" (train, valid, save or export).
            warnings: texts of this step's warnings, by name.
        """
        if not self._active:
            return
        line = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        self._write(json.dumps(line | ({"warnings": sorted(warnings)} if warnings else {}), allow_nan=False) + "\n")
        number, split = values["step"], values["split"]
        for text in [*([values["skipped"]] if "skipped" in values else []), *(warnings or {}).values()]:
            self.message(f"warning: step {number}: {text}" + ("; skipped" if "skipped" in values else ""))
        scalars = {f"{split}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        for logger in list(self._loggers):
            try:
                logger.write(number, scalars)
            except OSError as error:
                self._loggers.remove(logger)
                self.message(f"warning: {type(logger).__name__} ends at step {number} ({system_reason(error)})")
        if split != "train":
            self.message(f"step {number} {split} " + _summary(values))
            return
        now = time.monotonic()
        if not self._ends:
            self._ends.append(now - values.get("seconds", 0.0))
        self._ends.append(now)
        if self._bar is not None:
            # The bar shows pace and remaining time itself.
            self._bar.set_postfix_str(_summary({**values, "seconds": None}), refresh=False)
            self._bar.update(1)
        elif number % self._interval == 0 or number in (self._first_step + 1, self._steps):
            pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            left = timedelta(seconds=round(pace * (self._steps - number)))
            self.message(f"step {number}/{self._steps} {_summary(values)} left {left}")

    def _write(self, line: str) -> None:
        """Appends to metrics.jsonl. A full disk does not end the run: the rest is tried again with the next line."""
        assert self._file is not None  # `begin` opened it
        full = bool(self._pending)
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not full:
                self.message(
                    f"warning: {self._file.name} cannot be written ({system_reason(error)}); its lines wait for space"
                )

    def close(self) -> None:
        """Ends the progress bar and closes files and loggers."""
        if self._pending:
            self._write("")
        if self._pending and self._file is not None:
            lost = self._pending.count(b"\n")
            self.message(f"warning: the last {lost} lines of {self._file.name} could not be written")
        for output in (self._bar, self._file, *self._loggers):
            try:
                if output is not None:
                    output.close()
            except OSError as error:
                reason = system_reason(error)
                self.message(f"warning: the end of {type(output).__name__} could not be written ({reason})")


def _is_not_finite(value: object) -> bool:
    """Whether a value is NaN or infinity, which JSON does not have; the file has null instead."""
    return isinstance(value, float) and not math.isfinite(value)


def _summary(values: Line) -> str:
    """Returns the values of a printed line, with their units."""
    declared = sorted(metrics.declared(), key=lambda metric: metric.figure is None)  # the cost of a step comes last
    shown = {"skipped": "skipped"} | {metric.name: metric.line for metric in declared if metric.line}
    if values.get("clipped"):
        shown["grad_norm"] += " (clipped to {clip_grad:g})"
    if values["split"] != "train":
        shown["seconds"] = shown["seconds"].removesuffix("/step")
    if values["split"] == "valid":
        shown["groups"] = f"({{:,}} {metrics.metric_of('groups').label})"
    elif values["split"] != "train":
        memory = metrics.metric_of("memory_gib")
        shown["memory_gib"] = f"{memory.label} {{:.2f}} {memory.unit}"
    return " ".join(text.format(values[name], **values) for name, text in shown.items() if values.get(name) is not None)


def _keep_until(path: Path, step: int) -> list[Line]:
    """Removes the lines of steps after a killed run's last checkpoint; these steps are repeated.

    Returns:
        The lines that are kept, with NaN for null, as they were passed to `RunLog.step`.
    """
    kept, earlier = [], []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(text)
                earlier.append({name: math.nan if value is None else value for name, value in line.items()})
        except (json.JSONDecodeError, KeyError):
            continue  # an incomplete line, cut by the kill
    write_text(path, "".join(text + "\n" for text in kept))
    return earlier
