"""Experiments: a recipe whose ``matrix:`` runs its variants over seeds, and keeps a small result of each run.

    base: ../quickstart/demo.yaml          # stages that variants may need
    output: ../../runs/many-responses      # a folder seed-N of each seed
    matrix:
      seeds: [0, 1, 2]
      results: ../../docs/evidence/many-responses   # VARIANT-seed-N.json, report.md and figures
      result: $variant/evaluation.json     # the evaluation that is a run's result
      predictions: true                    # keep each question's scores too, for paired differences (default: false)
      stages:                              # of each variant, which runs those that the result needs
        train: {train: {hf_path: base-hf, train_data: $data, save: $variant/run, save_hf: $variant/hf, ...}}
        evaluate: {evaluate: {model: $model, output: $variant/evaluation.json, ...}}
      variants:
        base: {model: base-hf}
        one: {label: 1 x 1, data: one.jsonl, model: $variant/hf}

A run whose result exists, with the same options, is not repeated: results that are committed serve any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections import Counter
from pathlib import Path
from string import Template
from typing import Any

from megatron_solopo.atomic import write_text
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.results import predictions_path
from megatron_solopo.pipeline import Note, Work, run_stages
from megatron_solopo.recipe import Matrix, Recipe, Stage, holds
from megatron_solopo.variables import filled, filled_stage

LABEL = "label"
"""The variable of a variant that is its name in tables; default: the variant's name."""

TEXTS = ("question", "answers", "prediction")
"""What results leave out of a line of predictions."""

ABSOLUTE = re.compile(r"(@|[^=/\s]+=)?(/.*)", re.DOTALL)
"""An absolute path, also behind @ or LABEL=."""


def run_matrix(recipe: Recipe, matrix: Matrix, dry_run: bool = False) -> int:
    """Runs what has no result yet, seed after seed, and writes the report after each run.

    Returns:
        The exit status of the first run that did not end well, else 0.

    Raises:
        UserError: a mistake in the recipe, before the first run; see `run_of`.
    """
    runs = {
        (seed, variant): run_of(recipe, matrix, seed, variant) for seed in matrix.seeds for variant in matrix.variants
    }
    folder = recipe.path.parent.absolute()
    for (seed, variant), run in runs.items():
        file = _file(matrix, seed, variant)
        stages = identity(run)
        predictions = predictions_path(file)
        if (before := _kept(file)) == stages and (predictions.is_file() or not matrix.predictions):
            print(f"{variant}, seed {seed}: done before ({file})")
            continue
        changed = before is not None and before != stages
        print(f"{variant}, seed {seed}{': other options than its result' if changed else ''}:", flush=True)
        if status := run_stages(run, dry_run):
            return status
        if not dry_run:
            with contextlib.chdir(run.output):
                record = _result(run, folder, matrix, seed, variant) | {"stages": stages}
                if matrix.predictions:
                    write_text(predictions, _without_texts(predictions_path(_result_file(matrix, variant))))
            write_text(file, json.dumps(record, indent=1) + "\n")
            _write_report(recipe, matrix)  # a matrix may take days, or end in an error
    if not dry_run:
        print(f"wrote {_write_report(recipe, matrix)}")
    return 0


def _file(matrix: Matrix, seed: int, variant: str) -> Path:
    return matrix.results / f"{variant}-seed-{seed}.json"


def _write_report(recipe: Recipe, matrix: Matrix) -> Path:
    """Writes the report of all results of the matrix, those of earlier seeds included."""
    from megatron_solopo.evaluation.experiment import write_experiment

    of_labels: dict[str, list[Path]] = {}
    for variant, variables in matrix.variants.items():
        files = matrix.results.glob(f"{variant}-seed-*.json")
        if of_seeds := sorted(files, key=lambda file: int(file.stem.rpartition("-")[2])):
            of_labels.setdefault(str(variables.get(LABEL, variant)), []).extend(of_seeds)
    return write_experiment(matrix.results, recipe.path.stem, of_labels)


def run_of(recipe: Recipe, matrix: Matrix, seed: int, variant: str) -> Recipe:
    """Returns the stages that the result of one variant with one seed needs, as a recipe of its own.

    A stage is needed if an option of a needed stage names an output of it, or a file in one.

    Raises:
        UserError: a mistake of a stage; a needed stage has an unknown variable; no stage writes the result.
    """
    variables: dict[str, object] = {"variant": variant}
    variables |= {name: filled(value, variables)[0] for name, value in matrix.variants[variant].items()}
    of_variant = [
        filled_stage(stage, f"{variant}.{stage.name}", f"the variant '{variant}'", variables) for stage in matrix.stages
    ]
    unknown = {stage.name: problem for stage, problem in of_variant if problem}
    stages = [*recipe.stages, *(stage for stage, _ in of_variant)]
    needed: list[Stage] = []
    wanted = {_result_file(matrix, variant): {""}}
    """Path -> names of the stages that read it; "" is the matrix."""
    for stage in (one.with_seed(seed) for one in reversed(stages)):
        readers = {reader for path, names in wanted.items() if holds(stage.named_outputs, path) for reader in names}
        if not readers:
            continue
        if stage.name in unknown:
            raise UserError("recipe-variable", unknown[stage.name])
        needed = [
            one if one.name not in readers else dataclasses.replace(one, reads=(stage.name, *(one.reads or ())))
            for one in needed
        ]
        needed.insert(0, dataclasses.replace(stage, reads=()))
        for path in stage.paths_read():
            wanted.setdefault(path, set()).update({stage.name, *(readers - {""})})
    if not needed:
        raise UserError("recipe-value", f"{matrix.where}: matrix: result: {matrix.result}: no stage writes it")
    return dataclasses.replace(recipe, output=recipe.output / f"seed-{seed}", stages=needed, matrix=None)


