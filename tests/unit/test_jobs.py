"""The jobs file: what a kill costs, what is refused, and what stays of work on which nothing is finished."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from refusals import refused

from megatron_solopo.data.files.jobs import LOG, Jobs

STREAMS = ("a.bin", "deep/b.bin")


def work(place: Path, jobs: int, settings: dict[str, object] | None = None) -> None:
    """Finishes so many jobs, and leaves as a kill does."""
    with Jobs(place, STREAMS) as opened:
        opened.begin(settings or {"seed": 0})
        for number in range(jobs):
            opened.add(number, {"n": number}, {"a.bin": b"a%d" % number, "deep/b.bin": b"b" * number})


CUTS = {
    "half a line": (lambda log: log.write_bytes(log.read_bytes()[:-9]), [0, 1]),
    "half of the first line": (lambda log: log.write_bytes(log.read_bytes()[:9]), []),
    "a stream longer than its last job": (lambda log: (log.parent / "a.bin").write_bytes(b"a0a1a2half"), [0, 1, 2]),
    "a stream that a power failure emptied": (lambda log: (log.parent / "deep/b.bin").write_bytes(b""), [0]),
    "a stream that is gone": (lambda log: (log.parent / "a.bin").unlink(), []),
    "zeros at the end": (lambda log: log.write_bytes(log.read_bytes() + bytes(50)), [0, 1, 2]),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_kill_loses_only_jobs_in_flight(tmp_path: Path, case: str) -> None:
    cut, kept = CUTS[case]
    work(tmp_path, 3)
    cut(tmp_path / LOG)
    with Jobs(tmp_path, STREAMS) as jobs:
        jobs.begin({"seed": 0})
        assert [job["job"] for job in jobs.finished()] == kept == list(jobs.lines)
        assert all(jobs.read(start)["n"] == name for name, start in jobs.lines.items())
        for number in range(len(kept), 4):
            jobs.add(number, {"n": number}, {"a.bin": b"a%d" % number, "deep/b.bin": b"b" * number})
        jobs.put({"a.bin": tmp_path / "out" / "a"})
        assert (tmp_path / "out" / "a").read_bytes() == b"a0a1a2a3"
        assert jobs.stream("deep/b.bin").read_bytes() == b"bbbbbb"
    with Jobs(tmp_path, STREAMS) as jobs:  # a kill before the work is removed costs no job
        jobs.begin({"seed": 0})
        assert len(jobs.lines) == 4


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    work(tmp_path, 1, {"seed": 0, "tokenizer": {"file": "x"}})
    with (
        refused("unfinished-other-settings", f"{tmp_path}: ", "tokenizer.file = 'x', now 'y'"),
        Jobs(tmp_path, STREAMS) as jobs,
    ):
        jobs.begin({"seed": 0, "tokenizer": {"file": "y"}})
    with Jobs(tmp_path, STREAMS) as jobs:  # a preparation alone binds nobody
        assert jobs.settings["seed"] == 0
        jobs.begin({"seed": 1}, preparation=(0,))
        assert jobs.empty and not jobs.stream("a.bin").read_bytes()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    place = tmp_path / "a.partial"
    with Jobs(place) as jobs:
        jobs.begin({})
        jobs.add("x", {})
        before = place.read_bytes()
        with refused("output-in-use", f"{place}: "):
            Jobs(place)
    assert place.read_bytes() == before


@pytest.mark.parametrize("streams", [None, STREAMS])
def test_work_without_a_finished_job_leaves_nothing(tmp_path: Path, streams: tuple[str, ...] | None) -> None:
    with pytest.raises(KeyboardInterrupt), Jobs(tmp_path / "deep" / "w", streams) as jobs:
        jobs.begin({"seed": 0})
        raise KeyboardInterrupt
    assert not (tmp_path / "deep" / "w").exists()


def test_a_full_disk_loses_only_the_job_of_that_write(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Jobs(tmp_path, STREAMS) as jobs:
        jobs.begin({})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with refused("write-failed", f"{tmp_path}: File too large"):
                jobs.add(0, {}, {"a.bin": b"a" * 600, "deep/b.bin": b"b" * 1200})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jobs.add(1, {}, {"a.bin": b"c"})
    assert (tmp_path / "a.bin").read_bytes() == b"c" and not (tmp_path / "deep/b.bin").read_bytes()


@pytest.mark.parametrize(
    ("line", "code"),
    [("nonsense", "not-json"), (json.dumps({"first": 0, "id": "q0"}), "unfinished-other-version")],
)
def test_a_damaged_line_loses_nothing_behind_it(tmp_path: Path, line: str, code: str) -> None:
    place = tmp_path / "w"
    text = json.dumps({"settings": {}}) + f"\n{line}\n" + json.dumps({"job": 1}) + "\n"
    place.write_text(text)
    with refused(code, f"{place}:2: "):
        Jobs(place)
    assert place.read_text() == text
