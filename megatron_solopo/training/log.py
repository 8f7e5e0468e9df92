"""What a run tells: one JSON line a step, TensorBoard when asked, a progress bar for a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Writes on the first process only; every method does nothing elsewhere.

    Args:
        folder: the run folder; ``metrics.jsonl`` grows there.
        steps: steps of the whole run.
        first_step: the step a resumed run goes on after.
        active: whether this process writes.
        tensorboard_dir: where to write TensorBoard events, or None.
        log_interval: steps between printed lines where standard error is not a terminal.
    """

    def __init__(
        self, folder: Path, steps: int, first_step: int, active: bool, tensorboard_dir: str | None, log_interval: int
    ) -> None:
        self._active, self._steps, self._interval = active, steps, log_interval
        self._bar = self._file = self._board = None
        self.earlier: list[dict[str, Any]] = []
        """What the file held of steps before ``first_step``."""
        self._pending = b""
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if first_step and path.is_file():
            self.earlier = _keep_until(path, first_step)
        self._file = path.open("ab" if first_step else "wb", buffering=0)
        if tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(tensorboard_dir, purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line for a person."""
        if self._active:
            tqdm.write(text, file=sys.stderr) if self._bar is not None else print(text, file=sys.stderr, flush=True)

    def step(self, values: dict[str, Any], warnings: Mapping[str, str] | None = None) -> None:
        """A training or evaluation step; ``values`` holds "step" and "split".

        Args:
            warnings: name -> text of what this step warns about.
        """
        if not self._active:
            return
        self._write(json.dumps(values | ({"warnings": sorted(warnings)} if warnings else {})) + "\n")
        number, split = values["step"], values["split"]
        for text in [*([values["skipped"]] if "skipped" in values else []), *(warnings or {}).values()]:
            self.say(f"warning: step {number}: {text}" + ("; skipped" if "skipped" in values else ""))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{split}/{name}", value, number)
        if split == "valid":
            self.say(f"step {number} valid " + _summary(values))
        elif self._bar is not None:
            self._bar.set_postfix_str(_summary(values), refresh=False)
            self._bar.update(1)
        elif number % self._interval == 0 or number == self._steps:
            self.say(f"step {number}/{self._steps} " + _summary(values))

    def _write(self, line: str) -> None:
        """A full disk does not end the run: what did not fit is tried again with the next line."""
        full = bool(self._pending)
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not full:
                self.say(f"warning: {self._file.name} cannot be written ({error.strerror}); its lines wait for space")

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._pending:
            self._write("")
        if self._pending:
            lost = self._pending.count(b"\n")
            self.say(f"warning: the last {lost} lines of {self._file.name} could not be written")
        for thing in (self._bar, self._file, self._board):
            if thing is not None:
                thing.close()


def _summary(values: dict[str, Any]) -> str:
    shown = {
        "loss": "loss",
        "accuracy": "acc",
        "margin": "margin",
        "alignment_loss": "align",
        "grad_norm": "grad",
        "tokens_per_second": "tok/s",
    }
    return " ".join(f"{short} {values[name]:.4g}" for name, short in shown.items() if values.get(name) is not None)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Takes out lines of steps that a killed run did after its last checkpoint; they are done again. Returns the rest."""
    kept, earlier = [], []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(text)
                earlier.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # half a line, cut by the kill
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    aside.replace(path)
    return earlier