def _result_file(matrix: Matrix, variant: str) -> str:
    return os.path.normpath(Template(matrix.result).safe_substitute(variant=variant))


def identity(run: Recipe) -> dict[str, object]:
    """Returns command and options of each stage, the same on every machine; see `_portable`."""
    folder = run.path.parent.absolute()
    return {stage.name: _portable(Work(stage, "", *stage.checked()).options(), folder) for stage in run.stages}


def _portable(value: Any, folder: Path) -> Any:
    """Returns a value, lists and mappings included, with absolute paths relative to ``folder``, the recipe's."""
    if isinstance(value, list):
        return [_portable(one, folder) for one in value]
    if isinstance(value, dict):
        return {name: _portable(one, folder) for name, one in value.items()}
    path = ABSOLUTE.match(value) if isinstance(value, str) else None
    return f"{path[1] or ''}{os.path.relpath(path[2], folder)}" if path else value


def _without_texts(predictions: Path) -> str:
    """Returns the lines of a predictions file without question, answers and prediction, whose licence may forbid it."""
    records = map(json.loads, predictions.read_text(encoding="utf-8").splitlines())
    kept = ({name: value for name, value in record.items() if name not in TEXTS} for record in records)
    return "".join(json.dumps(record) + "\n" for record in kept)


def _kept(file: Path) -> object:
    """Returns the options that an earlier result has, None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("stages")
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError("not-json", f"{file}: not valid JSON; delete it, and its run is repeated") from None


def _result(run: Recipe, folder: Path, matrix: Matrix, seed: int, variant: str) -> dict[str, Any]:
    """Returns the record of a run, in whose output folder the process is: its evaluation, without this machine's
    paths (``folder`` is the recipe's), and what its training took."""
    text = Path(_result_file(matrix, variant)).read_text(encoding="utf-8").replace(f"{Path.cwd()}{os.sep}", "")
    evaluation = json.loads(text)
    notes = {stage.name: Note.read(Path(".stages") / f"{stage.name}.json") or Note([], "") for stage in run.stages}
    return evaluation | {
        "settings": _portable(evaluation["settings"], folder),
        "variant": variant,
        "seed": seed,
        "training": [
            _training(str(stage.options["save"][0]), notes[stage.name])
            for stage in run.stages
            if stage.command == "train" and stage.name.startswith(f"{variant}.")
        ],
        "seconds": {name: [note.seconds, note.cpu_seconds] for name, note in notes.items()},
        "date": datetime.date.today().isoformat(),
    }


def _training(folder: str, note: Note) -> dict[str, Any]:
    """Returns what a training run took: steps, tokens, operations, seconds by the clock and of its processes; the
    responses of a group; and the last line of its metrics."""
    import torch  # with the modules below, which a dry run need not wait for

    from megatron_solopo.benchmark.flops import flops_of_packs
    from megatron_solopo.config_load import load
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.evaluation.results import read_run
    from megatron_solopo.pack import Side
    from megatron_solopo.training.preflight import check_run_inputs

    config, _ = load(["--config", f"{folder}/config.yaml"])
    inputs, rows = check_run_inputs(config, refuse_machine=False), read_run(folder).train
    schedule, train = inputs.schedule, inputs.data.train
    times = Counter(example for step in range(schedule.steps) for example in schedule.step(step))
    packs = (build_pack([train.groups[one]], [one], config.data.share_prompts) for one in times)
    flops = [flops_of_packs(inputs.hf_config, [pack]).total for pack in packs]
    of_sides = train.segment_counts().amax(1)[[*times]] * torch.tensor([*times.values()])[:, None]
    return {
        "steps": schedule.steps,
        "tokens": sum(row["tokens"] for row in rows),
        "flops": sum(count * of_group for of_group, count in zip(flops, times.values(), strict=True)),
        "step_seconds": round(sum(row["seconds"] for row in rows), 3),
        "seconds": note.seconds,
        "cpu_seconds": note.cpu_seconds,
        "responses": {
            side.name.lower(): round(int(count) / times.total(), 3)
            for side, count in zip(Side, of_sides.sum(0), strict=True)
            if count
        },
        "last": {name: value for name, value in rows[-1].items() if value == value},  # without NaN
    }
