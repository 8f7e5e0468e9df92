"""`solopo run RECIPE.yaml`: the stages of a recipe one after the other, each in a process of its own.

A stage that is done is skipped: with the same options and inputs, where what it wrote is as it left it. After a kill
the same command resumes. What a stage is, and what it made, is noted in ``.stages`` of the output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_solopo
from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.errors import UserError, nearest
from megatron_solopo.recipe import Recipe, Stage, read_recipe, readable
from megatron_solopo.terminal import write_line

OUTPUTS = ("output", "validation_output", "left_out", "save", "save_hf", "tensorboard_dir", "wandb_save_dir")
"""Options of all commands that name what is written."""

NEITHER = ("reference_cache",)
"""What is read and written, under names of its content."""

RESUMED = ("prepare-data", "sample-responses", "tokenize-data", "train", "evaluate")
"""Commands that a repeated command resumes; others begin again."""

ASIDE = ("", ".partial", ".work", ".new", ".replaced")
"""Endings of what commands write beside an output before it takes its name."""

STOPPED = {code: 128 + number for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}
"""Statuses of a stage that a signal stopped -> that of this command."""

WORK_REMAINS = 75
"""Status after a stage that stopped early by itself, as in examples/launch."""

STOPPED_FILE = "SOLOPO_STOPPED_FILE"
"""Environment variable of `training.exits`."""

_ENDS_WITH_PARENT = """\
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which exec keeps
if os.getppid() != int(sys.argv[1]):  # it died before
    sys.exit(128 + signal.SIGTERM)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that gets SIGTERM when its parent dies. Popen's preexec_fn could hang where there are threads."""


def build_parser() -> Parser:
    parser = Parser(
        config=False,
        prog="solopo run",
        description="Run the stages of a recipe: data, training, evaluation, report. Finished stages are skipped, and "
        "a run that was killed is resumed, when the command is repeated.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="output: FOLDER and stages: (docs/pipeline.md)")
    parser.add_argument("--output", metavar="DIR", help="folder for everything that is made (default: the recipe's)")
    parser.add_argument("--seed", type=int, metavar="N", help="in place of every seed that the recipe gives a stage")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; touch nothing")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and those after it, done or not")
    group.add_argument("--only", metavar="STAGE", help="run this stage alone, done or not")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    recipe = read_recipe(options.recipe, options.output, options.seed)
    names = [stage.name for stage in recipe.stages]
    for flag, name in (("--from", options.start), ("--only", options.only)):
        if name is not None and name not in names:
            hint = nearest(name, names) or f"; the stages are {', '.join(names)}"
            raise UserError("stage-unknown", f"{flag} {name}: no such stage{hint}")
    if not options.dry_run:
        recipe.output.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(recipe.output if recipe.output.is_dir() else "."):
        work = _works(recipe)
        if options.dry_run:
            _say_plan(work, options.start, options.only)
            return 0
        with _Locks(Path(".stages")) as locks:
            return _run(recipe, work, options.start, options.only, locks)


@dataclass(frozen=True)
class Work:
    """A stage whose options were checked.

    Attributes:
        number: "2/9".
        given: the value of each option that is given.
        later: what it and the stages after it write.
    """

    stage: Stage
    number: str
    words: list[str]
    given: dict[str, Any]
    later: set[Path] = dataclasses.field(default_factory=set)

    def __str__(self) -> str:
        return f"[{self.number}] {self.stage.name}"

    @property
    def outputs(self) -> list[str]:
        return [value for name, value in self.given.items() if name in OUTPUTS and isinstance(value, str)]

    @property
    def note(self) -> Path:
        return Path(".stages") / f"{self.stage.name}.json"

    def options(self) -> list[Any]:
        """What the stage is: not in how many processes, nor where it resumes."""
        script = str(self.stage.script) if self.stage.script else None
        given = {name: value for name, value in self.given.items() if name != "auto_resume"}
        return json.loads(json.dumps([self.stage.command, script, given], default=str))

    def inputs(self) -> dict[str, Any]:
        """Size and time of every file and folder that an option names, but for what is written from here on: a stage
        of --preference-loss orpo must not take a later one's folder orpo for an input."""
        places = [str(self.stage.script)] if self.stage.script else []
        for name, value in self.given.items():
            if name not in (*OUTPUTS, *NEITHER):
                places += [place for one in (value if isinstance(value, list) else [value]) for place in _places(one)]
        above = [Path.cwd().resolve(), *Path.cwd().resolve().parents]
        return {
            place: _state(Path(place))
            for place in dict.fromkeys(places)
            if (real := Path(place).resolve()) not in above and self.later.isdisjoint([real, *real.parents])
        }


