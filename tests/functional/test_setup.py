"""Setting up, as a user meets it: which Python is taken, what .venv gets, what the package asks for."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from setuptools import find_packages
from training_home import ENVIRONMENT, Home, furnish

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash cat df dirname flock readlink rm sha256sum tail timeout uname".split()

OLD = "import platform, sys; sys.version_info = (3, 11, 2); platform.python_version = lambda: '3.11.2'"
NO_VENV = "import sys; sys.modules['ensurepip'] = None"
BROKEN = None


# ---------------------------------------------------------------------------------------------------- finding Python


class Machine:
    """A machine that consists of a PATH and a home folder, where only the Pythons put there exist."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.root = folder / "checkout"
        for folder_on_path in (self.bin, self.home, self.root / "tools"):
            folder_on_path.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "uv.lock", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, self.root)
        shutil.copy(ROOT / "tools" / "bootstrap.sh", self.root / "tools")
        (self.root / "megatron_solopo").mkdir()
        shutil.copy(ROOT / "megatron_solopo" / "__init__.py", self.root / "megatron_solopo")
        self.environment = {"PATH": str(self.bin), "HOME": str(self.home), "LANG": "C.UTF-8"}

    def add_python(self, path: Path, prelude: str | None = "pass", installs: bool = True) -> Path:
        """A command that is this test's Python after running ``prelude``; None: a command that always fails.

        With ``installs=False`` it answers questions but fails to make environments and to install anything.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # The bootstrap asks with `-I -c CODE`; anything else goes to the real interpreter.
        ask = f'"{sys.executable}" -I -c "{prelude}; import sys; exec(sys.argv[1])" "$3"'
        path.write_text(
            "\n".join(
                [
                    f"#!{self.bin}/bash",
                    "echo 'pyenv: command not found' >&2; exit 127" if prelude is None else "",
                    f'if [ "$2" = -c ]; then exec {ask}; fi',
                    f'exec "{sys.executable}" "$@"' if installs else "exit 1",
                ]
            )
            + "\n"
        )
        path.chmod(0o755)
        return path

    def bootstrap(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "bash"), "tools/bootstrap.sh", *arguments],
            cwd=self.root,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def chosen_python(self, **environment: str) -> str:
        done = self.bootstrap("--find-python", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_python_that_runs_is_taken_before_a_shim_that_does_not(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", BROKEN)
    machine.add_python(machine.bin / "python3", OLD)
    good = machine.add_python(machine.home / ".pyenv/versions/3.12.1/bin/python3")
    assert machine.chosen_python() == str(good)


def test_a_newer_default_python3_is_enough(machine: Machine) -> None:
    good = machine.add_python(machine.bin / "python3")
    assert machine.chosen_python() == str(good)


def test_uv_makes_the_environment_where_it_is(machine: Machine) -> None:
    """It finds or downloads a Python itself; UV=no and another build of torch leave the packages to pip."""
    good = machine.add_python(machine.home / "managed/python3")
    log = machine.home / "asked"
    uv = machine.bin / "uv"
    uv.write_text(
        f'#!{machine.bin}/bash\necho "$*" >>{log}\n'
        f'if [ "$1" = venv ]; then "{sys.executable}" -m venv --without-pip .venv; else exit 3; fi\n'
    )
    uv.chmod(0o755)
    done = machine.bootstrap()
    assert done.returncode == 1 and "uv could not install the packages" in done.stderr and "UV=no" in done.stderr
    asked = log.read_text().splitlines()
    assert asked[0].startswith("venv") and "--python >=3.12,<3.14 .venv" in asked[0]
    assert asked[1:] == ["sync --frozen --extra test --inexact"]
    done = machine.bootstrap(PYTHON="/some/python", TORCH_INDEX_URL="file:///nowhere", PIP_NO_INDEX="1")
    assert done.returncode == 1 and log.read_text().count("sync") == 1  # the first was not finished: pip is next
    shutil.rmtree(machine.root / ".venv")
    machine.bootstrap(PYTHON="/some/python", TORCH_INDEX_URL="file:///nowhere", PIP_NO_INDEX="1")
    assert "--python /some/python .venv" in log.read_text() and log.read_text().count("sync") == 1
    log.unlink()
    shutil.rmtree(machine.root / ".venv")
    machine.add_python(machine.bin / "python3", OLD)
    done = machine.bootstrap(UV="no", PYTHON=str(good), PIP_NO_INDEX="1")
    assert done.returncode == 1 and "pip could not be installed" in done.stderr and not log.exists()


def test_PYTHON_is_used_or_refused(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3")
    chosen = machine.add_python(machine.home / "elsewhere/python")
    assert machine.chosen_python(PYTHON=str(chosen)) == str(chosen)
    old = machine.add_python(machine.home / "old/python", OLD)
    for value, message in ((str(old), "is CPython 3.11.2"), ("/nowhere/python", "/nowhere/python does not run")):
        done = machine.bootstrap("--find-python", PYTHON=value)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_without_a_usable_python_it_lists_what_it_tried_and_what_to_do(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", BROKEN)
    machine.add_python(machine.bin / "python3.13", NO_VENV)
    machine.add_python(machine.bin / "python3", OLD)
    done = machine.bootstrap("--find-python")
    assert done.returncode == 1
    for line in (
        f"{machine.bin}/python3.12 does not run",
        f"{machine.bin}/python3 is CPython 3.11.2",
        f"is Python {platform.python_version()} without the venv and ensurepip modules (apt install python3-venv)",
        "install uv, which brings one",
    ):
        assert line in done.stderr, done.stderr
    assert not (machine.root / ".venv").exists()


# ------------------------------------------------------------------------------------------------ the whole of set-up


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """A pure-Python wheel without dependencies."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, content in contents.items():
            wheel.writestr(path, content)


