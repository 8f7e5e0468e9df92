"""`solopo run`: what runs, what is skipped, what a change or a kill makes of the next run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from refusals import check_refusal
from safetensors.torch import load_file
from tiny_models import write_lines
from training_home import ENVIRONMENT, ROOT, furnish

from megatron_solopo import pipeline
from megatron_solopo.cli import dispatch, run

COPY = """\
import argparse, os, sys
parser = argparse.ArgumentParser()
for name in ("--data", "--output", "--text", "--status"):
    parser.add_argument(name, default="")
options = parser.parse_args()
if options.status:
    sys.exit(f"broken: {options.status}")
read = open(options.data).read() if options.data else ""
open("calls", "a").write(options.text)
if options.output:
    open(options.output, "w").write(read + options.text)
"""


class Folder:
    """A recipe of three copying scripts, a -> b -> c."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = path / "target"
        (path / "copy.py").write_text(COPY)
        (path / "start.txt").write_text("s")
        self.options: dict[str, dict[str, str]] = {
            "a": {"data": "./start.txt", "text": "a", "output": "a.txt"},
            "b": {"data": "a.txt", "text": "b", "output": "b.txt"},
            "c": {"data": "b.txt", "text": "c", "output": "c.txt"},
        }

    def run(self, *flags: str) -> int:
        stages = {name: {"script": "copy.py", "options": options} for name, options in self.options.items()}
        (self.path / "r.yaml").write_text(yaml.safe_dump({"output": "target", "stages": stages}, sort_keys=False))
        (self.target / "calls").unlink(missing_ok=True)
        return run(dispatch, ["run", str(self.path / "r.yaml"), *flags])

    def calls(self, *flags: str) -> str:
        """Runs the recipe; the texts of the stages that ran."""
        assert self.run(*flags) == 0
        calls = self.target / "calls"
        return calls.read_text() if calls.exists() else ""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_finished_stages_are_skipped_and_changed_ones_run_with_later_ones(
    folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert folder.calls() == "abc"
    assert (folder.target / "c.txt").read_text() == "sabc"
    output = capfd.readouterr().out
    assert re.search(r"^\[2/3\] b runs: python \S+/copy.py --data a.txt --text b --output b.txt$", output, re.MULTILINE)
    assert re.search(r"^\[3/3\] c: \d+\.\d s$", output, re.MULTILINE) and "target: all stages are done, in " in output
    assert folder.calls() == ""
    assert len(re.findall(r"^\[\d/3\] \w: done before \(\d+\.\d s\)$", capfd.readouterr().out, re.MULTILINE)) == 3
    folder.options["b"]["text"] = "B"
    assert folder.calls() == "Bc" and (folder.target / "c.txt").read_text() == "saBc"
    (folder.path / "start.txt").write_text("t")
    assert folder.calls() == "aBc" and (folder.target / "c.txt").read_text() == "taBc"
    (folder.target / "b.txt").unlink()
    assert folder.calls() == "B"  # which writes what c read
    (folder.target / "b.txt").write_text("of a person")
    assert folder.calls() == "B" and (folder.target / "c.txt").read_text() == "taBc"
    (folder.path / "copy.py").write_text(COPY + "\n")
    assert folder.calls() == "aBc"
    folder.options = {"a": folder.options["a"], "d": {"text": "d", "output": "d.txt"}} | folder.options
    assert folder.calls() == "dBc"  # a stage before them is new


def test_the_output_of_a_later_stage_is_no_input(folder: Folder) -> None:
    folder.options["c"]["output"] = "b"  # which is the text of the stage before it
    assert [folder.calls(), folder.calls()] == ["abc", ""]


def test_a_stage_that_writes_nothing_runs_each_time(folder: Folder) -> None:
    folder.options["c"] = {"data": "b.txt", "text": "c"}
    assert [folder.calls(), folder.calls()] == ["abc", "c"]


def test_from_and_only(folder: Folder) -> None:
    assert folder.calls() == "abc"
    assert folder.calls("--from", "b") == "bc"
    assert folder.calls("--only", "b") == "b"
    assert folder.calls() == ""  # it wrote what it wrote before
    folder.options["b"]["text"] = "B"
    assert folder.calls("--only", "b") == "B"
    assert folder.calls() == "c"  # what it reads is new


def test_the_time_of_a_small_file_is_no_change(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of the same commit writes scripts and files anew."""
    folder.calls()
    for file in ("copy.py", "start.txt"):
        os.utime(folder.path / file, ns=(1, 1))
    assert folder.calls() == ""
    monkeypatch.setattr(pipeline, "SMALL", 0)  # a large file is not read
    assert folder.calls() == "abc"


def test_a_failing_stage_ends_the_run_and_the_next_run_starts_there(
    folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.options["b"]["status"] = "no reason"
    assert folder.run() == 2
    err = capfd.readouterr().err
    assert err.startswith("broken: no reason\nerror: ") and err.count("\n") == 2
    check_refusal(err, "stage-failed", "[2/3] b", "status 1")
    assert (folder.target / "calls").read_text() == "a"
    del folder.options["b"]["status"]
    assert folder.calls() == "bc"


def test_a_dry_run_touches_nothing_and_lists_what_would_be_deleted(
    folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert folder.run("--dry-run") == 0 and not folder.target.exists()
    output = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in output] == [f"[{n}/3] {name} runs" for n, name in enumerate("abc", 1)]
    folder.calls()
    capfd.readouterr()
    folder.options["b"]["text"] = "B"
    before = {path: path.stat().st_mtime_ns for path in folder.target.rglob("*.*")}
    assert folder.run("--dry-run") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.target.rglob("*.*")} == before
    output = capfd.readouterr().out.splitlines()
    assert output[0] == "[1/3] a done before" and output[1].startswith("[2/3] b runs: python ")
    assert output[2] == "  removes b.txt" and output[3].startswith("[3/3] c runs: ") and len(output) == 5


def test_only_outputs_of_a_stage_are_deleted(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither what was there before, nor what lies outside the output folder."""
    outside = folder.path / "outside.txt"
    folder.target.mkdir()
    (folder.target / "b.txt").mkdir()
    (folder.target / "b.txt" / "mine").write_text("mine")
    folder.options["c"]["output"] = str(outside)
    assert folder.run() == 2 and folder.run() == 2  # it cannot be written, and stays
    assert (folder.target / "b.txt" / "mine").read_text() == "mine"
    folder.options["b"]["output"], folder.options["c"]["data"] = "d.txt", "d.txt"
    assert folder.calls() == "bc" and outside.read_text() == "sabc"
    capfd.readouterr()
    folder.options["c"]["text"] = "C"
    assert folder.calls() == "C" and "removes" not in capfd.readouterr().out
    folder.options["b"]["text"] = "B"
    assert folder.calls() == "BC" and "removes d.txt" in capfd.readouterr().out


def test_two_runs_in_one_folder_are_refused(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_solopo.stage_process import Locks

    folder.calls()
    with Locks(folder.target / ".stages"):
        assert folder.run() == 2
    assert re.search(r"target: another `solopo run` works there; wait for its end", capfd.readouterr().err)
    assert folder.calls() == ""


def start(recipe: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_solopo.cli", "run", str(recipe)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=recipe.parent, env=environment, text=True, **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, "it ended before"
        time.sleep(0.01)


SLEEP = "import sys, time; open(sys.argv[2], 'w').write('part'); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_stage_once_and_is_the_status(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(SLEEP)
    (tmp_path / "r.yaml").write_text("output: o\nstages: {nap: {script: sleep.py, options: {output: part}}}")
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    try:
        process = start(tmp_path / "r.yaml", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, earlier)
    wait_for(lambda: (tmp_path / "o" / "part").exists(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].endswith("[1/1] nap was stopped; run the same command again to resume\n")
    assert process.returncode == 128 + number
    assert not any(child.is_running() for child in children)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From questions to a report with a tiny model; the training takes two processes."""
    folder = furnish(tmp_path_factory.mktemp("home")).folder
    paragraphs = lambda n: [  # noqa: E731
        {"idx": k, "title": f"w{k}", "paragraph_text": f"w{n % 50 + 7 * k % 40} w{k}", "is_supporting": k == 0}
        for k in range(3)
    ]
    question = lambda n: {"id": f"q{n}", "question": f"w{n % 60} w3", "answer": f"w{n % 60}", "answer_aliases": []}  # noqa: E731
    write_lines(folder / "questions.jsonl", [question(n) | {"paragraphs": paragraphs(n)} for n in range(60)])
    (folder / "r.yaml").write_text("""\
output: target
environment: {OMP_NUM_THREADS: "1"}
stages:
  contexts:
    prepare-data:
      data: [./questions.jsonl]
      tokenizer: ./hf
      short_documents: 1
      long_documents: 3
      output: contexts.jsonl
  responses:
    sample-responses:
      {contexts: contexts.jsonl, model: ./hf, samples: 4, max_new_tokens: 16, batch_size: 4, output: responses.jsonl}
  pairs:
    build-pairs: {contexts: contexts.jsonl, responses: gold, output: groups.jsonl}
  solo:
    processes: 2
    train:
      hf_path: ./hf
      train_data: ./groups.jsonl  # to the tiny tokenizer the pairs above are equal
      device: cpu
      seq_length: 128
      train_iters: 12
      global_batch_size: 4
      micro_batch_size: 2
      lr: 1e-3
      save_interval: 2
      save: solo
      save_hf: solo-hf
  accuracy:
    evaluate:
      {model: solo-hf, data: [./questions.jsonl], limit: 4, context_documents: "2,3", max_new_tokens: 4,
       device: cpu, output: accuracy.json}
  curves:
    report: {runs: [Solo=solo], evaluations: [Solo=accuracy.json], output: report.md}
""")
    return folder


def results(target: Path) -> dict[str, object]:
    """What does not hold times."""
    metrics = [json.loads(line) for line in (target / "solo" / "metrics.jsonl").read_text().splitlines()]
    tensors = load_file(target / "solo-hf" / "model.safetensors")
    return {
        "files": [(target / name).read_bytes() for name in ("contexts.jsonl", "responses.jsonl", "groups.jsonl")],
        "loss": [(line["step"], line["loss"]) for line in metrics if line["split"] == "train"],
        "weights": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "accuracy": json.loads((target / "accuracy.json").read_text())["metrics"],
    }


def test_killed_in_sampling_and_in_training_it_ends_as_an_unbroken_run(home: Path) -> None:
    """kill -9 of `solopo run` alone, and the same command at once: its stage must end with it, and not be disturbed."""
    target, unbroken = home / "target", home / "unbroken"
    assert start(home / "r.yaml").wait(timeout=1800) == 0
    target.rename(unbroken)

    sampled = target / "responses.jsonl.partial"
    moments = [
        lambda: sampled.exists() and sampled.read_bytes().count(b"\n") > 8,
        lambda: (
            len(list((target / "solo").glob("iter_*/solopo.json"))) >= 2 or (target / "solo" / "iter_0000004").exists()
        ),
    ]
    for moment in moments:
        process = start(home / "r.yaml")
        wait_for(moment, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = start(home / "r.yaml", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = last.communicate(timeout=1800)
    assert last.returncode == 0, err
    assert [re.search(rf"^\[\d/6\] {name}:? (done before|resumes|runs)", out, re.MULTILINE)[1] for name in (
        "contexts", "responses", "pairs", "solo", "accuracy", "curves")] == [
        "done before", "done before", "done before", "resumes", "runs", "runs"]  # fmt: skip
    assert re.search(r"resuming after step (?!0)\d+ of 12", err)
    assert "removes" not in out
    assert results(target) == results(unbroken)
    assert (
        (target / "report.md").read_text().count("sub-EM") == (unbroken / "report.md").read_text().count("sub-EM") > 0
    )
