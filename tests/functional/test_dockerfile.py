"""The Dockerfile's steps, run here by its shell: pip and venv are real, packages stand-ins, nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_setup import described, extras, pack_installed, pins, write_wheel
from training_home import ROOT


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, its lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in joined)]


def arguments() -> dict[str, str]:
    """Build arguments with their defaults."""
    return dict(rest.split("=", 1) for keyword, rest in instructions() if keyword == "ARG")


def copy_all(target: Path) -> None:
    """``COPY . .``: the checkout without what .dockerignore names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    top = [line for line in lines if line and not line.startswith(("#", "**/"))]
    anywhere = [line.removeprefix("**/") for line in lines if line.startswith("**/")]

    def ignored(folder: str, names: list[str]) -> set[str]:
        patterns = [*anywhere, *(top if Path(folder) == ROOT else [])]
        return shutil.ignore_patterns(*patterns)(folder, names)

    shutil.copytree(ROOT, target, ignore=ignored, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of all that the image has, and newer ones of two packages that constraints.txt pins."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("pip", "setuptools"):
        if metadata.version(name) != pins()[name]:
            pytest.skip(f"this Python has {name} {metadata.version(name)}, constraints.txt has {pins()[name]}")
        pack_installed(folder, name)
    wanted = [
        *described()["dependencies"],
        *(one for extra in arguments()["EXTRAS"].split(",") for one in extras()[extra]),
    ]
    for requirement in map(Requirement, wanted):
        write_wheel(folder, requirement.name, pins()[canonicalize_name(requirement.name)], {})
    for name in ("torch", "tqdm"):
        write_wheel(folder, name, "99.0", {f"{name}/__init__.py": b""})
    return folder


BASES = {"CUDA alone": (None, pins()["torch"], pins()["tqdm"]), "a base with torch": ("2.10.0a0+nv", None, "99.0")}
"""Base -> the torch that it brings; torch and tqdm in the environment of the image."""


@pytest.mark.parametrize("base", BASES)
def test_the_steps_install_the_pins_or_keep_the_bases_torch(wheels: Path, tmp_path: Path, base: str) -> None:
    brought, torch, tqdm = BASES[base]
    for name in ("bin", "checkout", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/apt-get").write_text("#!/bin/false\n")
    (tmp_path / "bin/apt-get").chmod(0o755)
    (tmp_path / "bin/python3").symlink_to(Path(sys.base_prefix) / "bin/python3")
    if brought:
        write_wheel(tmp_path, "torch", brought, {"torch/__init__.py": b""})
        shutil.unpack_archive(next(tmp_path.glob("torch-*.whl")), tmp_path / "base", "zip")
    environment = {
        "VIRTUAL_ENV": str(tmp_path / "image"),
        "PATH": f"{tmp_path}/image/bin:{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path / "base"),
        "EXTRAS": arguments()["EXTRAS"],
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }
    (shell,) = (json.loads(rest) for keyword, rest in instructions() if keyword == "SHELL")
    for keyword, rest in instructions():
        if keyword == "COPY" and rest == ". .":
            copy_all(tmp_path / "checkout")
        elif keyword == "COPY":
            *sources, target = rest.split()
            (tmp_path / "checkout" / target).mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(ROOT / source, tmp_path / "checkout" / target)
        elif keyword == "RUN":
            done = subprocess.run(
                [*shell, rest], cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    (site,) = (tmp_path / "image").glob("lib/python3.*/site-packages")
    installed = {canonicalize_name(one.name): one.version for one in metadata.distributions(path=[str(site)])}
    assert (installed.get("torch"), installed["tqdm"]) == (torch, tqdm)
    assert {canonicalize_name(Requirement(one).name) for one in extras()["report"]} <= installed.keys()
    assert (tmp_path / "image/bin/solopo").is_file()
    (record,) = site.glob("megatron_solopo-*.dist-info/direct_url.json")
    assert json.loads(record.read_text()) == {"dir_info": {"editable": True}, "url": (tmp_path / "checkout").as_uri()}
    for needed in ("pretrain_solopo.py", "examples/launch/torchrun_c10d.sh", "megatron_solopo/training/run.py"):
        assert (tmp_path / "checkout" / needed).is_file()
    assert not [name for name in os.listdir(tmp_path / "checkout") if name.startswith(".")]


def test_the_image_is_where_the_launch_files_expect_it() -> None:
    (folder,) = (rest for keyword, rest in instructions() if keyword == "WORKDIR")
    assert f"workingDir: {folder}\n" in (ROOT / "examples/launch/pytorchjob.yaml").read_text()
