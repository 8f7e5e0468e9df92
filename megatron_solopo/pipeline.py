"""`solopo run RECIPE.yaml`: the stages of a recipe one after the other, each in a separate process.

A finished stage is skipped if its options, inputs and outputs are unchanged. After a kill the same command resumes.
The folder ``.stages`` of the output folder records each stage's options and outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.errors import UserError, nearest
from megatron_solopo.recipe import OUTPUTS, Recipe, Stage, holds, readable
from megatron_solopo.recipe_file import read_recipe
from megatron_solopo.serving import Server
from megatron_solopo.stage_process import STOPPED, Locks, call
from megatron_solopo.terminal import write_line

NEITHER = ("reference_cache",)
"""Options that name caches, which are neither inputs nor outputs."""

RESUMED = ("prepare-data", "sample-responses", "tokenize-data", "train", "evaluate")
"""Commands that resume when they are repeated; others start again."""

ASIDE = ("", ".partial", ".work", ".new", ".replaced")
"""Suffixes of the temporary files beside an output."""

WORK_REMAINS = 75
"""Exit status after a stage that stopped early by itself, as in examples/launch."""


def build_parser() -> Parser:
    parser = Parser(
        config=False,
        prog="solopo run",
        description="Run the stages of a recipe: data, training, evaluation, report. Finished stages are skipped, and "
        "a run that was killed is resumed, when the command is repeated.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="output: FOLDER and stages: (docs/pipeline.md)")
    parser.add_argument("--output", metavar="DIR", help="folder for all outputs (default: the recipe's)")
    parser.add_argument("--seed", type=int, metavar="N", help="replaces every seed of the recipe's stages")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds (default: the recipe's)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run; touch nothing")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--from", dest="start", metavar="STAGE", help="run this stage and those after it, finished or not"
    )
    group.add_argument("--only", metavar="STAGE", help="run this stage alone, finished or not")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        raise UserError("option-value", f"--rounds {options.rounds}: set a number of at least 1")
    recipe = read_recipe(options.recipe, options.output, options.seed, options.rounds)
    names = [stage.name for stage in recipe.stages]
    for flag, name in (("--from", options.start), ("--only", options.only)):
        if name is None:
            continue
        if recipe.matrix is not None:
            raise UserError(
                "option-conflict",
                f"{flag} {name}: {recipe.path} has a matrix, whose variants run the stages that they need; delete the "
                "results of those that shall run again",
            )
        if name not in names:
            hint = nearest(name, names) or f"; the stages are {', '.join(names)}"
            raise UserError("stage-unknown", f"{flag} {name}: no such stage{hint}")
    if recipe.matrix is not None:
        from megatron_solopo.matrix import run_matrix

        return run_matrix(recipe, recipe.matrix, options.dry_run)
    return run_stages(recipe, options.dry_run, options.start, options.only)


def run_stages(recipe: Recipe, dry_run: bool = False, start: str | None = None, only: str | None = None) -> int:
    """Runs the stages of a recipe in its output folder, or prints what would run.

    Args:
        start, only: see --from and --only.

    Returns:
        The exit status of the command: 0 where all stages are done.
    """
    if not dry_run:
        recipe.output.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(recipe.output if recipe.output.is_dir() else "."):
        work = _works(recipe)
        if dry_run:
            _print_plan(recipe, work, start, only)
            return 0
        with Locks(Path(".stages")) as locks, Server(recipe.serving, recipe.environment, locks) as server:
            return _run(recipe, work, start, only, locks, server)


@dataclass(frozen=True)
class Work:
    """A stage whose options were checked.

    Attributes:
        number: "2/9".
        values: the value of each explicit option.
        reads: see `Stage`; in a recipe with rounds the stages whose outputs it needs, so that another report of the
            first round restarts no later round.
        later: outputs of this stage and of those after it.
    """

    stage: Stage
    number: str
    words: list[str]
    values: dict[str, object]
    reads: tuple[str, ...] | None = None
    later: set[Path] = dataclasses.field(default_factory=set)

    def __str__(self) -> str:
        return f"[{self.number}] {self.stage.name}"

    @property
    def outputs(self) -> list[str]:
        return self.stage.all_outputs()

    @property
    def note(self) -> Path:
        return Path(".stages") / f"{self.stage.name}.json"

    def options(self) -> list[object]:
        """Returns the stage's command and options, without the number of processes and --auto-resume."""
        script = str(self.stage.script) if self.stage.script else None
        values = {name: value for name, value in self.values.items() if name != "auto_resume"}
        if self.stage.served is not None:
            values["served"] = self.stage.served
        return json.loads(json.dumps([self.stage.command, script, values], default=str))

    def inputs(self) -> dict[str, str | list[State]]:
        """The state of every file and folder that an option names, except outputs of this and later stages: the value
        of --preference-loss orpo is not a later stage's folder orpo. A small file is known by its content, since a
        checkout of the same scripts changes their times."""
        places = [str(self.stage.script)] if self.stage.script else []
        places += _places(self.stage.served)
        for name, value in self.values.items():
            if name not in (*OUTPUTS, *NEITHER):
                places += [place for one in (value if isinstance(value, list) else [value]) for place in _places(one)]
        above = [Path.cwd().resolve(), *Path.cwd().resolve().parents]
        return {
            place: hashlib.sha256(path.read_bytes()).hexdigest() if _is_small(path := Path(place)) else _state(path)
            for place in dict.fromkeys(places)
            if (real := Path(place).resolve()) not in above and self.later.isdisjoint([real, *real.parents])
        }


