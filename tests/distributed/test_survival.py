"""Runs that are killed, stopped and started again; full disks. SOLOPO_KILLS=20 kills 20 times instead of 3."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_runs import ForkedRun
from refusals import LINE, check_refusal
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, preference_groups, write_lines, write_model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_home import ENVIRONMENT, TIMES, Home, command, furnish
from transformers import AutoModelForCausalLM

KILLS = int(os.environ.get("SOLOPO_KILLS", "3"))
LATEST = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def start(home: Home, argv: list[str], processes: int = 1) -> ForkedRun:
    return ForkedRun(argv, processes, home.folder / "stderr.txt")


def finish(home: Home, argv: list[str], processes: int = 1) -> str:
    """Runs to the end; returns the run's standard error."""
    run = start(home, argv, processes)
    assert run.wait() == [0] * processes, run.text()[-3000:]
    return run.text()


def timeless(home: Home, save: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home.folder / save / "metrics.jsonl").read_text().splitlines()]
    of_steps = [line for line in lines if line["split"] in ("train", "valid")]  # a kill may come behind a save's end
    return [{name: value for name, value in line.items() if name not in TIMES} for line in of_steps]


def lines(folder: Path) -> int:
    """Steps in the run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"train"') if path.is_file() else 0


def content(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds: weights, optimizer, schedule, step."""
    dcp_to_torch_save(checkpoint, checkpoint.with_suffix(".pt"))
    return torch.load(checkpoint.with_suffix(".pt"), weights_only=False)


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def wait_for(moment: Callable[[], Any], run: ForkedRun, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert run.alive() and time.monotonic() < deadline, f"the moment did not come\n{run.text()[-3000:]}"
        time.sleep(0.0005)


def reach(kind: str, draw: random.Random, folder: Path, run: ForkedRun) -> None:
    """Waits until a moment to kill has come."""
    if kind == "saving":  # a save takes about as long as the random wait
        seen = set(folder.glob("iter_*.partial-*"))
        wait_for(lambda: set(folder.glob("iter_*.partial-*")) - seen, run)
        time.sleep(draw.uniform(0, 0.06))
    elif kind == "training":
        goal = lines(folder) + draw.randint(3, 5)
        wait_for(lambda: lines(folder) >= goal, run)
        time.sleep(draw.uniform(0, 0.1))
    else:
        time.sleep(draw.uniform(0, 5))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_is_the_unbroken_run(home: Home, processes: int) -> None:
    """Bit for bit: every line of metrics but the times, all that a checkpoint holds, and the exported weights."""
    save, unbroken = f"killed-{processes}", f"unbroken-{processes}"
    flags: list[Any] = ["--train-iters", 6 * KILLS + 10, "--save-interval", 2, "--keep-last", 2]
    flags += ["--valid-data", home.folder / "valid.jsonl", "--eval-interval", 5]
    finish(home, home.argv(unbroken, *flags, "--save-hf", home.folder / f"{unbroken}-hf"), processes)
    argv = home.argv(save, *flags, "--save-hf", home.folder / f"{save}-hf", "--auto-resume")
    draw = random.Random(processes)
    moments = itertools.cycle(["training", "saving", "saving", "starting"])
    for number, kind in zip(range(KILLS), moments, strict=False):
        run = start(home, argv + ["--async-save"] * (number % 2), processes)
        reach(kind, draw, home.folder / save, run)
        run.send(signal.SIGKILL)  # a process that writes in the background lives on
        assert run.wait() == [-signal.SIGKILL] * processes
        latest = home.folder / save / LATEST
        reached = latest.read_text().strip() if latest.is_file() else "none"
        print(f"kill {number + 1} of {KILLS} while {kind}: {lines(latest.parent)} lines, latest checkpoint {reached}")
    assert "resuming after step" in finish(home, argv, processes)
    assert "nothing is left" in finish(home, argv, processes)
    assert timeless(home, save) == timeless(home, unbroken)
    last = f"iter_{6 * KILLS + 10:07d}"
    ours, theirs = (content(home.folder / name / last) for name in (save, unbroken))
    assert same(ours, theirs) and any("exp_avg_sq" in name for name in ours)
    weights = [home.folder / f"{name}-hf" / "model.safetensors" for name in (save, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(list((home.folder / save).glob("iter_???????"))) == 2 and not list(
        (home.folder / save).glob("*.partial*")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_ends_all_at_the_same_step(home: Home, number: signal.Signals) -> None:
    """With status 0, saved; the same command resumes."""
    save = f"signal-{number.name}"
    argv = home.argv(save, "--train-iters", 10000, "--exit-signal-handler", "--auto-resume")
    for _ in range(2):
        run = start(home, argv, 2)
        goal = lines(home.folder / save) + 3
        wait_for(lambda goal=goal: lines(home.folder / save) >= goal, run)
        run.send(number, slice(1, 2))
        assert run.wait() == [0, 0], run.text()
        steps = len(timeless(home, save))
        stopped = rf"stopped by {number.name} after step {steps} of 10000; saved in .*/{save}, (.*) s after the signal"
        notice = re.search(rf"^{stopped}, of which the save took (.*) s$", run.text(), re.M)
        assert notice and 30 > float(notice[1]) >= float(notice[2]) > 0, run.text()
        assert (home.folder / save / LATEST).read_text() == f"{steps}\n"
    assert "resuming after step" in run.text()


def test_what_a_stop_leaves_out_is_made_up_for(home: Home) -> None:
    """After a signal there is time for the save alone; the run that resumes evaluates and exports at that step."""
    flags = [
        "--train-iters",
        12,
        "--eval-interval",
        1,
        "--save-hf-interval",
        1,
        "--valid-data",
        home.folder / "valid.jsonl",
    ]

    def argv(save: str) -> list[str]:
        export = ["--save-hf", home.folder / f"{save}-hf", "--exit-signal-handler", "--auto-resume"]
        return home.argv(save, *flags, *export)

    finish(home, argv("whole"))
    run = start(home, argv("cut"))
    wait_for(lambda: lines(home.folder / "cut") >= 3, run)
    run.send(signal.SIGUSR1)
    assert run.wait() == [0], run.text()
    steps = lines(home.folder / "cut")
    evaluated = [line["step"] for line in home.metrics("cut", "valid")]
    assert 3 <= steps < 12 and evaluated in (list(range(steps)), list(range(steps + 1))), evaluated
    assert "resuming after step" in finish(home, argv("cut"))
    assert timeless(home, "cut") == timeless(home, "whole")
    exports = [{path.name for path in (home.folder / f"{save}-hf").glob("iter_*")} for save in ("cut", "whole")]
    assert exports[0] == exports[1] and len(exports[0]) == 11


def test_a_rank_that_computes_slower_is_named(home: Home) -> None:
    """The system lets it run a fifth of the time, as a busy or throttled machine would."""
    argv = home.argv("slow", "--train-iters", 10000, "--log-interval", 2, "--exit-signal-handler")
    run = start(home, argv, 2)
    wait_for(lambda: lines(home.folder / "slow") >= 2, run)
    deadline = time.monotonic() + 60
    while "straggler" not in run.text() and time.monotonic() < deadline:
        run.send(signal.SIGSTOP, slice(1, 2))
        time.sleep(0.2)
        run.send(signal.SIGCONT, slice(1, 2))
        time.sleep(0.05)
    run.send(signal.SIGTERM)
    assert run.wait() == [0, 0], run.text()
    named = rf"warning: step \d+: straggler: rank 1 on {socket.gethostname()} took [\d.]+ times as long as the median"
    assert re.search(named, run.text()), run.text()
    assert any("straggler" in line.get("warnings", []) for line in home.metrics("slow"))


def test_skipped_steps_before_a_resume_count_on_every_process(home: Home) -> None:
    """Only the first process has the metrics of earlier steps; the tenth skipped step in a row ends all of them."""
    broken = write_model(home.folder / "broken", noise=0.02) / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.embed_tokens.weight"][-1] = float("nan")
    save_file(tensors, broken, metadata={"format": "pt"})
    groups = json.loads(re.sub(rf"\b{WORDS[-1]}\b", "w1", json.dumps(preference_groups(30))))
    for group in groups[2:]:
        group["short_messages"][0]["content"] += f" {WORDS[-1]}"
    write_lines(home.folder / "broken.jsonl", groups)
    flags = ["--preference-loss", "simpo", "--on-nonfinite", "skip", "--no-shuffle", "--global-batch-size", 2]

    def argv(steps: int, *more: Any) -> list[str]:
        options = [*flags, "--train-iters", steps, *more]
        return home.argv("skipped", *options, data="broken.jsonl", hf="broken")

    finish(home, argv(5), 2)
    run = start(home, argv(14, "--auto-resume", "--override-opt-param-scheduler"), 2)
    assert run.wait() == [2, 2]
    assert {refusal[1] for refusal in LINE.findall(run.text())} == {"steps-skipped"}, run.text()
    assert "step 11: the 10th step" in run.text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, "process-lost"), (signal.SIGSTOP, "process-timeout")])
def test_a_lost_process_is_reported_in_one_line(home: Home, number: signal.Signals, code: str) -> None:
    """A killed one closes its connections; a stopped one is noticed when the time of a collective is over."""
    save = f"lost-{number.name}"
    flags = ["--train-iters", 100000, "--save-interval", 2, "--keep-last", 1, "--distributed-timeout-minutes", 0.25]
    run = start(home, home.argv(save, *flags), 2)
    wait_for((home.folder / save / LATEST).is_file, run)
    run.send(number, slice(1, 2))
    run.processes[0].join(120)
    assert run.processes[0].exitcode == 2, run.text()
    run.processes[1].kill()
    message = check_refusal(run.text(), code, "--distributed-timeout-minutes (now 0.25)", "--auto-resume")
    assert re.search(r"checkpoint of step \d+ is complete", message)
    assert "Traceback" not in run.text()


def test_a_death_that_python_does_not_see_is_named_by_torchrun(home: Home) -> None:
    """NCCL's watchdog ends a process with SIGABRT from a separate thread; here the test sends it."""
    save = home.folder / "aborted"
    argv = home.argv("aborted", "--train-iters", 100000, "--save-interval", 2, "--keep-last", 1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launched = subprocess.Popen(
        [*launch, *command(argv)[1:]], cwd=home.folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for((save / LATEST).is_file, SimpleNamespace(alive=lambda: launched.poll() is None, text=lambda: ""))
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        ranks = {
            dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")).get(
                "RANK"
            ): pid
            for pid in children
        }
        os.kill(int(ranks["1"]), signal.SIGABRT)
        _, stderr = launched.communicate(timeout=120)
    finally:
        launched.kill()
    assert launched.returncode == 1
    note = r"exitcode  : -6 .*\n.*\n  traceback : rank 1 was killed by a signal: SIGABRT \(-6\)"
    assert re.search(note, stderr), stderr[-3000:]
    assert f"The same command with --auto-resume resumes from the last checkpoint in {save}" in stderr


def test_a_run_ends_at_its_time_limit(home: Home) -> None:
    stderr = finish(home, home.argv("clock", "--train-iters", 10000, "--exit-duration-in-mins", 0.05))
    assert "stopped by --exit-duration-in-mins after step" in stderr
    latest, steps = home.folder / "clock" / LATEST, len(timeless(home, "clock"))
    # On a machine that starts slowly the time is over before the first step, and there is nothing to save.
    assert latest.read_text().strip() == str(steps) if steps else not latest.exists()


def test_old_checkpoints_are_deleted_and_multiples_kept(home: Home) -> None:
    flags = ["--train-iters", 12, "--save-interval", 2, "--save-hf", home.folder / "kept-hf", "--save-hf-interval", 5]
    stderr = finish(home, home.argv("kept", *flags, "--keep-last", 2, "--save-retain-interval", 4))
    assert sorted(path.name for path in (home.folder / "kept").glob("iter_*")) == [
        f"iter_{number:07d}" for number in (4, 8, 10, 12)
    ]
    for name in ("", "iter_0000005", "iter_0000010"):
        assert AutoModelForCausalLM.from_pretrained(home.folder / "kept-hf" / name).num_parameters() > 0
    assert not list((home.folder / "kept-hf").glob("*.partial")) and "Hugging Face folder: " in stderr


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
def test_a_save_that_does_not_fit_keeps_the_previous_checkpoint(home: Home, flags: list[str]) -> None:
    """A real disk of 800 KiB: the first checkpoint fits, the second does not."""
    disk = home.folder / "disk"
    disk.mkdir(exist_ok=True)
    argv = home.argv(
        "disk/run", "--train-iters", 6, "--save-interval", 2, "--objective", "sft", *flags, data="chats.jsonl"
    )
    script = (
        f"mount -t tmpfs -o size=800k tmpfs {disk} || exit 77\n{shlex.join(command(argv))}\nstatus=$?\n"
        f"cat {disk}/run/{LATEST}; grep -c train {disk}/run/metrics.jsonl; ls {disk}/run; exit $status"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("this machine lets no user mount a tmpfs")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    named = ["/disk/run (No space left on device; ", " MiB free there)", "iteration 2"]
    check_refusal(done.stderr, "checkpoint-not-saved", "checkpoint of step 6 ", *named)
    (warning,) = re.findall(r"^warning: (the checkpoint of step .*)$", done.stderr, re.M)
    assert all(part in warning for part in ("checkpoint of step 4 ", *named)), done.stderr
    assert done.stdout.split()[:2] == ["2", "6"] and "partial" not in done.stdout
