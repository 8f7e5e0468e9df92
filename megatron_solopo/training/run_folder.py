"""Files of a run folder about a start of the run: config.yaml, versions.yaml, overlong.jsonl, metric labels."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_solopo.atomic import write_text
from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.config_unused import unused
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError, system_reason
from megatron_solopo.losses.registry import loss_class
from megatron_solopo.metrics import LABELS, to_json
from megatron_solopo.parallel.topology import world_size

if TYPE_CHECKING:
    from megatron_solopo.training.preflight import RunData


def effective(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the options without those that have no effect in this run, so that --config accepts config.yaml."""
    idle = unused(config)
    return {section: {k: v for k, v in values.items() if k not in idle} for section, values in config.as_dict().items()}


def write_settings(folder: Path, config: Config) -> None:
    """Writes config.yaml, the resolved options for --config, and versions.yaml, the software that ran.

    Raises:
        UserError: a file cannot be written.
    """
    options = _written(config)
    versions: dict[str, object] = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    versions |= {
        "python": platform.python_version(),
        "processes": world_size(),
        "command": sys.argv,
    }
    for name, document in (("config.yaml", options), ("versions.yaml", versions)):
        try:
            write_text(folder / name, yaml.safe_dump(document, sort_keys=False))
        except OSError as error:
            raise _unwritable(folder, name, error) from None


def _written(config: Config) -> dict[str, dict[str, Any]]:
    return {
        section: {k: v for k, v in values.items() if v is not None} for section, values in effective(config).items()
    }


def recorded_budget(folder: Path, config: Config) -> int | None:
    """Returns the --max-tokens-per-rank of the run in ``folder``, if it had as many processes and the same options of
    model and layout; None if it had not, or its files cannot be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        budget, written = settings["training"]["max_tokens_per_rank"], _written(config)
        same = processes_of(folder) == world_size() and all(settings[s] == written[s] for s in ("model", "parallel"))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, UserError):
        return None
    return budget if same and isinstance(budget, int) else None


def processes_of(folder: Path) -> int:
    """Returns the number of processes of a run, from its versions.yaml.

    Raises:
        UserError: the file is missing or unreadable.
    """
    path = folder / "versions.yaml"
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        raise UserError(
            "file-missing", f"{path}: no number of processes in it; set the folder of a training run"
        ) from None


def write_metric_labels(folder: Path, method: MethodConfig) -> None:
    """Writes metric_labels.json, the loss's metrics, for a report that does not load the loss.

    Raises:
        UserError: the file cannot be written.
    """
    measured = loss_class(method.preference_loss).metrics if method.objective == "preference" else ()
    try:
        if measured:
            write_text(folder / LABELS, json.dumps(to_json(measured), ensure_ascii=False) + "\n")
        else:
            (folder / LABELS).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, LABELS, error) from None


def write_overlong(folder: Path, data: RunData) -> None:
    """Writes overlong.jsonl, every example that was dropped or cut for its length; without any there is no file.

    Raises:
        UserError: the file cannot be written.
    """
    reports = {"train": data.train.report} | ({"valid": data.valid.report} if data.valid is not None else {})
    records = [{"split": split} | record for split, report in reports.items() for record in report.overlong()]
    try:
        if records:
            write_jsonl(folder / "overlong.jsonl", records)
        else:
            (folder / "overlong.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, "overlong.jsonl", error) from None


def _unwritable(folder: Path, name: str, error: OSError) -> UserError:
    return UserError("write-failed", f"--save {folder}: {name} cannot be written ({system_reason(error)})")
