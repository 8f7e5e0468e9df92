"""The `solopo` command, its twins in tools/, and `solopo env`."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from refusals import check_refusal

from megatron_solopo import __version__, cli, environment
from megatron_solopo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def solopo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_solopo.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = "import sys; from megatron_solopo.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("module", ["run", "convert", "verify"])
def test_a_command_imports_megatron_core_only_behind_the_start_of_its_platform(module: str) -> None:
    """megatron-core takes Transformer Engine where it finds it, and the CPU platform hides it at its start."""
    code = f"import sys, megatron_solopo.training.{module}; print('megatron.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("module", ["building.second_pass", "tokenized.make_store"])
def test_worker_processes_import_no_model_and_no_auto_tokenizer(module: str) -> None:
    """The fork server of a command's workers imports this module; torch._dynamo takes as long as torch itself."""
    heavy = {"torch._dynamo", "transformers.modeling_utils", "bm25s", "datasets", "megatron.core"}
    code = f"import sys, megatron_solopo.data.{module}; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_megatron_core_and_torch_do_not_warn_at_the_start_of_a_command() -> None:
    code = (
        "import sys; from megatron_solopo.cli import run\n"
        "def start(argv):\n    from megatron_solopo.training import trainer\n    return 0\n"
        "sys.exit(run(start))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "meant"), [("evalaute", "evaluate"), ("build_pairs", "build-pairs"), ("sample", "sample-responses")]
)
def test_an_unknown_command_is_refused_with_the_nearest_name(name: str, meant: str) -> None:
    done = solopo(name)
    assert done.returncode == 2 and done.stdout == ""
    check_refusal(done.stderr, "command-unknown", f"solopo {name}: ", f"'{meant}'?")


def test_version() -> None:
    assert solopo("--version").stdout == f"solopo {__version__}\n"


def test_every_command_has_its_module() -> None:
    missing = [module for module, _ in cli.COMMANDS.values() if importlib.util.find_spec(module) is None]
    assert missing == []


def test_a_command_names_itself_in_its_usage() -> None:
    done = solopo("env", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: solopo env ")


def test_tools_call_the_functions_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "tools").glob("*.py"):
        if "run_tool" not in path.read_text(encoding="utf-8"):
            continue  # a tool of the repository, not a command
        name = path.stem.replace("_", "-")
        monkeypatch.setattr(sys, "argv", [str(path), "--some", "option"])
        called: list[list[str]] = []
        command = types.SimpleNamespace(main=lambda argv, called=called: called.append(argv) or 3)
        monkeypatch.setitem(sys.modules, cli.COMMANDS[name][0], command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert (called, ended.value.code) == ([["--some", "option"]], 3), name
        monkeypatch.undo()


def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(argv: list[str] | None) -> int:
        raise UserError("option-value", "--alpha -1: must be positive")

    def interrupt(argv: list[str] | None) -> int:
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    assert cli.run(refuse, []) == 2
    assert capsys.readouterr().err == "error: --alpha -1: must be positive [option-value]\n"
    monkeypatch.setenv("RANK", "3")
    assert cli.run(refuse, []) == 2
    place = f"rank 3 on {socket.gethostname()}"
    assert capsys.readouterr().err == f"error: {place}: --alpha -1: must be positive [option-value]\n"
    assert cli.run(interrupt, []) == 130
    assert cli.run(lambda argv: 0, []) == 0


def test_env_as_json_and_as_text() -> None:
    done = solopo("env", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"] and facts["packages"]["megatron-core"]
    assert facts["device"] == ("cuda" if facts["cuda"]["found"] else "cpu")
    assert facts["cores"] > 0 and 0 < facts["memory_gib"]["available"] <= facts["memory_gib"]["total"]
    text = environment.describe(facts)
    assert f"device              {facts['device']} " in text and "NVIDIA Apex" in text


def test_env_distinguishes_nvidia_apex_from_its_namesake_on_pypi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrelated = tmp_path / "unrelated" / "apex"
    unrelated.mkdir(parents=True)
    (unrelated / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    nvidia = tmp_path / "nvidia" / "apex" / "multi_tensor_apply"
    nvidia.mkdir(parents=True)
    (nvidia.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "unrelated"))
    assert environment.nvidia_apex()["found"] is False
    assert "unrelated" in environment.nvidia_apex()["note"]
    monkeypatch.syspath_prepend(str(tmp_path / "nvidia"))
    assert environment.nvidia_apex()["found"] is True
