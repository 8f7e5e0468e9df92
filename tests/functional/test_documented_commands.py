"""Every command that README, docs and the examples' READMEs show: its options are read by the command's parser.

| command | how it is tried |
|---|---|
| the example of README.md | run, on a tiny model with small sizes |
| training, with `torchrun` or a launch script | `--dry-run` on a tiny model; options alone where the page has `...` |
| `solopo run` | `--dry-run` |
| `solopo verify-parallelism` | options, layouts and the configuration of the run |
| other commands of `solopo` and of tools/, scripts | their options alone: they need models, servers or hours |
| `make` | `make -n` |
| `pytest`, `python -m build`, shell scripts | the files exist |
| other programs (`OTHERS`) | not tried |

CONTRIBUTING.md's sessions are followed by test_contributing.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig

from megatron_solopo import config as options_of_runs
from megatron_solopo.arguments import Parser
from megatron_solopo.cli import COMMANDS, dispatch, run
from megatron_solopo.config_load import load
from megatron_solopo.losses import registry
from megatron_solopo.parallel.layouts import parse_layout

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("README.md"))
OTHERS = {
    "git": "needs the repository's address",
    "cd": "of the shell",
    "pip": "installs into this environment; test_setup.py installs the package",
    "vllm": "another program",
    "kubectl": "needs a cluster; test_launch_files.py checks the file",
    "mkdir": "unpacks an archive of a machine without package index",
    "tar": "the same",
    "mv": "the same",
    "head": "of the shell",
    "cat": "of the shell",
    "export": "of the shell",
    "source": "of the shell",
}
PLACEHOLDERS = {"COMMAND", "--help"}
"""Words of a sentence about a command, not of one to try."""
OURS = ("solopo", "torchrun", "python", "python3", "make", "pytest", "bash", "sbatch", "pretrain_solopo.py")
NEEDED = {"--hf-path": "MODEL", "--train-data": "groups.jsonl", "--save": "run", "--train-iters": "3"}
"""What a training command that a page writes with ``...`` has there."""


class _Parsed(Exception):
    """A script's parser took its command line."""


def simple_commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of each command in the indented blocks and the code spans of a page, in its order."""
    text = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S)
    text = re.sub(r" *\\\n *", lambda m: " \0", text)  # keeps the number of lines
    values: dict[str, str] = {}
    number = 0
    for line in text.split("\n"):
        number += 1
        shown = (
            [line.strip()]
            if line[:4] == "    " and not line.strip().startswith("|")
            else re.findall(r"`([^`]+)`", line)
        )
        for code in shown:
            lexer = shlex.shlex(code.replace("\0", ""), posix=True, punctuation_chars=";|&")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # a quotation that a program printed
                continue
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set(";|&"):
                    yield from ((number, one) for one in [_command(command, values)] if one)
                    command = []
                else:
                    command.append(word)
        number += line.count("\0")


def _command(words: list[str], values: dict[str, str]) -> list[str]:
    """A command without the shell around it; [] where it is none of ours or `OTHERS`."""
    if words[:1] == ["for"]:
        values[words[1]] = words[3]
        return []
    if words[:1] == ["do"]:
        words = words[1:]
    words = [re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[1]), word) for word in words]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or not (words[0] in OURS or words[0] in OTHERS or re.fullmatch(r"examples/launch/\S+\.sh", words[0])):
        return []
    if words[0] == "pretrain_solopo.py" and words[1:2] and words[1][:1] != "-":
        return []  # a list of files
    return [word.strip("[]") for word in words]


def documented() -> list[pytest.param]:
    """Every different command that has arguments, with the first place that shows it."""
    seen: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for number, words in simple_commands(page):
            if len(words) > 1 and words[0] not in OTHERS and not PLACEHOLDERS & set(words) and "{" not in words[1]:
                seen.setdefault(tuple(words), f"{page.relative_to(ROOT)}:{number}")
    return [pytest.param(list(words), id=f"{place} {' '.join(words[:3])}") for words, place in seen.items()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: models, data, a run's file, a user's loss, a recipe; the examples."""
    fork_server.start()  # each dry run rehearses in a process of its own
    folder = tmp_path_factory.mktemp("documented")
    model = LlamaConfig(**SHAPE | {"max_position_embeddings": 16384}, tie_word_embeddings=False)
    write_model(folder / "MODEL", model)
    groups = preference_groups(16)
    for name in ("groups.jsonl", "valid.jsonl", "runs/musique/pairs.jsonl", "runs/musique/pairs-1k.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, groups)
    (folder / "runs/musique/start").symlink_to(folder / "MODEL")
    for name in ("examples", "pretrain_solopo.py", "tools", "tests", "megatron_solopo"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "run.yaml").write_text(
        "model: {hf_path: MODEL}\ndata: {train_data: groups.jsonl, seq_length: 256}\n"
        "training: {train_iters: 15, global_batch_size: 16}\noutput: {save: run}\n"
    )
    method, pipeline = ((ROOT / "docs" / name).read_text() for name in ("method.md", "pipeline.md"))
    (folder / "my_losses.py").write_text(_block(method, "    from dataclasses import dataclass\n", "    solopo train"))
    recipe = _block(pipeline, "    output: runs/first", "- **A stage**").replace("/models/base", "./MODEL")
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "solo.yaml").write_text("training: {train_iters: 3}\n")
    write_lines(folder / "musique.jsonl", questions(12))
    write_lines(folder / "musique_dev.jsonl", questions(3, first=12))
    (folder / "report.txt").write_text("w1 w2 w3 w4\n")
    write_adapters(folder / "adapters", model)
    options = ["--data", folder / "groups.jsonl", "--tokenizer", folder / "MODEL", "--output", folder / "tokens"]
    assert run(dispatch, ["tokenize-data", *map(str, options)]) == 0
    return folder


