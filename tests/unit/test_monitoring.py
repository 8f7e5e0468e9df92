"""What a run warns about, from its metrics alone."""

from __future__ import annotations

import pytest
from refusals import refused

from megatron_solopo.config import MethodConfig
from megatron_solopo.training.monitoring import (
    CLIPPED,
    DISPLACEMENT,
    MOST_SKIPPED,
    SHORT_SIDE,
    SPIKE,
    SPIKE_WINDOW,
    STRAGGLER,
    WAITS,
    WINDOW,
    Watch,
    length_bias,
    no_transfer,
)


def line(step, **values):
    usual = {"loss": 1.0, "grad_norm": 2.0, "logp_chosen": -20.0, "margin": 0.5}
    return {"step": step, "split": "train"} | usual | values


def warned(watch, lines):
    """Step -> names of its new warnings."""
    return {each["step"]: sorted(new) for each in lines if (new := watch.read(each))}


def test_a_quiet_run_is_not_warned_about():
    quiet = [line(n, loss=1 / n, margin=n / 100, logp_chosen=-20 - n / 1000) for n in range(1, 200)]
    assert warned(Watch(10), quiet) == {}
    noisy = [line(n, grad_norm=0.1 if n % 4 == 0 else 2.0) for n in range(1, 200)]  # 20 times the step before, often
    assert warned(Watch(10), noisy) == {}


def test_a_spike_is_reported_once_and_becomes_usual_if_it_stays():
    lines = [line(n, grad_norm=30.0 if n == 50 or n > 90 else 2.0) for n in range(1, 91 + SPIKE_WINDOW)]
    assert warned(Watch(10), lines) == {50: [SPIKE], 91: [SPIKE]}
    assert warned(Watch(0), lines) == {} and warned(Watch(20), lines) == {}
    assert "grad norm 30 (median 2)" in Watch_after(lines[:49]).read(lines[49])[SPIKE]


def Watch_after(lines):
    watch = Watch(10)
    watch.replay(lines)
    return watch


def test_a_first_step_is_no_spike():
    assert warned(Watch(2), [line(n, grad_norm=100.0 / n) for n in range(1, WINDOW)]) == {}


def test_chosen_answers_that_fall_while_margins_grow():
    lines = [line(n, logp_chosen=-20 - n / 10, margin=n / 50) for n in range(1, 101)]
    # Means over 20 steps: the fall reaches 10 % of the first mean of -21.05 a little after 2.1 nats are lost.
    assert warned(Watch(10), lines) == {42: [DISPLACEMENT]}
    both = [line(n, logp_chosen=-20 - n / 10, margin=1 - n / 500) for n in range(1, 101)]
    assert warned(Watch(10), both) == {}  # the margin falls too: that is no displacement


def test_steps_that_are_all_clipped_are_reported_once():
    def clipped(n, yes=True):
        return line(n, grad_norm=3.0 if yes else 0.5, clip_grad=1.0, clipped=yes)

    always = [clipped(n) for n in range(1, 101)]
    assert warned(Watch(10), always) == {WINDOW: [CLIPPED]}
    text = Watch_after(always[: WINDOW - 1]).read(always[WINDOW - 1])[CLIPPED]
    assert f"last {WINDOW} steps was clipped to --clip-grad 1 (gradient norm 3 to 3)" in text
    often = [clipped(n, n % WINDOW > 0) for n in range(1, 101)]
    assert warned(Watch(10), often) == {}
    assert warned(Watch(10), [line(n) for n in range(1, 101)]) == {}  # clipping is off, or an older run
    later = [clipped(n, n > 10) for n in range(1, 101)]
    assert warned(Watch(10), later) == {10 + WINDOW: [CLIPPED]}


