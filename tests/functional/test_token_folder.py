"""Training from a folder of token ids: the same run as from the file, and a command that survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from refusals import check_refusal
from training_home import ENVIRONMENT, ROOT, TIMES, Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.data.tokenized import tokenize_data
from megatron_solopo.data.tokenized.token_store import DATA
from megatron_solopo.data.tokenized.token_table import TokenTable
from megatron_solopo.training.run import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    for name, more in (("groups", ()), ("valid", ()), ("chats", ("--objective", "sft"))):
        argv = ["--data", home.folder / f"{name}.jsonl", "--output", home.folder / name]
        argv += ["--tokenizer", home.folder / "hf", "--workers", 1, *more]
        assert run(tokenize_data.main, list(map(str, argv))) == 0
    return home


def lines(home: Home, save: str) -> list[dict]:
    lines = [json.loads(line) for line in (home.folder / save / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_folder_trains_as_its_file_does(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--reference-cache", home.folder / "cache", "--seq-length", 64, "--overlong", "drop"]
    assert run(main, home.argv("file", "--valid-data", home.folder / "valid.jsonl", *flags)) == 0
    first = capfd.readouterr().err
    assert "reference log-probs of" in first and "train: dropped" in first
    assert run(main, home.argv("folder", "--valid-data", home.folder / "valid", *flags, data="groups")) == 0
    second = capfd.readouterr().err
    assert "reference log-probs of" not in second and "train: dropped" in second  # one cache serves both
    assert lines(home, "folder") == lines(home, "file")
    listed = [(home.folder / save / "overlong.jsonl").read_text() for save in ("file", "folder")]
    assert listed[0] == listed[1] and '"split": "train"' in listed[0]


def test_one_folder_serves_other_methods_and_sft_needs_another(home: Home) -> None:
    for name, flags in (
        ("groups", ("--preference-loss", "simpo", "--context-mode", "long")),
        ("chats", ("--objective", "sft")),
    ):
        assert run(main, home.argv(f"file-{name}", *flags, data=f"{name}.jsonl")) == 0
        assert run(main, home.argv(f"folder-{name}", *flags, data=name)) == 0
        assert lines(home, f"folder-{name}") == lines(home, f"file-{name}")


def test_a_folder_of_another_template_is_refused(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    template = home.folder / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} <end> {% endfor %}")
    assert run(main, home.argv("refused", "--chat-template", template, data="groups")) == 2
    check_refusal(capfd.readouterr().err, "token-store-mismatch", "groups: ", "another chat template;")
    assert run(main, home.argv("refused", "--eos-token", "<user>", data="groups")) == 2
    named = "groups: ", "end of turn '<end>' where the run has '<user>'"
    check_refusal(capfd.readouterr().err, "token-store-mismatch", *named)
    assert run(main, home.argv("cut", "--objective", "sft", "--overlong", "cut", data="chats")) == 2
    check_refusal(capfd.readouterr().err, "option-conflict", "--overlong cut with --objective sft: ")


def test_workers_end_with_a_killed_command_and_the_next_resumes(home: Home) -> None:
    """kill -9 of the first process alone; its workers must not stay behind."""
    code = (
        "import sys, time; from megatron_solopo.data.files import records; "
        "from megatron_solopo.data.tokenized import make_store, tokenize_data; "
        "records.PART_BYTES = 500; "
        "check_ids = make_store._check_ids; "
        "make_store._check_ids = lambda *a: (time.sleep(0.3), check_ids(*a))[1];  "
        "sys.exit(tokenize_data.main(sys.argv[1:]))"
    )
    output = home.folder / "killed"
    argv = [sys.executable, "-c", code, "--data", str(home.folder / "groups.jsonl"), "--output", str(output)]
    argv += ["--tokenizer", str(home.folder / "hf"), "--workers", "2"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = Path(f"{output}.partial", "jobs.jsonl")
    deadline = time.monotonic() + 200
    while (not log.exists() or log.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(family) >= 3 and not output.exists()  # the fork server, a resource tracker, two workers
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "parts were done before" in done.stdout, done.stderr
    # The same rows; smaller parts are other batches of them.
    rows = [TokenTable(folder / DATA, "preference").rows for folder in (output, home.folder / "groups")]
    assert rows[0].equals(rows[1]) and rows[0]["id"].num_chunks > rows[1]["id"].num_chunks
