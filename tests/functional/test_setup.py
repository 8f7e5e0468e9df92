"""Setting up, as a user meets it: which Python is taken, what .venv gets, what the package asks for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "basename bash cat cut df dirname find flock head ls mkdir mv rm sed sha256sum tail timeout uname".split()

OLD = "import platform, sys; sys.version_info = (3, 11, 2); platform.python_version = lambda: '3.11.2'"
NO_VENV = "import sys; sys.modules['ensurepip'] = None"
BROKEN = None


# ---------------------------------------------------------------------------------------------------- finding Python


class Machine:
    """A machine made of a PATH and a home folder, where only the Pythons put there exist."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.root = folder / "checkout"
        for made in (self.bin, self.home, self.root / "tools"):
            made.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE"):
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
                    f'exec "{sys.executable}" "$@"' if installs else '[ "$*" = "-m pip --version" ]',
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

    def found(self, **environment: str) -> str:
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
    assert machine.found() == str(good)


def test_a_newer_default_python3_is_enough(machine: Machine) -> None:
    good = machine.add_python(machine.bin / "python3")
    assert machine.found() == str(good)


def test_uv_is_asked_for_the_pythons_it_manages(machine: Machine) -> None:
    good = machine.add_python(machine.home / "managed/python3")
    uv = machine.bin / "uv"
    uv.write_text(f'#!{machine.bin}/bash\n[ "$1 $2" = "python find" ] && echo {good}\n')
    uv.chmod(0o755)
    machine.add_python(machine.bin / "python3", OLD)
    assert machine.found() == str(good)


def test_uv_installs_one_when_there_is_none(machine: Machine) -> None:
    good = machine.add_python(machine.home / "managed/python3", installs=False)
    uv = machine.bin / "uv"
    uv.write_text(
        f'#!{machine.bin}/bash\n[ "$1 $2" = "python install" ] && echo installed >{machine.home}/done\n'
        f'[ "$1 $2" = "python find" ] && [ -f {machine.home}/done ] && echo {good}\nexit 0\n'
    )
    uv.chmod(0o755)
    done = machine.bootstrap()
    assert f"({good})" in done.stdout
    assert f"{good} could not make the environment" in done.stderr


