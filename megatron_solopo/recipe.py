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
``matrix`` makes an experiment of it (`matrix.py`), ``rounds`` repeats stages (`rounds.py`), and ``serving`` starts the
server that they ask (`serving.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.errors import UserError
from megatron_solopo.rounds import Rounds
from megatron_solopo.serving import Serving
from megatron_solopo.yaml_options import Options

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

ASKING = ("sample-responses", "evaluate")
"""Commands that ask a server."""

SCRIPT = "script"

OUTPUTS = (
    "output",
    "counts_output",
    "validation_output",
    "skipped_output",
    "save",
    "save_hf",
    "tensorboard_dir",
    "wandb_save_dir",
)
"""Options of all commands that name outputs."""


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
        served: folder that the recipe's server must have while it runs; None: it does not ask it.
    """

    name: str
    where: str
    command: str
    options: Options = field(default_factory=dict)
    processes: int = 1
    script: Path | None = None
    reads: tuple[str, ...] | None = None
    served: str | None = None

    @property
    def named_outputs(self) -> list[str]:
        """What it writes by the recipe's own lines, which may still have variables; files of options are not read."""
        return [value for name, (value, _) in self.options.items() if name in OUTPUTS and isinstance(value, str)]

    def all_outputs(self) -> list[str]:
        """Returns what it writes, by the recipe's lines and by its file of options; see `checked`."""
        return [value for name, value in self.checked()[1].items() if name in OUTPUTS and isinstance(value, str)]

    def paths_read(self) -> Iterator[str]:
        """Yields what may be paths in its options: a text, @FILE or LABEL=PATH; and the folder that is served."""
        if self.served is not None:
            yield os.path.normpath(self.served)
        other = {*OUTPUTS, *self.of_choices()}
        for name, value in self.checked()[1].items():
            if name in other:
                continue
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and text:
                    yield from map(os.path.normpath, (text, text.removeprefix("@"), text.partition("=")[2]))

    def with_seed(self, seed: int) -> Stage:
        """Returns the stage with another seed where it has one."""
        if "seed" not in self.options:
            return self
        return dataclasses.replace(self, options=self.options | {"seed": (str(seed), "--seed")})

    def checked(self) -> tuple[list[str], dict[str, object]]:
        """Returns (command line, value of each explicit option), checked by the command's parser.

        Raises:
            UserError: a mistake that the command itself would report, with the line of the recipe.
        """
        return self._checked

    @functools.cached_property
    def _checked(self) -> tuple[list[str], dict[str, object]]:
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


def holds(outputs: Iterable[str], path: str) -> bool:
    """Whether a path is an output, or in one."""
    places = map(os.path.normpath, outputs)
    return any(path == output or path.startswith(output + os.sep) for output in places)


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
    rounds: Rounds | None = None
    serving: Serving | None = None


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
