"""Training and evaluation from Python: what ``solopo train`` and ``solopo evaluate`` do, with results as values.

    from megatron_solopo import Config, evaluate, train

    result = train(Config.load("run.yaml", overrides=["--lr=3e-6"]))
    scores = evaluate("runs/solo-hf", "questions.jsonl", context_documents=[8, 64])

Options are those of the commands, from the same table. A mistake of the caller is a `UserError` of one line.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo.cli import quiet
from megatron_solopo.config import SECTIONS, Config, flag
from megatron_solopo.config_load import resolve
from megatron_solopo.conversion.manifest import checkpoint_folder, latest_iteration, read_manifest
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError, files_explained, system_reason
from megatron_solopo.evaluation import evaluate as evaluation
from megatron_solopo.parallel.platform import choose, first_error
from megatron_solopo.training.best import stopped_early
from megatron_solopo.training.run import started
from megatron_solopo.yaml_options import as_options


@dataclass(frozen=True)
class TrainResult:
    """What a run left, the same on every process.

    Attributes:
        save: the run folder.
        step: steps that are done and saved.
        finished: whether they are all, or --early-stop ended the run; False where a signal or
            --exit-duration-in-mins stopped it.
        checkpoint: the folder of the last complete checkpoint, which a later run resumes; None where there is none.
        hf_folder: the trained model in Hugging Face format, where --save-hf asked for it and the run is finished.
        metrics: the last step's, by their names in metrics.jsonl.
        valid_metrics: the last evaluation's on --valid-data; empty without one.
    """

    save: Path
    step: int
    finished: bool
    checkpoint: Path | None
    hf_folder: Path | None
    metrics: dict[str, Any]
    valid_metrics: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A model's answers, scored.

    Attributes:
        metrics: by context length (``"8 documents"``): ``sub_em``, ``em``, ``f1`` (means), ``interval``, ``count``, ...
        predictions: each answer to each question at each length, with its scores.
        settings: the options and versions of the evaluation.
    """

    metrics: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    settings: dict[str, Any]


def train(config: Config) -> TrainResult:
    """Trains as ``solopo train`` does; in this process alone, or under torchrun in all of them.

    Collective under torchrun. It starts torch.distributed and ends it, so one process may train several times, one
    run after the other. ``config`` is not changed.

    Raises:
        UserError: a mistake that is detected before the first step, a loss that is not finite, work that could not be
            saved, or torch.distributed is started already.
        LostProcess: another process of the run is gone.
    """
    if dist.is_initialized():
        raise UserError(
            "distributed-started",
            "train: torch.distributed is started already; end it first, with destroy_process_group()",
        )
    config = dataclasses.replace(config, **{name: copy.deepcopy(getattr(config, name)) for name in SECTIONS})
    with _as_library():
        resolve(config)
        _refuse_another_platform(choose(config.parallel.device))
        with started(config) as process:
            from megatron_solopo.training import trainer  # megatron-core comes behind the platform, see training.run
            from megatron_solopo.training.reference import shared

            _write_groups(config)
            trainer.train(process, config)
            return shared(lambda: _result(config))


def evaluate(
    model: str | Path,
    questions: str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]] | None = None,
    *,
    context_documents: Sequence[int] | None = None,
    context_tokens: Sequence[int] | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Measures the accuracy of a Hugging Face model at several context lengths, as ``solopo evaluate`` does.

    It computes in this process alone: under torchrun, call it on one of them.

    Args:
        questions: files, or records as they hold them (MuSiQue's, or those of ``source``); None where ``tasks`` names
            tasks of benchmarks, as ``tasks=["ruler_vt", "niah_plus_single=dev-v2.0.json"]``.
        context_documents, context_tokens: the lengths; one of the two.
        output: file for the results, with the predictions beside it; answers that it holds of an unfinished call are
            not generated again. Default: no file stays.
        options: further ones of ``solopo evaluate --help``, with underscores: ``max_new_tokens=64, limit=100``.

    Raises:
        UserError: an option is unknown or cannot be, a file is missing or wrong, or no question can be asked.
    """
    with _as_library(), tempfile.TemporaryDirectory() as folder:
        files = [questions] if isinstance(questions, str | os.PathLike) else list(questions or [])
        if records := [record for record in files if isinstance(record, Mapping)]:
            files = [Path(folder) / "questions.jsonl"]
            write_jsonl(files[0], records)
        lengths = {"context_documents": context_documents, "context_tokens": context_tokens}
        named = {
            "model": model,
            **({"data": files} if files else {}),
            "output": output or Path(folder) / "results.json",
            **{name: ",".join(map(str, sizes)) for name, sizes in lengths.items() if sizes is not None},
            **options,
        }
        parser = evaluation.build_parser()
        metrics, settings, predictions = evaluation.evaluate(
            parser.parse_args(parser.words(as_options(named, "evaluate")))
        )
    return Evaluation(metrics, predictions, settings)


@contextmanager
def _as_library() -> Iterator[None]:
    """Within it the warnings that a command silences are silent, and files that cannot be read are a `UserError`."""
    with warnings.catch_warnings(), files_explained():
        quiet()
        yield


_platforms: set[str] = set()
"""The kind of device of this process's runs."""


def _refuse_another_platform(name: str) -> None:
    """megatron-core decides while it is imported what it takes of Transformer Engine, which the CPU platform hides."""
    if before := _platforms - {name}:
        raise UserError(
            "device-changed", f"--device {name}: this process trained on {min(before)} before; start another process"
        )
    _platforms.add(name)


def _write_groups(config: Config) -> None:
    """Writes examples that are in memory where the options name them; collective.

    Raises:
        UserError: the run folder has checkpoints of a run on other examples, or an example cannot be written.
    """
    error: UserError | None = None
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a run folder may be on a separate disk of each node
        for name, records in config.groups.items():
            error = error or _write_examples(Path(config.value(name)), records, flag(name))
    if error := first_error(error):
        raise error


def _write_examples(path: Path, records: Iterable[Any], option: str) -> UserError | None:
    """Writes a file of examples; returns the error that prevents it."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        write_jsonl(fresh, records)
        if path.is_file() and latest_iteration(path.parent) is not None and fresh.read_bytes() != path.read_bytes():
            fresh.unlink()
            return UserError(
                "checkpoint-other-data",
                f"{option}: the run in {path.parent} has other examples; pass the same, or another --save",
            )
        fresh.replace(path)
    except (OSError, UserError) as error:
        return UserError(
            "write-failed", f"--save {path.parent}: {path.name} cannot be written ({system_reason(error)})"
        )
    except (TypeError, ValueError) as error:  # json's, of a value that it has no form for
        return UserError("not-json", f"{option}: an example cannot be written as JSON ({error})")
    return None


def _result(config: Config) -> TrainResult:
    """Returns what the run folder holds; for the first process, at the end of a run."""
    save, step = Path(config.output.save), latest_iteration(config.output.save)
    checkpoint = None if step is None else checkpoint_folder(save, step)
    all_done = checkpoint is not None and read_manifest(checkpoint)["progress"]["steps"] == step
    finished = all_done or (step is not None and stopped_early(save) == step)
    last: dict[str, dict[str, Any]] = {"train": {}, "valid": {}}
    for text in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a full disk cuts a line
            line = json.loads(text)
            last[line["split"]] = line
    return TrainResult(
        save=save,
        step=step or 0,
        finished=finished,
        checkpoint=checkpoint,
        hf_folder=Path(config.output.save_hf) if config.output.save_hf and finished else None,
        metrics=last["train"],
        valid_metrics=last["valid"],
    )