def test_PYTHON_is_obeyed_or_refused(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3")
    chosen = machine.add_python(machine.home / "elsewhere/python")
    assert machine.found(PYTHON=str(chosen)) == str(chosen)
    old = machine.add_python(machine.home / "old/python", OLD)
    for value, message in ((str(old), "is Python 3.11.2"), ("/nowhere/python", "no such command")):
        done = machine.bootstrap("--find-python", PYTHON=value)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_without_a_usable_python_it_says_what_it_looked_at_and_what_to_do(machine: Machine) -> None:
    machine.add_python(machine.bin / "python3.12", BROKEN)
    machine.add_python(machine.bin / "python3.13", NO_VENV)
    machine.add_python(machine.bin / "python3", OLD)
    done = machine.bootstrap("--find-python")
    assert done.returncode == 1
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for line in (
        f"{machine.bin}/python3.12 does not run",
        f"{machine.bin}/python3 is Python 3.11.2",
        "without the venv and ensurepip modules",
        f"apt install python{version}-venv",
        "uv python install",
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
    made_anew = ("METADATA", "WHEEL", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    kept = [path for path in parts if path.locate().is_file() and path.name not in made_anew]
    files = {str(path): path.locate().read_bytes() for path in kept}
    write_wheel(folder, name, distribution.version, files)


def pins() -> dict[str, str]:
    """Normalised name -> version, from constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, lines)}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def description() -> setuptools.Distribution:
    """What setup.py describes."""
    from distutils.core import run_setup  # setuptools provides it

    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return run_setup("setup.py", stop_after="init")
    finally:
        os.chdir(before)


def test_set_up_installs_once_mends_itself_and_moves(machine: Machine, tmp_path: Path) -> None:
    """The real script, pip and venv; the packages are small stand-ins of the pinned versions: nothing is downloaded."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pip", "setuptools"):
        if metadata.version(name) != pins()[name]:
            pytest.skip(f"this Python has {name} {metadata.version(name)}, constraints.txt has {pins()[name]}")
        pack_installed(wheels, name)
    contents = {"torch": "torch", "megatron-core": "megatron/core", "transformers": "transformers"}
    asked = description()
    for requirement in map(Requirement, [*asked.install_requires, *asked.extras_require["test"]]):
        name = canonicalize_name(requirement.name)
        folder = contents.get(name, name.replace("-", "_"))
        write_wheel(wheels, requirement.name, pins()[name], {f"{folder}/__init__.py": b""})
    python = machine.add_python(machine.bin / "python3.12")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}

    first = machine.bootstrap(**offline)
    assert first.returncode == 0, first.stdout + first.stderr
    assert str(python) in first.stdout and re.search(r"download +\d+\.\d GiB .* GiB on disk", first.stdout)
    assert (machine.root / ".venv/bin/solopo").is_file()

    second = machine.bootstrap(PIP_NO_INDEX="1")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")

    # The checkout is moved, a pin changes, and a package was cut off half-way: all three are mended in one call.
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    (site,) = machine.root.glob(".venv/lib/python3.*/site-packages")
    (info,) = site.glob("torch-*.dist-info")
    (info / "RECORD").unlink()
    (site / "torch/__init__.py").unlink()
    write_wheel(wheels, "tqdm", "99.0", {"tqdm/__init__.py": b""})
    constraints = machine.root / "constraints.txt"
    constraints.write_text(re.sub(r"(?m)^tqdm==.*", "tqdm==99.0", constraints.read_text()))
    third = machine.bootstrap(**offline)
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"torch-{pins()['torch']} was half installed" in third.stdout
    assert (site / "torch/__init__.py").is_file() and (info / "RECORD").is_file()
    assert (site / "tqdm-99.0.dist-info").is_dir()
    assert (machine.root / ".venv/bin/solopo").read_text().startswith(f"#!{machine.root}/.venv/bin/python")
    assert f"{machine.root}/.venv" in (machine.root / ".venv/bin/activate").read_text()


def test_a_disk_that_is_too_small_is_named_before_anything_is_downloaded(machine: Machine) -> None:
    machine.add_python(machine.root / ".venv/bin/python", installs=False)
    df = machine.bin / "df"
    df.unlink()
    df.write_text(
        f"#!{machine.bin}/bash\necho Filesystem Blocks Used Available Capacity On\necho /dev/x 9 9 51200 9% /\n"
    )
    df.chmod(0o755)
    done = machine.bootstrap(PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert re.search(r"error: .*: 0\.0 GiB free on this disk, \d+\.\d GiB needed", done.stderr), done.stderr


def test_an_environment_of_an_older_python_is_refused_and_kept(machine: Machine) -> None:
    kept = machine.add_python(machine.root / ".venv/bin/python", OLD, installs=False)
    done = machine.bootstrap()
    assert done.returncode == 1 and "was made with Python 3.11" in done.stderr and "rm -r .venv" in done.stderr
    assert kept.is_file()


# ------------------------------------------------------------------------------------------------- what is described


def test_requirements_are_ranges_that_the_pins_satisfy() -> None:
    described = description()
    pinned = pins()
    for requirement in map(Requirement, [*described.install_requires, *sum(described.extras_require.values(), [])]):
        operators = {specifier.operator for specifier in requirement.specifier}
        upper_bound_allowed = requirement.name == "megatron-core"
        assert operators == ({">=", "<"} if upper_bound_allowed else {">="}), requirement
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is pinned"


def test_every_folder_with_modules_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_solopo").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(description().packages)


def imported_modules() -> set[str]:
    """Top-level names that the package imports, its own and the standard library's left out."""
    names: set[str] = set()
    for path in (ROOT / "megatron_solopo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    # torch.utils.tensorboard is a door to the tensorboard package.
    tops = {name.split(".")[0] for name in names} | ({"tensorboard"} if "torch.utils.tensorboard" in names else set())
    return tops - set(sys.stdlib_module_names) - {"megatron_solopo"}


def test_what_the_package_imports_is_what_it_asks_for() -> None:
    module_of = {"megatron-core": "megatron", "pyyaml": "yaml"}
    described = description()
    required = {module_of.get(name, name) for name in names(described.install_requires)}
    optional = {name.replace("-", "_") for name in names(sum(described.extras_require.values(), []))}
    imported = imported_modules()
    assert imported - required - optional == set(), "imported, but not in setup.py"
    assert required - imported == set(), "in setup.py, but not imported"