def _dependencies(stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    """Returns the names of the stages whose outputs each stage needs, directly or through others."""
    needs: dict[str, tuple[str, ...]] = {}
    for number, stage in enumerate(stages):
        paths = list(stage.paths_read())
        direct = [one.name for one in stages[:number] if any(holds(one.all_outputs(), path) for path in paths)]
        needs[stage.name] = tuple(dict.fromkeys(name for one in direct for name in (*needs[one], one)))
    return needs


def _works(recipe: Recipe) -> list[Work]:
    """Returns all stages, checked before the first one starts."""
    writers: dict[str, str] = {}
    works = []
    needs = {} if recipe.rounds is None else _dependencies(recipe.stages)
    for number, stage in enumerate(recipe.stages, 1):
        reads = needs.get(stage.name, stage.reads)
        work = Work(stage, f"{number}/{len(recipe.stages)}", *stage.checked(), reads)
        for output in work.outputs:
            other = writers.setdefault(os.path.normpath(output), stage.name)
            if other != stage.name:
                raise UserError(
                    "stage-output-twice",
                    f"{stage.where}: stage '{stage.name}': {output} is written by stage '{other}' too",
                )
        works.append(work)
    later: set[Path] = set()
    for work in reversed(works):
        later |= {Path(output).resolve() for output in work.outputs}
        work.later.update(later)
    return works


SMALL = 2**20
"""Bytes of a file that is read to know whether it changed."""

State = tuple[str, int, int]
"""(name, size, time of the last change in ns) of a file."""


def _places(value: object) -> Iterator[str]:
    """Yields the existing paths that an option's value may name: a path, @FILE or LABEL=PATH."""
    if isinstance(value, str):
        for text in (value, value.removeprefix("@"), value.partition("=")[2]):
            if text and len(text) < 4096 and "\0" not in text and "\n" not in text and os.path.exists(text):
                yield text


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= SMALL


def _state(path: Path) -> list[State]:
    """Returns the state of a file, or of each file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]


@dataclass(frozen=True)
class Note:
    """The record of a stage in `.stages`.

    Attributes:
        options: see `Work.options`. A finished stage is skipped while they are the same.
        inputs: digest of its inputs and of the stages before it (`Stage.reads`). An unfinished stage is resumed while
            it is the same.
        outputs: those that did not exist before it started; they are deleted when it starts again.
        files: (name, size, time of the last change in ns) of what it wrote; None: unfinished.
        seconds, cpu_seconds: by the clock and of its processes, of its last start.
    """

    options: list[object]
    inputs: str
    outputs: list[str] = dataclasses.field(default_factory=list)
    files: list[State] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Note | None:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # a power failure may leave an empty file
            return None

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self)) + "\n")


DONE, RESUMES, RUNS, LEFT_OUT = "done before", "resumes", "runs", "left out"
"""States of a stage, as they are printed."""


def _states(
    works: Sequence[Work], start: str | None, only: str | None
) -> Iterator[tuple[Work, str, Note, Note | None]]:
    """(stage, its state, the note to write, the note of an earlier run), each once the stages before it have ended."""
    before, chosen = "", not (start or only)
    options_of: dict[str, list[object]] = {}
    for work in works:
        options, reads = work.options(), work.reads
        earlier = before if reads is None else _digest([options_of[name] for name in reads])
        inputs = _digest([earlier, work.inputs()])
        before, options_of[work.stage.name] = _digest([before, options]), options
        note, noted = Note(options, inputs), Note.read(work.note)
        name = work.stage.name
        chosen = name == only if only else chosen or name == start
        if not chosen:
            state = LEFT_OUT
        elif noted is None or start or only or noted.inputs != inputs or not work.outputs:
            state = RUNS
        elif noted.files is None:
            state = RESUMES if work.stage.command in RESUMED else RUNS
        else:
            state = DONE if noted.options == options and _untouched(noted.files) else RUNS
        yield work, state, note, noted


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _untouched(files: Sequence[State]) -> bool:
    """Whether no file that a stage wrote has changed since."""
    for name, size, changed in files:
        try:
            stat = os.stat(name)
        except OSError:
            return False
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            return False
    return True


def _run(
    recipe: Recipe, works: Sequence[Work], start: str | None, only: str | None, locks: Locks, server: Server
) -> int:
    run_started = time.monotonic()
    for work, state, note, noted in _states(works, start, only):
        if state == LEFT_OUT:
            continue
        if state == DONE and noted is not None:
            print(f"{work}: done before ({noted.seconds:.1f} s)", flush=True)
            continue
        command = work.stage.command_line(work.words)
        server.provide(work.stage.served)
        print(f"{work} {state}: {readable(command)}", flush=True)
        if state == RUNS and noted is not None:
            _remove(noted.outputs)
        outputs = [output for output in work.outputs if not os.path.lexists(output)]
        note = dataclasses.replace(note, outputs=noted.outputs if state == RESUMES and noted is not None else outputs)
        if work.outputs:
            note.write(work.note)
        started, used = time.monotonic(), _cpu_of_stages()
        code, stopped = call(command, recipe.environment, work.stage.processes, locks)
        seconds, cpu = time.monotonic() - started, _cpu_of_stages() - used
        if code == 0 and not stopped:
            print(f"{work}: {seconds:.1f} s\n", flush=True)
            if work.outputs:
                files = [fact for output in work.outputs if os.path.exists(output) for fact in _state(Path(output))]
                times = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
                dataclasses.replace(note, files=files, **times).write(work.note)
            continue
        if stopped or code in STOPPED:
            write_line(f"{work} was stopped; run the same command again to resume")
            return STOPPED.get(code, WORK_REMAINS)
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}, see above"
        raise UserError(
            "stage-failed",
            f"stage {work} {ending}{server.ending()}; finished stages are kept: correct it and run the same command "
            "again",
        )
    print(f"{recipe.output}: all stages are done, in {time.monotonic() - run_started:.0f} s")
    return 0


def _cpu_of_stages() -> float:
    """Returns the seconds of processors of all ended processes of stages."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _print_plan(recipe: Recipe, works: Sequence[Work], start: str | None, only: str | None) -> None:
    changed: set[str] = set()
    for work, state, _, noted in _states(works, start, only):
        if state == DONE and (changed if work.reads is None else changed.intersection(work.reads)):
            state = RUNS  # its inputs will change
        if state in (RESUMES, RUNS) and work.outputs:
            changed.add(work.stage.name)
        command = f": {readable(work.stage.command_line(work.words))}" if state in (RESUMES, RUNS) else ""
        print(f"{work} {state}{command}")
        if command and recipe.serving is not None and work.stage.served is not None:
            print(f"  served by: {recipe.serving.readable(work.stage.served)}")
        if state == RUNS and noted is not None:
            for path in _earlier(noted.outputs):
                print(f"  removes {path}")


def _earlier(outputs: Sequence[str]) -> list[Path]:
    """Returns the existing outputs that a note names; only those in the output folder."""
    folder = Path.cwd().resolve()
    paths = [Path(output.rstrip("/") + ending) for output in outputs for ending in ASIDE]
    return [path for path in paths if os.path.lexists(path) and folder in path.absolute().resolve().parents]


def _remove(outputs: Sequence[str]) -> None:
    """Deletes the outputs of an earlier run of a stage."""
    for path in _earlier(outputs):
        print(f"  removes {path} of an earlier run", flush=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
