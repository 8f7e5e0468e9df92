"""Recipes of `solopo run`: a YAML file whose stages are commands of the package with their options.

    output: runs/first                # folder of all outputs; relative to this file
    stages:
      contexts:                       # a name; the order is the file's
        prepare-data:
          data: ./questions.jsonl     # ./ and ../ are relative to this file, other paths to `output`
          tokenizer: /models/base
          short_tokens: 1024
          long_tokens: 8192
          output: contexts.jsonl
      solo:
        processes: 2                  # of train and convert-checkpoint
        train: {hf_path: /models/base, train_data: groups.jsonl, train_iters: 100, save: solo, save_hf: solo-hf}
      table:
        script: table.py              # a Python file beside this one, with options as --name value
        options: {runs: [solo]}

``base: FILE`` names another recipe, whose stages this one changes or extends; ``environment`` holds variables;
``matrix`` makes an experiment of it (`matrix.py`).
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.errors import UserError, nearest
from megatron_solopo.yaml_options import Entry, OptionFile, Options

COMMANDS = {
    "prepare-data": "megatron_solopo.data.building.prepare_data",
    "sample-responses": "megatron_solopo.data.sampling.sample_responses",
    "build-pairs": "megatron_solopo.data.pairing.build_pairs",
    "tokenize-data": "megatron_solopo.data.tokenized.tokenize_data",
    "inspect-data": "megatron_solopo.data.inspection.inspect_data",
    "train": "megatron_solopo.config_load",
    "convert-checkpoint": "megatron_solopo.training.convert",
    "evaluate": "megatron_solopo.evaluation.evaluate",
    "report": "megatron_solopo.evaluation.report",
    "ask": "megatron_solopo.evaluation.ask",
}
"""Command of a stage -> the module whose `build_parser` builds its parser."""

SEVERAL = ("train", "convert-checkpoint")
"""Commands that run in several processes."""

SCRIPT = "script"


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name, where: its name, and the ``file:line`` of that.
        command: a key of `COMMANDS`, or `SCRIPT`.
        options: as written, but for paths that start with ./ or ../, which are absolute.
        processes: how many; above 1 torchrun's launcher starts them.
        script: the Python file of a script.
        reads: names of the stages that it depends on; None: all before it.
    """

    name: str
    where: str
    command: str
    options: Options = field(default_factory=dict)
    processes: int = 1
    script: Path | None = None
    reads: tuple[str, ...] | None = None

    def checked(self) -> tuple[list[str], dict[str, object]]:
        """Returns (command line, value of each explicit option), checked by the command's parser.

        Raises:
            UserError: a mistake that the command itself would report, with the line of the recipe.
        """
        if self.script is not None:
            if not self.script.is_file():
                raise UserError("file-missing", f"{self.where}: stage '{self.name}': {self.script}: no such file")
            return _script_words(self.options), {name: value for name, (value, _) in self.options.items()}
        parser: Parser = importlib.import_module(COMMANDS[self.command]).build_parser()
        words = parser.words(self.options)
        try:
            values = vars(parser.parse_args(words))
            if self.command == "train":
                _check_run(words)
        except UserError as error:
            raise UserError(error.code, self._placed(error.message)) from None
        return words, {name: values[name] for name in sorted(parser.explicit)}

    def of_choices(self) -> set[str]:
        """Returns the options whose values are words of a list, and so no files: ``context_mode: solo``."""
        if self.script is not None:
            return set()
        if self.command == "train":  # whose parser checks them itself
            from megatron_solopo.config import OWNER

            return {name for name, owner in OWNER.items() if owner.spec.metadata["choices"]}
        parser: Parser = importlib.import_module(COMMANDS[self.command]).build_parser()
        return {action.dest for action in parser._actions if action.choices is not None}

    def _placed(self, message: str) -> str:
        """Returns a message of the command's parser, with the recipe's line of the option that it starts with."""
        option = re.match(r"--(?:no-)?([\w-]+)(: )?", message)
        _, where = self.options.get(option[1].replace("-", "_") if option else "", (None, ""))
        if where and option and option[2]:
            return f"{where}: {message[option.end() :]}"
        return f"{(where or self.where).partition(': ')[0]}: stage '{self.name}': {message}"

    def command_line(self, words: list[str]) -> list[str]:
        """Returns the command that runs the stage in the folder `Recipe.output`."""
        if self.script is not None:
            return [sys.executable, str(self.script), *words]
        program = ["-m", "megatron_solopo.cli", self.command, *words]
        if self.processes > 1:
            launch = ["-m", "megatron_solopo.launch", "--standalone", "--nproc_per_node", str(self.processes)]
            program = [*launch, *program]
        return [sys.executable, *program]


