"""The cache of reference log-probs: resumable, checked when it is read, and patient with a slow process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import check_refusal
from safetensors.torch import load_file
from training_home import ENVIRONMENT, ROOT, Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    assert run(main, home.argv("first/run")) == 0
    return home


def cache(home: Home) -> Path:
    [path] = (home.folder / "first" / "reference").glob("*.safetensors")
    return path


def again(home: Home, name: str) -> int:
    """The same run with another cache folder."""
    return run(main, home.argv(f"{name}/run", "--train-iters", 1, "--reference-cache", home.folder / name))


def test_a_killed_fill_computes_no_example_twice(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_solopo.training.reference import PARTIAL, _write

    complete = load_file(cache(home))["log_probs"]
    done = torch.zeros(10, dtype=torch.bool)
    done[torch.tensor([0, 3, 4, 8])] = True
    folder = home.folder / "killed"
    # What two processes of the killed run left; a wrong number shows whether it is used.
    marked = complete.clone()
    marked.reshape(10, 3)[3] += 1000
    _write(folder / f"{cache(home).stem}.0{PARTIAL}", marked, done)
    _write(folder / f"{cache(home).stem}.1{PARTIAL}", complete, ~done & (torch.arange(10) < 3))
    assert again(home, "killed") == 0
    assert "reference log-probs of 10 examples, 6 of them computed before" in capfd.readouterr().err
    actual = load_file(folder / cache(home).name)["log_probs"].reshape(10, 3)
    marked, complete = marked.reshape(10, 3), complete.reshape(10, 3)
    assert torch.equal(actual[[0, 3, 4, 8]], marked[[0, 3, 4, 8]])
    torch.testing.assert_close(actual[[1, 2, 5, 6, 7, 9]], complete[[1, 2, 5, 6, 7, 9]], rtol=0, atol=1e-4)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [cache(home).name]


def test_a_damaged_cache_is_computed_again(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    folder = home.folder / "damaged"
    folder.mkdir()
    data = bytearray(cache(home).read_bytes())
    data[-20] ^= 1  # one bit of a number
    (folder / cache(home).name).write_bytes(data)
    assert again(home, "damaged") == 0
    assert "reference log-probs of 10 examples\n" in capfd.readouterr().err
    actual = load_file(folder / cache(home).name)["log_probs"]
    torch.testing.assert_close(actual, load_file(cache(home))["log_probs"], rtol=0, atol=1e-4)


def test_a_cache_of_another_model_is_refused_by_name(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_solopo.training.reference import _write

    complete = load_file(cache(home))
    _write(home.folder / "foreign" / cache(home).name, complete["log_probs"] + 0.5, complete["done"])
    assert again(home, "foreign") == 2
    check_refusal(capfd.readouterr().err, "reference-cache-mismatch", cache(home).name, "example 'g0'")
    assert not list((home.folder / "foreign" / "run").glob("iter_*"))


def test_two_runs_that_fill_one_cache_do_not_stop_each_other(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other one writes the same file while this one does, and deletes the partial files of this one."""
    from megatron_solopo.training import reference

    serialize, written = reference.serialize, []

    def beside_another(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        written.append(tensors)
        if len(written) == 1:
            assert reference._write(home.folder / "both" / cache(home).name, *tensors.values()) is None
        return serialize(tensors, metadata=metadata)

    monkeypatch.setattr(reference, "serialize", beside_another)
    monkeypatch.setattr(reference, "_partial_files", lambda path: [path.with_name(f"{path.stem}.7{reference.PARTIAL}")])
    assert again(home, "both") == 0
    assert len(written) == 2 and "warning" not in capfd.readouterr().err
    assert [path.name for path in (home.folder / "both").glob("*safetensors*")] == [cache(home).name]


def test_a_cache_that_cannot_be_written_is_a_warning(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--train-iters", 1, "--reference-cache", home.folder / "groups.jsonl" / "cache"]
    assert run(main, home.argv("below-a-file/run", *flags)) == 0
    assert re.search(
        r"^warning: \S+ cannot be written \(Not a directory\); the run continues, ", capfd.readouterr().err, re.M
    )


SLOW = """
import sys, time
from datetime import timedelta

from megatron_solopo.config_load import load
from megatron_solopo.parallel import platform

config, _ = load(sys.argv[1:])
here = platform.start("cpu", 5)  # processes may take long to start; the short limit comes behind
platform.wait_for_all("start")

from megatron_solopo.training import engine, preflight, reference

compute = reference.local_segment_sums

def slow(*arguments):
    time.sleep(15 if platform.dist.get_rank() == 1 else 0)
    return compute(*arguments)

reference.local_segment_sums = slow
inputs = preflight.check_run_inputs(config)
platform.wait_for_all("data")
engine.initialize_parallel(config)
built = engine.build_engine(here, inputs.hf_config, config)
platform.wait_for_all("engine")
dist = platform.dist
dist.distributed_c10d._set_pg_timeout(timedelta(minutes=config.parallel.distributed_timeout_minutes), dist.group.WORLD)
weights = reference.starting_weights(config)
reference.reference_log_probs(built, inputs.data.reference["train"], config, weights)
platform.stop(here)
"""


def test_a_slow_process_delays_the_others_and_never_times_them_out(home: Home, tmp_path: Path) -> None:
    """A collective would time out after 9 seconds here."""
    (tmp_path / "slow.py").write_text(SLOW)
    argv = home.argv(
        "slow/run", "--train-iters", 1, "--global-batch-size", 10, "--distributed-timeout-minutes", 0.15,
        "--reference-cache", home.folder / "slow",
    )  # fmt: skip
    done = subprocess.run(
        [*TWO, str(tmp_path / "slow.py"), *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    actual = load_file(home.folder / "slow" / cache(home).name)["log_probs"]
    torch.testing.assert_close(actual, load_file(cache(home))["log_probs"], rtol=0, atol=1e-4)


SIGNALLED = """
import os, signal, sys
from megatron_solopo.cli import run
from megatron_solopo.training import reference, run as training

compute, calls = reference.local_segment_sums, []

def with_signal(*arguments):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return compute(*arguments)

reference.local_segment_sums = with_signal
sys.exit(run(training.main))
"""


def test_a_signal_while_the_reference_is_computed_keeps_what_is_done(home: Home, tmp_path: Path) -> None:
    """It reaches one process in its second of five batches; both end with 0, and the next start resumes from there."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    flags = ["--train-iters", 2, "--global-batch-size", 2, "--exit-signal-handler", "--auto-resume"]
    argv = home.argv("signalled/run", *flags, "--reference-cache", home.folder / "signalled")
    done = subprocess.run(
        [*TWO, str(tmp_path / "signalled.py"), *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stopped by SIGUSR1 before the first step; the reference log-probs so far are saved\n" in done.stderr
    assert not list((home.folder / "signalled" / "run").glob("iter_*"))
    again = subprocess.run(
        [*TWO, str(ROOT / "pretrain_solopo.py"), *argv], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-4000:]
    assert re.search(r"reference log-probs of 10 examples, [2-9] of them computed before", again.stderr)
    actual = load_file(home.folder / "signalled" / cache(home).name)["log_probs"]
    torch.testing.assert_close(actual, load_file(cache(home))["log_probs"], rtol=0, atol=1e-4)
