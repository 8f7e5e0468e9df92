"""Reads the YAML file of a recipe; see `recipe.py`."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_solopo.errors import UserError, nearest
from megatron_solopo.recipe import ASKING, COMMANDS, SCRIPT, SEVERAL, Matrix, Recipe, Stage
from megatron_solopo.rounds import Rounds
from megatron_solopo.serving import Serving
from megatron_solopo.variables import filled
from megatron_solopo.yaml_options import Entry, OptionFile

TOP = ("base", "output", "environment", "stages", "matrix", "rounds", "serving")
OF_ROUNDS = ("count", "model", "result", "stages")
OF_SERVING = ("url", "command", "ready", "reload", "timeout")
OF_MATRIX = ("seeds", "results", "result", "stages", "variants")
PREDICTIONS = "predictions"


def read_recipe(
    path: str | Path, output: str | None = None, seed: int | None = None, rounds: int | None = None
) -> Recipe:
    """Reads a recipe; the stages of its rounds are behind its others.

    Args:
        output: replaces the recipe's; relative to the current folder.
        seed: replaces every ``seed`` of a stage.
        rounds: replaces the number of rounds.

    Raises:
        UserError: naming ``file:line`` and the nearest valid name. `Stage.checked` checks the options.
    """
    recipe = _read(Path(path), frozenset())
    if output is not None:
        recipe = dataclasses.replace(recipe, output=Path(output).absolute())
    if recipe.output == Path():
        raise UserError("recipe-incomplete", f"{path}: output: missing; set it to the folder for the stages' outputs")
    if not recipe.stages and recipe.rounds is None:
        raise UserError("recipe-incomplete", f"{path}: has no stages")
    if recipe.rounds is None and rounds is not None:
        raise UserError("option-unused", f"--rounds {rounds} would have no effect: {path} has no rounds:")
    if recipe.rounds is not None and recipe.matrix is not None:
        raise UserError(
            "option-conflict",
            f"{recipe.rounds.where}: rounds: {path} has a matrix too, whose variants have no rounds; remove one",
        )
    stages, matrix = recipe.stages, recipe.matrix
    if seed is not None:
        stages = [stage.with_seed(seed) for stage in stages]
    if recipe.rounds is not None:
        count = recipe.rounds.count if rounds is None else rounds
        stages = [*stages, *dataclasses.replace(recipe.rounds, count=count).unrolled(seed)]
    if matrix is not None:
        seeds = matrix.seeds if seed is None else [seed]
        of_variants = [_asking(stage, recipe.serving) for stage in matrix.stages]
        matrix = dataclasses.replace(matrix, seeds=seeds, stages=of_variants)
    stages = [_asking(stage, recipe.serving) for stage in stages]
    return dataclasses.replace(recipe, stages=stages, matrix=matrix)


def _asking(stage: Stage, serving: Serving | None) -> Stage:
    """Returns a stage with the server's URL, where it asks it and does not set one."""
    if stage.served is None:
        return stage
    where = f"{stage.where}: stage '{stage.name}': served"
    if serving is None:
        raise UserError("recipe-incomplete", f"{where}: the recipe has no serving: with the server's URL; add it")
    if stage.command == SCRIPT:
        return stage
    return dataclasses.replace(stage, options={"server": (serving.url, where)} | stage.options)


def _read(path: Path, above: frozenset[Path]) -> Recipe:
    if path.resolve() in above:
        raise UserError("recipe-base-loop", f"{path}: is a base of itself")
    with OptionFile(path, "") as file:
        lines = _known(file.entries(file.root, f"{path}: must hold output: and stages:"), TOP, "a recipe")
        recipe = Recipe(path, Path(), {}, [])
        if "base" in lines:
            base = Path(os.path.normpath(path.parent / _text(file, lines["base"])))
            recipe = _read(base, above | {path.resolve()})
        output, environment = recipe.output, dict(recipe.environment)
        if "output" in lines:
            output = Path(os.path.normpath(path.parent.absolute() / _text(file, lines["output"])))
        for line in _mapping(file, lines.get("environment")):
            environment[line.name] = _text(file, line)
        stages = {stage.name: stage for stage in recipe.stages}
        for line in _mapping(file, lines.get("stages")):
            stages[line.name] = _stage(file, line, stages.get(line.name))
        matrix = _matrix(file, lines["matrix"], recipe.matrix) if "matrix" in lines else recipe.matrix
        rounds = _rounds(file, lines["rounds"], recipe.rounds) if "rounds" in lines else recipe.rounds
        serving = _serving(file, lines["serving"]) if "serving" in lines else recipe.serving
    return Recipe(path, output, environment, list(stages.values()), matrix, rounds, serving)