def readable(command_line: list[str]) -> str:
    """Returns the command as a person types it."""
    text = shlex.join(command_line[1:]).replace("-m megatron_solopo.launch", "solopo launch", 1)
    if text.startswith("-m megatron_solopo.cli"):
        return text.replace("-m megatron_solopo.cli", "solopo", 1)
    return text if text.startswith("solopo launch") else f"python {text}"


@dataclass(frozen=True)
class Matrix:
    """The runs of an experiment: each of its variants with each of its seeds.

    Attributes:
        where: its ``file:line``.
        seeds: each replaces every ``seed`` of the stages, in an output folder of its own.
        results: absolute folder of the results, a small file for each run.
        result: the path, in the output folder, of the evaluation that is a run's result.
        stages: those of each variant; ``$NAME`` in their options is one of its variables.
        variants: name -> its variables. ``$variant`` is its name.
        predictions: whether the predictions are kept beside each result, which paired differences are of.
    """

    where: str
    seeds: list[int]
    results: Path
    result: str
    stages: list[Stage]
    variants: dict[str, dict[str, object]]
    predictions: bool = False


@dataclass(frozen=True)
class Recipe:
    """What `read_recipe` reads; ``output`` is absolute."""

    path: Path
    output: Path
    environment: dict[str, str]
    stages: list[Stage]
    matrix: Matrix | None = None