def pack_installed(folder: Path, name: str) -> None:
    """The installed pure-Python distribution ``name`` as a wheel again."""
    distribution = metadata.distribution(name)
    parts = [path for path in distribution.files or [] if ".." not in path.parts and path.suffix != ".pyc"]
    rewritten = ("METADATA", "WHEEL", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    kept = [path for path in parts if path.locate().is_file() and path.name not in rewritten]
    files = {str(path): path.locate().read_bytes() for path in kept}
    write_wheel(folder, name, distribution.version, files)


def pins() -> dict[str, str]:
    """Normalised name -> version, from constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, lines)}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def described() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras() -> dict[str, list[str]]:
    """Extra -> what it asks for, those of the package itself taken apart."""
    asked = described()["optional-dependencies"]

    def flat(requirement: str) -> list[str]:
        one = Requirement(requirement)
        if one.name != described()["name"]:
            return [requirement]
        return [inner for extra in sorted(one.extras) for inner in asked[extra]]

    return {extra: [inner for one in requirements for inner in flat(one)] for extra, requirements in asked.items()}


def test_setup_installs_once_repairs_itself_and_may_be_moved(machine: Machine, tmp_path: Path) -> None:
    """The real script, pip and venv; the packages are small stand-ins of the pinned versions: nothing is downloaded."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pip", "setuptools"):
        if metadata.version(name) != pins()[name]:
            pytest.skip(f"this Python has {name} {metadata.version(name)}, constraints.txt has {pins()[name]}")
        pack_installed(wheels, name)
    contents = {"torch": "torch", "megatron-core": "megatron/core", "transformers": "transformers"}
    for requirement in map(Requirement, [*described()["dependencies"], *extras()["test"]]):
        name = canonicalize_name(requirement.name)
        if name == "pip":  # packed above
            continue
        folder = contents.get(name, name.replace("-", "_"))
        write_wheel(wheels, requirement.name, pins()[name], {f"{folder}/__init__.py": b""})
    python = machine.add_python(machine.bin / "python3.12")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}

    first = machine.bootstrap(**offline)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"\d\.\d GiB to download, \d\.\d GiB on disk", first.stdout)
    assert python.name in (machine.root / ".venv/pyvenv.cfg").read_text() or python.is_file()
    assert (machine.root / ".venv/bin/solopo").is_file()

    second = machine.bootstrap(PIP_NO_INDEX="1")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")

    # A pin changes: it alone is installed.
    (site,) = machine.root.glob(".venv/lib/python3.*/site-packages")
    write_wheel(wheels, "tqdm", "99.0", {"tqdm/__init__.py": b""})
    constraints = machine.root / "constraints.txt"
    constraints.write_text(re.sub(r"(?m)^tqdm==.*", "tqdm==99.0", constraints.read_text()))
    (site / "mine.py").touch()
    third = machine.bootstrap(**offline)
    assert third.returncode == 0, third.stdout + third.stderr
    assert (site / "tqdm-99.0.dist-info").is_dir() and (site / "mine.py").is_file()

    # A set-up was cut off half-way through a package: that one is installed again.
    (machine.root / ".venv/.megatron_solopo_ready").write_text(f"unfinished\n{machine.root}\n")
    (info,) = site.glob("torch-*.dist-info")
    (info / "RECORD").unlink()
    (site / "torch/__init__.py").unlink()
    again = machine.bootstrap(**offline)
    assert again.returncode == 0 and f"{info.name} was half installed" in again.stdout, again.stdout + again.stderr
    assert (site / "torch/__init__.py").is_file() and (info / "RECORD").is_file() and (site / "mine.py").is_file()

    # The checkout is moved: .venv is created anew.
    old, machine.root = machine.root, machine.root.rename(machine.root.with_name("moved"))
    again = machine.bootstrap(**offline)
    assert again.returncode == 0 and f"creating .venv again: it was created in {old}" in again.stdout, again.stdout
    (site,) = machine.root.glob(".venv/lib/python3.*/site-packages")
    assert (site / "torch/__init__.py").is_file() and not (site / "mine.py").exists()
    assert (machine.root / ".venv/bin/solopo").read_text().startswith(f"#!{machine.root}/.venv/bin/python")