def _known(lines: Iterable[Entry], names: tuple[str, ...], what: str) -> dict[str, Entry]:
    """Returns the lines by name.

    Raises:
        UserError: a name that is not one of ``names``.
    """
    by_name = {line.name: line for line in lines}
    for line in by_name.values():
        if line.name not in names:
            raise UserError(
                "recipe-key",
                f"{line.where}: unknown '{line.name}'{nearest(line.name, names)}; {what} has {_list(names)}",
            )
    return by_name


def _needed(file: OptionFile, line: Entry, names: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, Entry]:
    """Returns the lines of a section by name, checked."""
    parts = _known(_mapping(file, line), names, line.name)
    for name in needed:
        if name not in parts or file.is_empty(parts[name].node):
            raise UserError("recipe-incomplete", f"{line.where}: {line.name}: {name}: missing; see docs/pipeline.md")
    return parts


def _rounds(file: OptionFile, line: Entry, before: Rounds | None) -> Rounds:
    """Returns the rounds; ``before`` are the base's, which they change."""
    parts = _needed(file, line, OF_ROUNDS, () if before else OF_ROUNDS)
    values: dict[str, Any] = {"where": line.where}
    if "count" in parts:
        values["count"] = _count(file, parts["count"])
    if "model" in parts:
        values["model"] = str(_relative_to(file.path.parent.absolute(), _text(file, parts["model"])))
    if "result" in parts:
        values["result"] = str(_relative_to(file.path.parent.absolute(), _text(file, parts["result"])))
    stages = {stage.name: stage for stage in before.stages} if before else {}
    for part in _mapping(file, parts.get("stages")):
        stages[part.name] = _stage(file, part, stages.get(part.name))
    values["stages"] = list(stages.values())
    return dataclasses.replace(before, **values) if before else Rounds(**values)


def _serving(file: OptionFile, line: Entry) -> Serving:
    parts = _needed(file, line, OF_SERVING, ("url",))
    value: object = []
    if "command" in parts and not file.is_empty(parts["command"].node):
        value = file.value(parts["command"].node)
    try:
        words = value if isinstance(value, list) else shlex.split(str(value))
    except ValueError as error:  # an open quote
        raise UserError("recipe-value", f"{parts['command'].where}: command: {error}; correct its quotes") from None
    command = [str(_relative_to(file.path.parent.absolute(), str(word))) for word in words]
    reload = {
        path: None if file.is_empty(node) else file.value(node) for path, _, node in _mapping(file, parts.get("reload"))
    }
    if not command and not reload:
        raise UserError(
            "recipe-incomplete",
            f"{line.where}: serving: command: missing; without it reload: must make the running server load a folder",
        )
    url = _text(file, parts["url"])
    if not re.match(r"https?://[^/]", url):
        raise UserError(
            "recipe-value", f"{parts['url'].where}: url: must be like http://127.0.0.1:8000/v1, found {url!r}"
        )
    for name, part in (("command", command), ("reload", reload)):
        there, none = filled(part, {"model": "a"}), filled(part, {"model": "b"})
        if there[1] or (part and there == none):
            raise UserError(
                "recipe-variable",
                f"{parts[name].where}: {name}: must hold $model, the folder for the server, and no other variable",
            )
    serving = Serving(line.where, url, command, reload=reload)
    if "ready" in parts:
        serving = dataclasses.replace(serving, ready=_text(file, parts["ready"]))
    if "timeout" in parts:
        serving = dataclasses.replace(serving, timeout=_count(file, parts["timeout"]))
    return serving


def _matrix(file: OptionFile, line: Entry, before: Matrix | None) -> Matrix:
    """Returns the matrix; ``before`` is the base's, which it changes. Of its variants those that are named here run."""
    parts = _needed(file, line, (*OF_MATRIX, PREDICTIONS), ("results",) if before else OF_MATRIX)
    folder = file.path.parent.absolute()
    values: dict[str, Any] = {"where": line.where}
    if "seeds" in parts:
        seeds = file.value(parts["seeds"].node)
        if not isinstance(seeds, list) or not all(isinstance(seed, str) and seed.isdigit() for seed in seeds):
            where = parts["seeds"].where
            raise UserError("recipe-value", f"{where}: seeds: must be a list of whole numbers, found {seeds!r}")
        values["seeds"] = [int(seed) for seed in seeds]
    if "results" in parts:
        values["results"] = Path(os.path.normpath(folder / _text(file, parts["results"])))
    if "result" in parts:
        values["result"] = os.path.normpath(_text(file, parts["result"]))
    if PREDICTIONS in parts:
        predictions = file.value(parts[PREDICTIONS].node)
        if not isinstance(predictions, bool):
            where = parts[PREDICTIONS].where
            raise UserError("recipe-value", f"{where}: predictions: must be true or false, found {predictions!r}")
        values["predictions"] = predictions
    if "variants" in parts:
        variants: dict[str, dict[str, object]] = {}
        for variant in _mapping(file, parts["variants"]):
            _check_name(variant, "variant")
            of_base = before.variants.get(variant.name, {}) if before else {}
            variants[variant.name] = of_base | {
                name: _relative_to(folder, file.value(node)) for name, _, node in _mapping(file, variant)
            }
        values["variants"] = variants
    stages = {stage.name: stage for stage in before.stages} if before else {}
    for part in _mapping(file, parts.get("stages")):
        stages[part.name] = _stage(file, part, stages.get(part.name))
    values["stages"] = list(stages.values())
    return dataclasses.replace(before, **values) if before else Matrix(**values)