def _works(recipe: Recipe) -> list[Work]:
    """All stages, checked before the first one starts."""
    made: dict[str, str] = {}
    works = []
    for number, stage in enumerate(recipe.stages, 1):
        work = Work(stage, f"{number}/{len(recipe.stages)}", *stage.checked())
        for output in work.outputs:
            other = made.setdefault(os.path.normpath(output), stage.name)
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


def _places(value: Any) -> Iterator[str]:
    """What a value of an option may name: a path, @FILE or LABEL=PATH; only what is there."""
    if isinstance(value, str):
        for text in (value, value.removeprefix("@"), value.partition("=")[2]):
            if text and len(text) < 4096 and "\0" not in text and "\n" not in text and os.path.exists(text):
                yield text


def _state(path: Path) -> list[Any]:
    """(name, size, time of the last change in ns) of a file, or of each file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file), file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]


@dataclass(frozen=True)
class Note:
    """What `.stages` says of a stage: what it is, and, once it is done, what it wrote and how long it took.

    ``outputs`` are those that were not there before it began, and may be deleted when it begins again.
    ``inputs`` is a digest of its inputs and of all stages before it. It says whether what the stage left unfinished can
    be resumed; the options say whether what it finished is still wanted.
    """

    options: list[Any]
    inputs: str
    outputs: list[str] = dataclasses.field(default_factory=list)
    files: list[Any] | None = None
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Note | None:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # a power failure may leave an empty file
            return None

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self)) + "\n")


DONE, RESUMES, BEGINS, LEFT_OUT = "done before", "resumes", "runs", "left out"


def _judged(
    works: Sequence[Work], start: str | None, only: str | None
) -> Iterator[tuple[Work, str, Note, Note | None]]:
    """(stage, `DONE` and so on, the note it gets, the note it has), each when those before it have ended."""
    before, chosen = "", not (start or only)
    for work in works:
        options = work.options()
        inputs = _digest([before, work.inputs()])
        before = _digest([before, options])
        note, noted = Note(options, inputs), Note.read(work.note)
        name = work.stage.name
        chosen = name == only if only else chosen or name == start
        if not chosen:
            state = LEFT_OUT
        elif noted is None or start or only or noted.inputs != inputs or not work.outputs:
            state = BEGINS
        elif noted.files is None:
            state = RESUMES if work.stage.command in RESUMED else BEGINS
        else:
            state = DONE if noted.options == options and _untouched(noted.files) else BEGINS
        yield work, state, note, noted


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _untouched(files: Sequence[Sequence[Any]]) -> bool:
    """Whether every file that a stage wrote is as it left it."""
    for name, size, changed in files:
        try:
            stat = os.stat(name)
        except OSError:
            return False
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            return False
    return True


def _run(recipe: Recipe, works: Sequence[Work], start: str | None, only: str | None, locks: _Locks) -> int:
    begin = time.monotonic()
    for work, state, note, noted in _judged(works, start, only):
        if state == LEFT_OUT:
            continue
        if state == DONE:
            print(f"{work}: done before ({noted.seconds:.1f} s)", flush=True)
            continue
        command = work.stage.command_line(work.words)
        print(f"{work} {state}: {readable(command)}", flush=True)
        if state == BEGINS and noted is not None:
            _remove(noted.outputs)
        outputs = [output for output in work.outputs if not os.path.lexists(output)]
        note = dataclasses.replace(note, outputs=noted.outputs if state == RESUMES else outputs)
        if work.outputs:
            note.write(work.note)
        began = time.monotonic()
        code, stopped = _call(command, recipe.environment, work.stage.processes, locks)
        seconds = time.monotonic() - began
        if code == 0 and not stopped:
            print(f"{work}: {seconds:.1f} s\n", flush=True)
            if work.outputs:
                files = [fact for output in work.outputs if os.path.exists(output) for fact in _state(Path(output))]
                dataclasses.replace(note, files=files, seconds=round(seconds, 3)).write(work.note)
            continue
        if stopped or code in STOPPED:
            write_line(f"{work} was stopped; run the same command again to resume")
            return STOPPED.get(code, WORK_REMAINS)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}, see above"
        raise UserError(
            "stage-failed", f"stage {work} {how}; finished stages are kept: correct it and run the same command again"
        )
    print(f"{recipe.output}: all is done, in {time.monotonic() - begin:.0f} s")
    return 0


def _say_plan(works: Sequence[Work], start: str | None, only: str | None) -> None:
    changed = False
    for work, state, _, noted in _judged(works, start, only):
        if state == DONE and changed:  # it will have other inputs
            state = BEGINS
        changed = changed or (state in (RESUMES, BEGINS) and bool(work.outputs))
        command = f": {readable(work.stage.command_line(work.words))}" if state in (RESUMES, BEGINS) else ""
        print(f"{work} {state}{command}")
        if state == BEGINS and noted is not None:
            for path in _earlier(noted.outputs):
                print(f"  removes {path}")


def _earlier(outputs: Sequence[str]) -> list[Path]:
    """What there is of outputs that a note names; in the output folder, nothing else."""
    here = Path.cwd().resolve()
    paths = [Path(output.rstrip("/") + ending) for output in outputs for ending in ASIDE]
    return [path for path in paths if os.path.lexists(path) and here in path.absolute().resolve().parents]


def _remove(outputs: Sequence[str]) -> None:
    """Deletes what an earlier run of a stage made."""
    for path in _earlier(outputs):
        print(f"  removes {path}, which an earlier run made", flush=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _call(command: list[str], environment: dict[str, str], processes: int, locks: _Locks) -> tuple[int, bool]:
    """Runs a stage, and passes SIGTERM and Ctrl-C on to it.

    Returns its status (negative: the signal that killed it), and whether it stopped before its end in good order.
    It ends with this process, however that ends, and holds a lock as long as it is there.
    """
    package = str(Path(megatron_solopo.__file__).parents[1])
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    stopped = Path(".stages/stopped").absolute()
    stopped.write_text("")

    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command],
        env=threads | os.environ | environment | {"PYTHONPATH": paths, STOPPED_FILE: str(stopped)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C comes once, from here
        pass_fds=[locks.stage],
    )
    handlers = {
        signal.SIGTERM: lambda number, frame: process.terminate(),
        signal.SIGINT: lambda number, frame: os.killpg(process.pid, signal.SIGINT),
    }
    # What is ignored here, as SIGINT is behind nohup or &, is ignored in the stage too.
    handlers = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait(), bool(stopped.read_text())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Locks:
    """One run at a time in an output folder, and no stage beside one that a killed run left.

    Raises:
        UserError: another run is there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._run, self.stage = (os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ("run.lock", "stage.lock"))

    def __enter__(self) -> _Locks:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(self._run, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "folder-in-use",
                    f"{Path.cwd()}: another `solopo run` works there; wait for its end, or end it first",
                ) from None
            try:
                fcntl.flock(self.stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                write_line("waiting for the end of a stage that a killed run left")
                fcntl.flock(self.stage, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._run)
        os.close(self.stage)
