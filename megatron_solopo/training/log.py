"""What a run tells: one JSON line a step, TensorBoard and Weights & Biases when asked, a progress bar for a person."""

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
"""A line of metrics.jsonl: ``step``, ``split`` (train, valid, or what was saved after the step), and values by name."""

PACE_WINDOW = 50
"""Steps that the remaining time is estimated from, with the evaluations and saves between them."""


class TensorBoard:
    """Scalars as ``train/loss`` and so on; steps after ``first_step`` of an earlier process are hidden."""

    def __init__(self, folder: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(folder, purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same scalars under the same names, with the run's own step as axis.

    The run's id is kept in the run folder, so that a resumed run goes on with the same curves; a step that is done
    again after a kill is logged again.

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
                f"--wandb-project: Weights & Biases cannot start ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """Writes on the first process only; every method does nothing elsewhere. Until `begin` it only says lines.

    Args:
        output: ``metrics.jsonl`` grows in its ``save`` folder.
        steps: steps of the whole run.
        first_step: the step a resumed run goes on after.
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
        self._boards: list[TensorBoard | WeightsAndBiases] = []
        self.earlier: list[Line] = []
        """What the file held of steps before ``first_step``."""
        self._pending = b""
        self._ends: deque[float] = deque(maxlen=PACE_WINDOW + 1)
        """When the last training steps ended, seconds; before them, when the first began."""

    def begin(self) -> None:
        """Opens boards and files, where lines after ``first_step`` are taken out. The metrics are cut last,
        behind the boards, which can refuse the run."""
        if not self._active:
            return
        output, first_step = self._output, self._first_step
        folder = Path(output.save)
        folder.mkdir(parents=True, exist_ok=True)
        if output.wandb_project:
            self._boards.append(WeightsAndBiases(output, self._settings))
        if output.tensorboard_dir:
            self._boards.append(TensorBoard(output.tensorboard_dir, first_step))
        path = folder / "metrics.jsonl"
        if first_step and path.is_file():
            self.earlier = _keep_until(path, first_step)
        self._file = path.open("ab" if first_step else "wb", buffering=0)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line for a person."""
        if self._active:
            tqdm.write(text, file=sys.stderr) if self._bar is not None else write_line(text)

    def step(self, values: Line, warnings: Mapping[str, str] | None = None) -> None:
        """A line of metrics.jsonl; ``values`` holds "step" and "split": train, valid, or what was saved after the step.

        Args:
            warnings: name -> text of what this step warns about.
        """
        if not self._active:
            return
        line = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        self._write(json.dumps(line | ({"warnings": sorted(warnings)} if warnings else {}), allow_nan=False) + "\n")
        number, split = values["step"], values["split"]
        for text in [*([values["skipped"]] if "skipped" in values else []), *(warnings or {}).values()]:
            self.say(f"warning: step {number}: {text}" + ("; skipped" if "skipped" in values else ""))
        scalars = {f"{split}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        for board in list(self._boards):
            try:
                board.write(number, scalars)
            except OSError as error:
                self._boards.remove(board)
                self.say(f"warning: {type(board).__name__} ends at step {number} ({system_reason(error)})")
        if split != "train":
            self.say(f"step {number} {split} " + _summary(values))
            return
        now = time.monotonic()
        if not self._ends:
            self._ends.append(now - values.get("seconds", 0.0))
        self._ends.append(now)
        if self._bar is not None:
            # The bar has its own pace and remaining time.
            self._bar.set_postfix_str(_summary({**values, "seconds": None}), refresh=False)
            self._bar.update(1)
        elif number % self._interval == 0 or number in (self._first_step + 1, self._steps):
            pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            left = timedelta(seconds=round(pace * (self._steps - number)))
            self.say(f"step {number}/{self._steps} {_summary(values)} left {left}")

    def _write(self, line: str) -> None:
        """A full disk does not end the run: what did not fit is tried again with the next line."""
        assert self._file is not None  # `begin` opened it
        full = bool(self._pending)
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not full:
                self.say(
                    f"warning: {self._file.name} cannot be written ({system_reason(error)}); its lines wait for space"
                )

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._pending:
            self._write("")
        if self._pending and self._file is not None:
            lost = self._pending.count(b"\n")
            self.say(f"warning: the last {lost} lines of {self._file.name} could not be written")
        for thing in (self._bar, self._file, *self._boards):
            try:
                if thing is not None:
                    thing.close()
            except OSError as error:
                self.say(f"warning: the end of {type(thing).__name__} could not be written ({system_reason(error)})")


def _is_not_finite(value: Any) -> bool:
    """NaN and infinity are no JSON: the file has null in their place."""
    return isinstance(value, float) and not math.isfinite(value)


def _summary(values: Line) -> str:
    """The values that a person follows, with their units."""
    known = sorted(metrics.declared(), key=lambda metric: metric.figure is None)  # what a step cost comes last
    shown = {"skipped": "skipped"} | {metric.name: metric.line for metric in known if metric.line}
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
    """Takes out lines of steps that a killed run did after its last checkpoint; they are done again.

    Returns:
        The lines that stay, with NaN for null, as they were told to `RunLog.step`.
    """
    kept, earlier = [], []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(text)
                earlier.append({name: math.nan if value is None else value for name, value in line.items()})
        except (json.JSONDecodeError, KeyError):
            continue  # half a line, cut by the kill
    write_text(path, "".join(text + "\n" for text in kept))
    return earlier