def _check_name(line: Entry, what: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", line.name):
        raise UserError("stage-name", f"{line.where}: '{line.name}': name a {what} by letters, digits, - and _")


def _stage(file: OptionFile, line: Entry, before: Stage | None) -> Stage:
    """Returns a stage; ``before`` is the base's stage of this name, which it changes."""
    _check_name(line, "stage")
    keys = (*COMMANDS, SCRIPT, "options", "processes", "served")
    parts = {part.name: part for part in _mapping(file, line)}
    for part in parts.values():
        if part.name not in keys:
            raise UserError(
                "recipe-key", f"{part.where}: '{part.name}' is not a command of a stage{nearest(part.name, keys)}"
            )
    commands = [name for name in parts if name in COMMANDS or name == SCRIPT]
    if before is not None and not commands:
        command = before.command
    elif len(commands) == 1:
        command = commands[0]
    else:
        raise UserError(
            "stage-command", f"{line.where}: stage '{line.name}': set one command: {_list((*COMMANDS, SCRIPT))}"
        )
    if before is not None and before.command != command:
        raise UserError(
            "stage-command",
            f"{line.where}: stage '{line.name}': is {before.command} in the base; choose another name",
        )
    stage = before or Stage(line.name, line.where, command)
    if command == SCRIPT and commands:
        script = os.path.normpath(file.path.parent.absolute() / _text(file, parts[SCRIPT]))
        stage = dataclasses.replace(stage, script=Path(script))
    place = "options" if command == SCRIPT else command
    if "options" in parts and place != "options":
        raise UserError("recipe-key", f"{parts['options'].where}: the options of {command} belong under it")
    options = {
        name: (_relative_to(file.path.parent.absolute(), file.value(node)), f"{where}: {name}")
        for name, where, node in _mapping(file, parts.get(place))
    }
    if command == "train" and "auto_resume" not in stage.options | options and "load" not in stage.options | options:
        options["auto_resume"] = (True, f"{line.where}: auto_resume")
    if "processes" in parts:
        if command not in SEVERAL:
            raise UserError(
                "recipe-key",
                f"{parts['processes'].where}: processes: {command} runs in one; of {_list(SEVERAL)} only",
            )
        stage = dataclasses.replace(stage, processes=_count(file, parts["processes"]))
    if "served" in parts:
        if command not in (*ASKING, SCRIPT):
            raise UserError(
                "recipe-key",
                f"{parts['served'].where}: served: {command} asks no server; of {_list((*ASKING, SCRIPT))} only",
            )
        served = _relative_to(file.path.parent.absolute(), _text(file, parts["served"]))
        stage = dataclasses.replace(stage, served=str(served))
    return dataclasses.replace(stage, options=stage.options | options)


def _mapping(file: OptionFile, line: Entry | None) -> list[Entry]:
    return file.entries(line.node, f"{line.where}: {line.name}: must hold 'name: value' lines") if line else []


def _count(file: OptionFile, line: Entry) -> int:
    number = _text(file, line)
    if not number.isdigit() or int(number) < 1:
        raise UserError("recipe-value", f"{line.where}: {line.name}: must be a number of at least 1, found {number!r}")
    return int(number)


def _text(file: OptionFile, line: Entry) -> str:
    value = file.value(line.node)
    if not isinstance(value, str):
        raise UserError("recipe-value", f"{line.where}: {line.name}: must be a text, found {value!r}")
    return value


def _relative_to(folder: Path, value: object) -> object:
    """Returns the value; paths in it that start with ./ or ../ (behind @ or LABEL= too) are relative to ``folder``."""
    if isinstance(value, list):
        return [_relative_to(folder, one) for one in value]
    path = re.match(r"(@|[^=/\s]+=)?(\.\.?/.*)", value, re.DOTALL) if isinstance(value, str) else None
    return f"{path[1] or ''}{os.path.normpath(folder / path[2])}" if path else value


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