def write_adapters(folder: Path, model: LlamaConfig) -> None:
    """A PEFT folder of rank 2 for the queries of each layer."""
    folder.mkdir()
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    name, wide = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight", model.hidden_size
    shapes = {"A": (2, wide), "B": (wide, 2)}
    layers = range(model.num_hidden_layers)
    tensors = {name.format(layer, part): torch.zeros(shape) for layer in layers for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def _block(text: str, first: str, after: str) -> str:
    """The indented block of a page that starts with a line and ends before another, without its indent."""
    lines = (first + text.partition(first)[2].partition(after)[0]).splitlines()
    return "\n".join(line[4:] for line in lines) + "\n"


def questions(count: int, first: int = 0) -> list[dict]:
    """Questions in MuSiQue's form, in the words of the tiny tokenizer; each answer is one word."""
    records = []
    for number in range(first, first + count):
        texts = [" ".join(f"w{(number * 7 + p * 11 + k) % 50}" for k in range(1 + p % 6)) for p in range(20)]
        texts[0] = f"w5{number % 10} w1 w2 w3 w4 w6"
        records.append(
            {
                "id": f"q{number}", "question": f"w{number} w8", "answer": f"w5{number % 10}", "answer_aliases": [],
                "answerable": True,
                "paragraphs": [
                    {"idx": p, "title": f"w{p} t{number}-{p}", "paragraph_text": text, "is_supporting": p == 0}
                    for p, text in enumerate(texts)
                ],
            }
        )  # fmt: skip
    return records


@contextmanager
def forgotten(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """In the folder; a user's loss is forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    known, options, modules = dict(registry.LOSSES), dict(options_of_runs.OWNER), set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    for live, before in ((registry.LOSSES, known), (options_of_runs.OWNER, options)):
        live.clear()
        live.update(before)


def parses(monkeypatch: pytest.MonkeyPatch, call) -> None:
    """The call reads its command line without a mistake; nothing after that runs."""
    for kind in (argparse.ArgumentParser, Parser):
        original = kind.parse_args

        def parse_args(self, args=None, namespace=None, original=original):
            original(self, args, namespace)
            raise _Parsed

        monkeypatch.setattr(kind, "parse_args", parse_args)
    with pytest.raises(_Parsed):
        call()


def train(monkeypatch: pytest.MonkeyPatch, argv: list[str], processes: int) -> None:
    """A dry run; where the page leaves options out, or a plan is for a large model, the check of options alone."""
    partial = "..." in argv or any("recipes/plans/" in word for word in argv) and "--mock-data" not in argv
    argv = [word for word in argv if word != "..."]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if partial:
        needed = {} if "--config" in argv else NEEDED
        load(argv + [word for name, value in needed.items() if name not in argv for word in (name, value)])
    elif {"--hf-path", "--config"} & set(argv):
        argv += [] if "--device" in argv else ["--device", "cpu"]
        printed = io.StringIO()
        with redirect_stdout(printed):
            assert run(dispatch, ["train", *argv, "--dry-run"]) == 0
        assert "rehearsal failed" not in printed.getvalue(), printed.getvalue()
    else:
        raise AssertionError("neither --config nor --hf-path; write ... where options are left out")


def solopo(monkeypatch: pytest.MonkeyPatch, argv: list[str], folder: Path) -> None:
    """A command of `solopo` or of tools/."""
    command, rest = argv[0], argv[1:]
    assert command in COMMANDS, command
    if not rest and command != "env":
        return  # its name in a sentence
    if command == "launch":
        torchrun(monkeypatch, rest)
    elif command == "train":
        train(monkeypatch, rest, 1)
    elif command == "run":
        assert run(dispatch, ["run", *rest, "--dry-run"]) == 0
    elif command == "verify-parallelism":

        def compare(options, rest):
            assert [parse_layout(name) for name in options.layouts]
            load([*rest, "--save", "unused"])
            return 0

        monkeypatch.setitem(sys.modules, "megatron_solopo.training.compare_layouts", SimpleNamespace(compare=compare))
        assert dispatch(argv) == 0
    else:
        parses(monkeypatch, lambda: dispatch(argv))


def torchrun(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    if "pretrain_solopo.py" not in argv:
        return  # its name in a sentence
    place = argv.index("pretrain_solopo.py")
    launch = get_args_parser().parse_args([word for word in argv[: place + 1] if word != "..."])
    train(monkeypatch, argv[place + 1 :], int(launch.nproc_per_node))


def script(monkeypatch: pytest.MonkeyPatch, words: list[str], folder: Path) -> None:
    """A Python file: a command of tools/, the entry of training, or another parser."""
    path, argv = words[0], words[1:]
    if path == "-m":
        assert argv[0] in ("pytest", "build"), "another module"
        return files_exist(argv[1:])
    assert (ROOT / path).is_file(), path
    if path == "pretrain_solopo.py":
        return train(monkeypatch, argv, 1)
    if "--" in argv and path.endswith("watch_memory.py"):
        inner = argv[argv.index("--") + 1 :]
        torchrun(monkeypatch, inner[inner.index("torchrun") + 1 :])
    if "parse_args" not in (ROOT / path).read_text() and "run_tool" not in (ROOT / path).read_text():
        return None
    if not argv:
        return None
    monkeypatch.setattr(sys, "argv", [path, *argv])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    return parses(monkeypatch, lambda: runpy.run_path(str(ROOT / path), run_name="__main__"))


def files_exist(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("words", documented())
def test_every_documented_command_is_valid(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with forgotten(monkeypatch, home):
        program, argv = words[0], words[1:]
        if program == "make":
            done = subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "solopo":
            solopo(monkeypatch, argv, home)
        elif program == "torchrun":
            torchrun(monkeypatch, argv)
        elif program == "pretrain_solopo.py":
            train(monkeypatch, argv, 1)
        elif program in ("python", "python3"):
            script(monkeypatch, argv, home)
        elif program == "pytest":
            files_exist(argv)
        else:  # bash and sbatch name a script, which may hand the rest to training
            place = next(index for index, word in enumerate(words) if word.startswith("examples/"))
            assert os.access(ROOT / words[place], os.R_OK)
            if "launch" in words[place]:
                train(monkeypatch, words[place + 1 :], 1)


SMALLER = {"1024": "170", "8192": "260", "8704": "320", "1024,4096,8192": "170,200,260"}
"""The sizes of README.md -> those of the tiny model's words."""
MORE = {
    "sample-responses": ["--samples", "24", "--max-new-tokens", "12", "--device", "cpu", "--dtype", "float32"],
    "evaluate": ["--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"],
    "ask": ["--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"],
    "torchrun": ["--global-batch-size", "4", "--device", "cpu"],
}


def test_the_example_of_the_readme_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is there, in its order, with smaller sizes: questions to a report and an answer."""
    for name in ("MODEL", "musique.jsonl", "musique_dev.jsonl", "report.txt"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    first = text[: text.index("    solopo prepare-data")].count("\n") + 1
    last = text[: text.index("    solopo ask")].count("\n") + 1
    ran = []
    for number, words in simple_commands(ROOT / "README.md"):
        if not first <= number <= last:
            continue
        words = [SMALLER.get(word, word) for word in words]
        ran.append(words[1] if words[0] == "solopo" else words[0])
        words += MORE.get(ran[-1], [])
        if words[0] == "torchrun":
            words[words.index("pretrain_solopo.py")] = str(ROOT / "pretrain_solopo.py")
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert run(dispatch, words[1:]) == 0, words
    names = ["prepare-data", "sample-responses", "build-pairs", "inspect-data", "torchrun", "evaluate", "report", "ask"]
    assert ran == names
    assert json.loads((tmp_path / "solo.json").read_text()) and (tmp_path / "report.md").stat().st_size > 500
    assert (tmp_path / "runs/solo-hf/model.safetensors").exists() and (tmp_path / "groups.html").exists()


def test_commands_of_every_page_are_read() -> None:
    """The reader of commands finds those of every kind, at their lines."""
    commands_of = {page: list(simple_commands(page)) for page in PAGES}
    assert sum(map(len, commands_of.values())) > 100
    for page, commands in commands_of.items():
        lines = page.read_text().splitlines()
        assert all(words[0] in lines[number - 1] for number, words in commands), page
    shown = " ".join(" ".join(param.values[0]) for param in documented())
    for text in (
        "demo.yaml --seed 0",
        "--server http",
        "examples/launch/slurm.sbatch",
        "--fp8-format",
        "hub:HuggingFaceH4",
    ):
        assert text in shown, text