def test_a_disk_that_is_too_small_is_named_before_anything_is_downloaded(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", installs=False)
    df = machine.bin / "df"
    df.unlink()
    df.write_text(
        f"#!{machine.bin}/bash\necho Filesystem Blocks Used Available Capacity On\necho /dev/x 9 9 51200 9% /\n"
    )
    df.chmod(0o755)
    done = machine.bootstrap(PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert re.search(r"error: .*: 0 GiB free on this disk, 8 GiB needed", done.stderr), done.stderr
    assert not (machine.root / ".venv").exists()


def test_an_environment_of_an_older_python_is_refused_and_kept(machine: Machine) -> None:
    kept = machine.add_python(machine.root / ".venv/bin/python", OLD, installs=False)
    done = machine.bootstrap()
    assert (
        done.returncode == 1 and ".venv: its Python is CPython 3.11.2" in done.stderr and "rm -r .venv" in done.stderr
    )
    assert kept.is_file()


# ------------------------------------------------------------------------------------------------- what is described


def test_constraints_are_those_of_the_lock() -> None:
    """Of the package with its tests; the lock itself is that of pyproject.toml's requirements."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    packages = {package["name"]: package for package in lock}
    assert len(packages) == len(lock), "two versions of one package"
    project = packages[described()["name"]]
    wanted = {(canonicalize_name(r.name), str(r.specifier)) for r in map(Requirement, described()["dependencies"])}
    for requirements in described()["optional-dependencies"].values():
        for one in map(Requirement, requirements):
            wanted.add((canonicalize_name(one.name), str(one.specifier)))
    locked = {
        (one["name"], str(SpecifierSet(one.get("specifier", "")))) for one in project["metadata"]["requires-dist"]
    }
    assert locked == wanted, "run `make lock`"

    reached: set[tuple[str, str | None]] = set()

    def reach(name: str, extra: str | None) -> None:
        if (name, extra) in reached:
            return
        reached.add((name, extra))
        package = packages[name]
        asked = package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
        for one in asked:
            for wanted in (None, *one.get("extra", [])):
                reach(one["name"], wanted)

    reach(project["name"], None)
    reach(project["name"], "test")
    reach(project["name"], "dev")
    reach(project["name"], "docs")
    assert pins() == {name: packages[name]["version"] for name, _ in reached if name != project["name"]}, (
        "run `make lock`"
    )


def test_requirements_are_ranges_that_the_pins_satisfy() -> None:
    pinned = pins()
    for requirement in map(Requirement, [*described()["dependencies"], *sum(extras().values(), [])]):
        operators = {specifier.operator for specifier in requirement.specifier}
        upper_bound_allowed = requirement.name == "megatron-core"
        assert operators == ({">=", "<"} if upper_bound_allowed else {">="}), requirement
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is pinned"


def test_every_folder_with_modules_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_solopo").rglob("*.py")}
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {".".join(folder.parts) for folder in folders} == set(find_packages(str(ROOT), include=include))


def imported_modules() -> set[str]:
    """Top-level names that the package imports, without those of the package and the standard library."""
    names: set[str] = set()
    for path in (ROOT / "megatron_solopo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    # torch.utils.tensorboard is a door to the tensorboard package.
    tops = {name.split(".")[0] for name in names} | ({"tensorboard"} if "torch.utils.tensorboard" in names else set())
    # pydantic_core is pydantic's, and _typeshed exists for type checkers alone.
    tops = {"pydantic" if name == "pydantic_core" else name for name in tops} - {"_typeshed"}
    return tops - set(sys.stdlib_module_names) - {"megatron_solopo"}


def test_imports_of_the_package_are_its_requirements() -> None:
    module_of = {"megatron-core": "megatron", "pyyaml": "yaml", "flash-linear-attention": "fla"}
    required = {module_of.get(name, name) for name in names(described()["dependencies"])}
    optional = {module_of.get(name, name.replace("-", "_")) for name in names(sum(extras().values(), []))}
    imported = imported_modules()
    assert imported - required - optional == set(), "imported, but not in pyproject.toml"
    assert required - imported == set(), "in pyproject.toml, but not imported"


BARE = """
import importlib.util, sys
optional, find_spec = set(sys.argv.pop(1).split()), importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in optional else find_spec(name, *rest)
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from megatron_solopo.cli import main
sys.exit(main())
"""
BOARDS = {"--wandb-project x": "wandb", "--tensorboard-dir x": "tensorboard"}


@pytest.mark.parametrize("case", ["--help", "train", *BOARDS, "report"])
def test_optional_packages_are_optional(case: str, tmp_path: Path) -> None:
    """Where the required packages alone can be imported a run starts, and what needs another names its extra."""
    optional = {name.replace("-", "_") for name in names(sum(extras().values(), []))} - {"transformers"}
    arguments, status, printed = [case], 0, "usage: solopo COMMAND"
    if case == "report":
        arguments, status = ["report", "--runs", str(tmp_path), "--output", str(tmp_path / "report.md")], 2
        printed = "pip install 'megatron-solopo[report]' [package-missing]"
    elif case != "--help":
        furnish(tmp_path)
        arguments = ["train", *Home(tmp_path).argv("run", "--dry-run", *case.split()[case == "train" :])]
        printed = "# resolved configuration"
        if extra := BOARDS.get(case):
            status, printed = 2, f"error: {case.split()[0]}: the package {extra} is not installed; pip install "
            printed += f"'megatron-solopo[{extra}]' [package-missing]"
    command = [sys.executable, "-c", BARE, " ".join(optional), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == status, done.stdout + done.stderr
    assert printed in done.stdout + done.stderr, done.stdout + done.stderr
