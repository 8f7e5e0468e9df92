"""Progress of long work: what is printed where stderr is no terminal, and when; the clock is the test's."""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Callable

import pytest
import torch

from megatron_solopo import progress
from megatron_solopo.evaluation.generation import _Steps
from megatron_solopo.progress import ProgressBar, reporting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time go by, second by second, as the timer's thread sees it; the thread itself stays out."""
    now = [1000.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    monkeypatch.setattr(progress, "INTERVAL", 28.0)
    monkeypatch.setattr(progress, "_timer", timer := progress._Timer())
    monkeypatch.setattr(timer, "_run", lambda: None)

    def seconds(count: float) -> None:
        for _ in range(round(count)):
            now[0] += 1
            timer.tick()

    return seconds


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_every_interval_with_counts_rate_and_times(wait, capsys) -> None:
    with ProgressBar(desc="sampling", total=1200, initial=200, unit="question") as bar:
        bar.update(50)
        wait(27)
        assert not lines(capsys)
        wait(1)
        assert lines(capsys) == ["sampling: 250/1,200 question (20.8%), 1.8 question/s, elapsed 00:28, remaining 08:52"]
        wait(600)  # no update arrives
        assert len(lines(capsys)) == 600 // 28
        bar.update(950)
    assert lines(capsys) == ["sampling: 1,200/1,200 question (100.0%), 1.6 question/s, elapsed 10:28, remaining 00:00"]


def test_short_work_prints_nothing_and_the_time_runs_on_between_parts(wait, capsys) -> None:
    for number in range(3):
        for _ in ProgressBar(range(5), desc=f"part {number}"):
            wait(2)
    assert lines(capsys) == ["part 2: 3/5 it (60.0%), 2.7 s/it, elapsed 00:08, remaining 00:05"] + [
        "part 2: 5/5 it (100.0%), 2.0 s/it, elapsed 00:10, remaining 00:00"
    ]
    wait(100)  # nobody works
    for _ in ProgressBar(range(5), desc="later"):
        wait(5)
    assert not lines(capsys)


def test_slow_steps_unknown_totals_and_work_without_counts(wait, capsys) -> None:
    stream = ProgressBar(iter("ab"), desc="reading", unit="row")
    for _ in stream:
        wait(15)
    assert lines(capsys) == ["reading: 1 row, 28.0 s/row, elapsed 00:28", "reading: 2 row, 15.0 s/row, elapsed 00:30"]
    with reporting("loading"), ProgressBar(desc="inner", total=0):  # the innermost speaks; an empty total is none
        wait(28)
        assert lines(capsys) == ["inner: elapsed 00:28"]
    assert lines(capsys) == ["inner: elapsed 00:28"]
    with pytest.raises(KeyError), reporting("loading"):
        wait(28)
        raise KeyError
    assert lines(capsys) == ["loading: elapsed 00:28"] * 2
    wait(100)
    assert not lines(capsys)  # what failed reports no more


def test_rank_0_alone_prints(wait, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, count in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for _ in ProgressBar(range(1)):
            wait(28)
        assert len(lines(capsys)) == count


def test_a_terminal_has_tqdms_bar(wait, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(ProgressBar(range(3), desc="contexts", unit="question")) == [0, 1, 2]
    with reporting("loading"):
        wait(100)
    assert "contexts: 100%|" in screen.getvalue() and "question/s]" in screen.getvalue()
    assert "elapsed" not in screen.getvalue() and "loading" not in screen.getvalue()


def test_a_log_that_cannot_be_written_costs_nothing(wait, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    assert list(ProgressBar(range(2))) == [0, 1]
    full = open("/dev/full", "w")  # noqa: SIM115 - its closing would raise what the progress passes over
    for broken in (full, closed := io.TextIOWrapper(io.BytesIO())):
        monkeypatch.setattr(sys, "stderr", broken)
        with ProgressBar(total=1):
            if broken is closed:
                closed.close()
            wait(28)


def _child(pipe, inherited: ProgressBar) -> None:
    with ProgressBar(desc="child", total=1):
        pass
    inherited.close()
    pipe.send(len(progress._timer._bars))


def test_a_forked_process_has_no_bars_and_its_lock_is_free(capfd) -> None:
    with ProgressBar(desc="parent", total=2) as bar:
        bar.reported = True
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(theirs, bar))
        child.start()
        assert ours.poll(60) and ours.recv() == 0
        child.join()
        assert [bar._name for bar in progress._timer._bars] == ["parent"]
        assert not capfd.readouterr().err
    assert capfd.readouterr().err.startswith("parent: 0/2 it")


def test_the_timers_thread_prints_and_ends(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test with the real thread: it is joined, not timed."""
    monkeypatch.setattr(progress, "_timer", timer := progress._Timer())
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress.time, "sleep", lambda seconds: None)
    with ProgressBar(desc="work", total=1):
        thread = timer._thread
        while not timer._bars[0].reported:
            pass
    thread.join(60)
    assert not thread.is_alive() and set(line.split(",")[0] for line in lines(capsys)) == {"work: 0/1 it (0.0%)"}


def test_a_batch_of_generation_counts_its_steps(wait) -> None:
    with ProgressBar(total=100) as bar:
        steps = _Steps(bar, 70, 4)
        counts = []
        for _ in range(3):
            assert not steps(torch.zeros(2, 5), None).any()
            counts.append(bar.n)
        steps.finish()
        assert counts == [17, 35, 52] and bar.n == 70