@pytest.mark.parametrize(
    ("clipped", "reported"), [([1] * 5, True), ([1, 1, 0, 1], False), ([1] * 100, False), ([], False)]
)
def test_a_short_run_whose_steps_are_all_clipped_is_reported_at_its_end(clipped, reported):
    lines = [line(n, clip_grad=1.0, clipped=bool(yes)) for n, yes in enumerate(clipped, 1)]
    for cut in (0, len(lines) // 2):
        watch = Watch_after(lines[:cut])
        for each in lines[cut:]:
            watch.read(each)
        assert (watch.all_clipped() is not None) == reported


@pytest.mark.parametrize(
    ("loss", "settings", "warned"),
    [
        ("dpo", {}, True),
        ("ipo", {}, True),
        ("dpo", {"alignment_reference": "short"}, False),
        ("dpo", {"context_mode": "short"}, False),
        ("dpo", {"alignment_weight": 0.0}, False),
        ("orpo", {}, False),
        ("simpo", {}, False),
        ("dpo", {"objective": "sft"}, False),
    ],
)
def test_the_alignment_that_transferred_nothing_is_reported(loss, settings, warned):
    text = no_transfer(MethodConfig(**{"preference_loss": loss, "alignment_weight": 3.0} | settings))
    assert (text is not None) == warned
    assert not warned or ("docs/method.md" in text and "\n" not in text and "--alignment-reference short" in text)


def solo(step, short, long):
    return line(step, alignment_loss=abs(short - long), reward_chosen=short, reward_long_chosen=long)


def compared(n, ratio, ranks="rank 3", lost=0.5):
    return line(n, slowest_ratio=ratio, slowest_seconds=lost, slowest_ranks=ranks, slowest_hosts="node1")


def test_a_copy_that_stays_slow_is_a_straggler():
    """Once, until a comparison without it; comparisons are every tenth step."""
    every_tenth = [compared(n, 1.3) if n % 10 == 0 else line(n) for n in range(1, 101)]
    assert warned(Watch(10), every_tenth) == {20: [STRAGGLER]}
    text = Watch_after(every_tenth[:19]).read(every_tenth[19])[STRAGGLER]
    assert text.startswith("straggler: rank 3 on node1 took 1.30 times as long as the median of the other copies")
    assert "0.5 s a step lost; reported above 1.2" in text
    changing = [compared(n, 1.3, f"rank {n % 2}") for n in range(1, 9)]
    quick = [compared(n, 9.0, lost=0.01) for n in range(1, 9)]
    assert not warned(Watch(10), changing) and not warned(Watch(10), quick)
    again = [compared(n, ratio) for n, ratio in enumerate([1.3, 1.3, 1.1, 1.3, 1.3, 1.3], 1)]
    assert warned(Watch(10), again) == {2: [STRAGGLER], 5: [STRAGGLER]}


def test_a_run_that_waits_for_data_is_reported():
    def waiting(n, waited, seconds=2.0):
        return line(n, data_seconds=waited, data_rank=n % 3 > 0, seconds=seconds)

    slow = [waiting(n, 0.3) for n in range(1, 101)]
    assert warned(Watch(10), slow) == {WINDOW: [WAITS]}
    text = Watch_after(slow[: WINDOW - 1]).read(slow[WINDOW - 1])[WAITS]
    assert text.startswith(f"the last {WINDOW} steps waited 0.3 of 2 s a step for data, rank 1 mostly the longest: ")
    assert not warned(Watch(10), [waiting(n, 0.15) for n in range(1, 101)])
    assert not warned(Watch(10), [waiting(n, 0.05, 0.1) for n in range(1, 101)])  # of a tiny model


def test_an_alignment_that_only_lowers_the_short_reward_is_reported():
    """The collapse: the short reward comes down to the long one, which does not move."""
    collapse = [solo(n, 4 - 0.03 * n, 0.5) for n in range(1, 101)]
    new = warned(Watch(10), collapse)
    assert list(new.values()) == [[SHORT_SIDE]] and WINDOW < min(new) < 60
    healthy = [solo(n, 4.0, 0.5 + 0.03 * n) for n in range(1, 101)]
    half = [solo(n, 4 - 0.01 * n, 0.5 + 0.02 * n) for n in range(1, 101)]
    assert warned(Watch(10), healthy) == warned(Watch(10), half) == {}


def test_a_resumed_run_warns_where_an_unbroken_one_does():
    lines = [solo(n, 4 - 0.03 * n, 0.5) for n in range(1, 101)]
    unbroken = warned(Watch(10), lines)
    for cut in (5, 30, min(unbroken), 90):
        expected = {step: names for step, names in unbroken.items() if step > cut}
        assert warned(Watch_after(lines[:cut]), lines[cut:]) == expected


@pytest.mark.parametrize("kept", [0, 3, MOST_SKIPPED - 1])
def test_skipped_steps_in_a_row_end_a_resumed_run_where_they_end_an_unbroken_one(kept):
    """``kept`` of them were done before the checkpoint that the run resumes from."""
    lines = [line(1), *({"step": n, "split": "train", "skipped": "why", "loss": None} for n in range(2, 30))]
    watch = Watch(10)
    watch.replay([*lines[: 1 + kept], {"step": 1 + kept, "split": "save"}])
    assert (watch.skipped, watch.skipped_in_a_row) == (kept, kept)
    done = iter(lines[1 + kept :])
    with refused("steps-skipped", f"step {1 + MOST_SKIPPED}: ", f" {MOST_SKIPPED}th step"):
        for each in done:
            watch.read(each)
    watch = Watch(10)
    watch.replay([*lines[:4], line(5)])
    assert (watch.skipped, watch.skipped_in_a_row) == (3, 0)


def test_skipped_steps_are_counted_and_end_a_run_when_they_do_not_end():
    watch = Watch(10)
    for step in (1, 2, 3):
        watch.read({"step": step, "split": "train", "skipped": "why", "loss": None})
    watch.read(line(4))
    assert (watch.skipped, watch.skipped_in_a_row) == (3, 0)
    with refused("steps-skipped", f"step {4 + MOST_SKIPPED}: ", f" {MOST_SKIPPED}th step"):
        for step in range(5, 100):
            watch.read({"step": step, "split": "train", "skipped": "why", "loss": None})


@pytest.mark.parametrize(
    ("lengths", "word"),
    [
        ([(10, 10), (12, 9), (9, 12)] * 10, None),
        ([(30, 10), (32, 9)] * 10, "chosen longer in 100%"),
        ([(10, 11)] * 30, "shorter in 100%"),
        ([(30, 10)] * 3, None),  # too few for a warning
    ],
)
def test_length_bias(lengths, word):
    warning = length_bias(lengths)
    assert (warning is None) if word is None else (word in warning and "\n" not in warning)