def read_recipe(path: str | Path, output: str | None = None, seed: int | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        output: replaces the recipe's; relative to the current folder.
        seed: replaces every ``seed`` of a stage.

    Raises:
        UserError: naming ``file:line`` and the nearest valid name. `Stage.checked` checks the options.
    """
    recipe = _read(Path(path), frozenset())
    if output is not None:
        recipe = dataclasses.replace(recipe, output=Path(output).absolute())
    if recipe.output == Path():
        raise UserError("recipe-incomplete", f"{path}: output: missing; set it to the folder for the stages' outputs")
    if not recipe.stages:
        raise UserError("recipe-incomplete", f"{path}: has no stages")
    if seed is not None and recipe.matrix is not None:
        return dataclasses.replace(recipe, matrix=dataclasses.replace(recipe.matrix, seeds=[seed]))
    return recipe if seed is None else dataclasses.replace(recipe, stages=with_seed(recipe.stages, seed))


def with_seed(stages: Iterable[Stage], seed: int) -> list[Stage]:
    """Returns the stages with another seed where they have one."""
    return [
        dataclasses.replace(stage, options=stage.options | {"seed": (str(seed), "--seed")})
        if "seed" in stage.options
        else stage
        for stage in stages
    ]


TOP = ("base", "output", "environment", "stages", "matrix")
OF_MATRIX = ("seeds", "results", "result", "stages", "variants")
PREDICTIONS = "predictions"


def _read(path: Path, above: frozenset[Path]) -> Recipe:
    if path.resolve() in above:
        raise UserError("recipe-base-loop", f"{path}: is a base of itself")
    with OptionFile(path, "") as file:
        lines = {line.name: line for line in file.entries(file.root, f"{path}: must hold output: and stages:")}
        for line in lines.values():
            if line.name not in TOP:
                raise UserError(
                    "recipe-key",
                    f"{line.where}: unknown '{line.name}'{nearest(line.name, TOP)}; a recipe has {_list(TOP)}",
                )
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
        matrix = _matrix(file, lines["matrix"]) if "matrix" in lines else recipe.matrix
    return Recipe(path, output, environment, list(stages.values()), matrix)


def _matrix(file: OptionFile, line: Entry) -> Matrix:
    parts = {part.name: part for part in _mapping(file, line)}
    for part in parts.values():
        if part.name not in (names := (*OF_MATRIX, PREDICTIONS)):
            raise UserError(
                "recipe-key",
                f"{part.where}: unknown '{part.name}'{nearest(part.name, names)}; a matrix has {_list(names)}",
            )
    for name in OF_MATRIX:
        if name not in parts or file.is_empty(parts[name].node):
            raise UserError("recipe-incomplete", f"{line.where}: matrix: {name}: missing; see docs/pipeline.md")
    seeds, folder = file.value(parts["seeds"].node), file.path.parent.absolute()
    if not isinstance(seeds, list) or not all(isinstance(seed, str) and seed.isdigit() for seed in seeds):
        where = parts["seeds"].where
        raise UserError("recipe-value", f"{where}: seeds: must be a list of whole numbers, found {seeds!r}")
    predictions = file.value(parts[PREDICTIONS].node) if PREDICTIONS in parts else False
    if not isinstance(predictions, bool):
        where = parts[PREDICTIONS].where
        raise UserError("recipe-value", f"{where}: predictions: must be true or false, found {predictions!r}")
    variants: dict[str, dict[str, object]] = {}
    for variant in _mapping(file, parts["variants"]):
        _check_name(variant, "variant")
        variants[variant.name] = {
            name: _relative_to(folder, file.value(node)) for name, _, node in _mapping(file, variant)
        }
    return Matrix(
        line.where,
        [int(seed) for seed in seeds],
        Path(os.path.normpath(folder / _text(file, parts["results"]))),
        os.path.normpath(_text(file, parts["result"])),
        [_stage(file, part, None) for part in _mapping(file, parts["stages"])],
        variants,
        predictions,
    )


def _check_name(line: Entry, what: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", line.name):
        raise UserError("stage-name", f"{line.where}: '{line.name}': name a {what} by letters, digits, - and _")


def _stage(file: OptionFile, line: Entry, before: Stage | None) -> Stage:
    """Returns a stage; ``before`` is the base's stage of this name, which it changes."""
    _check_name(line, "stage")
    keys = (*COMMANDS, SCRIPT, "options", "processes")
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
        stage = dataclasses.replace(stage, script=file.path.parent.absolute() / _text(file, parts[SCRIPT]))
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
        number = _text(file, parts["processes"])
        if not number.isdigit() or int(number) < 1:
            raise UserError(
                "recipe-value",
                f"{parts['processes'].where}: processes: must be a number of at least 1, found {number!r}",
            )
        stage = dataclasses.replace(stage, processes=int(number))
    return dataclasses.replace(stage, options=stage.options | options)


def _mapping(file: OptionFile, line: Entry | None) -> list[Entry]:
    return file.entries(line.node, f"{line.where}: {line.name}: must hold 'name: value' lines") if line else []


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


def _script_words(options: Options) -> list[str]:
    words = []
    for name, (value, where) in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            raise UserError("recipe-value", f"{where}: must be one value or a list, found {value!r}")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, str):
            words += [f"{flag}={value}"] if value.startswith("-") else [flag, value]
        elif value:
            words.append(flag)
    return words


def _check_run(words: list[str]) -> None:
    """Refuses contradictions and options without effect of a training run."""
    from megatron_solopo.config_load import load  # with torch and transformers, which take 3 s

    load(words)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
