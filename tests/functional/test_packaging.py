"""The wheel and the sdist: what is in them, and the commands of an environment that has the wheel and no repository.

Nothing is downloaded: setuptools builds, pip installs without dependencies, and these are those of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from answering import write_questions
from packaging.metadata import Metadata
from training_home import ROOT, Home, furnish

pytestmark = pytest.mark.packaging

BUILD = """
import sys
from setuptools import build_meta

output = sys.argv[1]
build_meta.build_sdist(output)
build_meta.build_wheel(output)  # sys.argv is another now
"""
NOT_SOURCE = shutil.ignore_patterns(
    ".[!d]*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.pyc", "gpu_suite[!.]*", "site"
)
"""What a checkout has beside its files."""


@dataclass(frozen=True)
class Built:
    """The two archives of this checkout."""

    checkout: Path
    wheel: Path
    sdist: Path


def build(checkout: Path, output: Path) -> tuple[Path, Path]:
    """(sdist, wheel), as ``python -m build --no-isolation`` makes them."""
    done = subprocess.run([sys.executable, "-c", BUILD, output], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    checkout = shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "checkout", ignore=NOT_SOURCE)
    sdist, wheel = build(checkout, tmp_path_factory.mktemp("dist"))
    return Built(checkout, wheel, sdist)


def files_in(folder: Path) -> set[str]:
    """The files of a checkout's folder."""
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == files_in(Path("megatron_solopo"))
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    described = Metadata.from_email(text, validate=True)
    assert described.license_expression == "Apache-2.0" and described.license_files == ["LICENSE"]
    assert described.description_content_type == "text/markdown"
    assert message_from_string(text).get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{described.name}-{described.version}" == f"megatron-solopo-{installed_version()}"


def installed_version() -> str:
    from megatron_solopo import __version__

    return __version__


def test_the_sdist_holds_docs_tests_and_examples_and_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    folders = ("megatron_solopo", "docs", "examples", "tests", "tools")
    assert set().union(*(files_in(Path(folder)) for folder in folders)) <= names
    assert {
        ".dockerignore",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "pretrain_solopo.py",
        "uv.lock",
    } <= names
    (folder,) = tmp_path.iterdir()
    _, wheel = build(folder, tmp_path / "again")
    with zipfile.ZipFile(wheel) as again, zipfile.ZipFile(built.wheel) as first:
        assert {item.filename: item.CRC for item in again.infolist()} == {
            item.filename: item.CRC for item in first.infolist()
        }


# ------------------------------------------------------------------------------------------------------- installed


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel, and a user's folder far from any checkout."""

    python: Path
    home: Home

    def run(self, *words: Any) -> str:
        """Runs a command of the environment in the user's folder; returns what it printed."""
        environment = {"PATH": f"{self.python.parent}:/usr/bin:/bin", "HOME": str(self.home.folder), "LANG": "C.UTF-8"}
        program, *rest = map(str, words)
        done = subprocess.run(
            [str(self.python.with_name(program)), *rest],
            cwd=self.home.folder,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
        return done.stdout

    def solopo(self, *words: Any) -> str:
        return self.run("solopo", *words)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", "--disable-pip-version-check", built.wheel], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    # The packages it needs. An editable install there is a *.pth file, and only those of this folder are read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(built.checkout / "megatron_solopo")
    return Installation(folder / "bin/python", furnish(tmp_path_factory.mktemp("user")))


def test_the_package_is_that_of_the_wheel(installed: Installation) -> None:
    code = "import megatron_solopo; from importlib.metadata import version; "
    printed = installed.run("python", "-c", code + "print(megatron_solopo.__file__, version('megatron-solopo'))")
    assert printed.split()[0].startswith(str(installed.python.parents[1])) and printed.split()[1] == installed_version()


def test_help_of_every_command(installed: Installation) -> None:
    from megatron_solopo.cli import COMMANDS

    listing = installed.solopo("--help")
    assert all(f"  {command} " in listing for command in COMMANDS)
    assert installed.solopo("--version") == f"solopo {installed_version()}\n"
    printed = installed.run(
        "python",
        "-c",
        "import sys\nfrom megatron_solopo import cli\n"
        "for command in cli.COMMANDS:\n"
        "    try: sys.argv[0] = 'solopo'; cli.main([command, '--help'])\n"
        "    except SystemExit as end: print(command, 'ends with', end.code)",
    )
    assert [line for line in printed.splitlines() if " ends with " in line] == [
        f"{command} ends with 0" for command in COMMANDS
    ]


def test_from_questions_to_a_report(installed: Installation) -> None:
    """The chain of commands, training as processes that torchrun starts."""
    home = installed.home
    write_questions(home.folder / "questions.jsonl")
    contexts = ["--tokenizer", "hf", "--short-documents", 2, "--long-documents", 4, "--output", "contexts.jsonl"]
    installed.solopo("prepare-data", "--data", "questions.jsonl", *contexts)
    assert (home.folder / "contexts.jsonl").read_text().count("\n") > 1
    installed.solopo("inspect-data", "--data", "groups.jsonl", "--tokenizer", "hf", "--output", "groups.html")
    assert "<style>" in (home.folder / "groups.html").read_text()
    argv = home.argv("runs/one", "--train-iters", 1, "--preference-loss", "orpo", "--save-hf", "one-hf")
    installed.solopo("launch", "--standalone", "--nproc_per_node", 1, "-m", "megatron_solopo.cli", "train", *argv)
    assert home.metrics("runs/one")[0]["loss"] > 0 and (home.folder / "one-hf/config.json").is_file()
    asked = ["--context-documents", 2, "--max-new-tokens", 2, "--limit", 2, "--output", "one.json"]
    installed.solopo("evaluate", "--model", "one-hf", "--data", "questions.jsonl", *asked)
    installed.solopo("report", "--runs", "runs/one", "--evaluations", "one.json", "--output", "report.md")
    assert json.loads((home.folder / "one.json").read_text())["metrics"]["2 documents"]["count"] == 2
    assert "![sub-EM by context length in documents](report-accuracy.png)" in (home.folder / "report.md").read_text()
    assert (home.folder / "report-accuracy.png").is_file()
    assert not os.path.exists(home.folder / "megatron_solopo")
