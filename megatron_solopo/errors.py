"""The exception for mistakes that a user can correct, reasons of system errors, and checks of optional packages."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self


class UserError(Exception):
    """A mistake that a user can correct: one line with the place (file:line, flag or rank), what is wrong, and what
    to change.

    Commands print it as ``error: <message> [<code>]`` and exit with status 2; a traceback would only hide the line that
    matters.

    Attributes:
        code: the kind of mistake, in lower-case words with hyphens (``option-unknown``). Codes stay the same from
            version to version where messages do not; docs/errors.md lists them.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message

    def at(self, where: str) -> Self:
        """Returns the same mistake with the place in front: ``where: message``."""
        return type(self)(self.code, f"{where}: {self.message}")


class LostProcess(UserError):
    """Another process of the run is gone. That process reports the reason, and a restart may succeed."""


class Diverged(UserError):
    """Loss, gradient or weights are no longer finite; every process raises it at the same step."""


OF_TRANSFORMERS = {
    "model-name-or-path": "hf-path",
    "dataset-name": "train-data",
    "output-dir": "save",
    "learning-rate": "lr",
    "lr-scheduler-type": "lr-decay-style",
    "warmup-ratio": "lr-warmup-fraction",
    "warmup-steps": "lr-warmup-fraction",
    "max-grad-norm": "clip-grad",
    "num-train-epochs": "train-epochs",
    "max-steps": "train-iters",
    "per-device-train-batch-size": "micro-batch-size",
    "gradient-accumulation-steps": "global-batch-size",
    "gradient-checkpointing": "recompute-granularity",
    "max-length": "seq-length",
    "loss-type": "preference-loss",
    "lora-r": "lora-rank",
    "lora-target-modules": "lora-modules",
    "logging-steps": "log-interval",
    "eval-steps": "eval-interval",
    "save-steps": "save-interval",
    "save-total-limit": "keep-last",
    "resume-from-checkpoint": "load",
}
"""Options of transformers' TrainingArguments and TRL's scripts whose names are far from those here, which are
Megatron-LM's."""


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean --seq-length?"``, or "" where no name is near. Leading dashes, which all options share, make no
    two of them alike; names of files have underscores."""
    by_word = {_word(one): one for one in names}
    word = _word(name)
    same = OF_TRANSFORMERS.get(word)
    close = [same] if same in by_word else difflib.get_close_matches(word, list(by_word), n=1, cutoff=0.6)
    return f"; did you mean {by_word[close[0]]}?" if close else ""


def _word(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def require(what: str, package: str, extra: str, instead: str = "") -> None:
    """Checks that an optional package is installed.

    Args:
        what: the option, command or file that needs it.
        extra: the extra of pyproject.toml that installs it.
        instead: another remedy, which follows the command.

    Raises:
        UserError: it is not installed; the message names the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            "package-missing",
            f"{what}: the package {package} is not installed; pip install 'megatron-solopo[{extra}]'{instead}",
        )


@contextmanager
def files_explained() -> Iterator[None]:
    """Turns an OSError that no other handler explains into one line.

    Raises:
        UserError: naming the file and the system's message.
    """
    try:
        yield
    except OSError as error:
        if not error.filename:  # then a path alone would not explain it
            raise
        raise UserError("file-system", f"{error.filename}: {system_reason(error)}") from error


def system_reason(error: BaseException) -> str:
    """Returns the system's reason if there is one ("No space left on device"), else the error's last line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    system = re.search(r"\[Errno \d+\] ([^:'\"\n]+)|I/O error: ([^(\n]+)", str(error))
    if system:
        return (system[1] or system[2]).strip()
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
