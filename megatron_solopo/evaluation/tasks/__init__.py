"""Benchmarks of ``solopo evaluate --tasks``, a file of this folder for each family.

A file declares its tasks in ``TASKS``; `tasks` finds them, so a new family needs a file and nothing else. Files
``_*.py`` hold none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.errors import UserError, nearest
from megatron_solopo.evaluation.tasks._task import Setting, Task

__all__ = ["Chosen", "Setting", "Task", "chosen_tasks", "tasks"]


@dataclass(frozen=True)
class Chosen:
    """A task of --tasks with its file; ``file`` is None where it has none."""

    task: Task
    file: str | None


def tasks() -> dict[str, Task]:
    """Returns every task by name, family by family."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    families = [importlib.import_module(f"{__name__}.{name}").TASKS for name in sorted(names)]
    return {task.name: task for family in families for task in family}


def chosen_tasks(arguments: Sequence[str]) -> list[Chosen]:
    """Reads ``NAME`` and ``NAME=FILE``.

    Raises:
        UserError: a task is unknown or named twice, its file is missing, or it has none.
    """
    known, chosen = tasks(), {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if name not in known:
            raise UserError(
                "option-value",
                f"--tasks {argument}: {name!r} is not one of {', '.join(known)}{nearest(name, known)}",
            )
        task = known[name]
        if name in chosen:
            raise UserError("option-value", f"--tasks: {name} is there twice; name each task once")
        if task.file and not file:
            raise UserError("option-missing", f"--tasks {name}: needs a file: write {name}=FILE, {task.file}")
        if equals and not task.file:
            raise UserError("option-unused", f"--tasks {argument}: {name} reads no file; write {name}")
        if file and not Path(file).is_file():
            raise UserError("file-missing", f"--tasks {argument}: no such file; set {task.file}")
        chosen[name] = Chosen(task, file or None)
    return list(chosen.values())
