"""Warns of problems of preference training that show only in the metrics of a run.

`Watch` reads only the lines of metrics.jsonl, so that a resumed run, which reads its earlier lines again, warns as an
uninterrupted one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, median, mode

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.pairing.lengths import Lengths
from megatron_solopo.errors import Diverged
from megatron_solopo.losses.registry import aligns_with_reference, loss_class
from megatron_solopo.training.log import Line

WINDOW = 20
"""Steps of a mean, so that the noise of single steps causes no warning."""
MOST_SKIPPED = 10
"""Consecutive skipped steps that end a run: the weights are useless by then."""
SPIKE_WINDOW = 64
"""Steps that a spike is compared with."""
FALL = 0.1
"""A chosen log-prob fell if it lost this fraction of its first value (and at least 1 nat per response)."""

SLOW = 1.2
"""A copy of the model is a straggler above this ratio of its time to the median of the others, for the same work."""
DATA_SHARE = 0.1
"""A run waits for data if this share of its seconds is waiting."""
NOTICED = 0.1
"""Seconds a step below which neither is reported: those of a tiny model are noise."""

DISPLACEMENT, SHORT_SIDE, SPIKE = "chosen_log_prob_falls", "short_side_falls", "spike"
CLIPPED, STRAGGLER, WAITS = "clipped", "straggler", "waits_for_data"


class Watch:
    """Reads every training line of a run in order and warns once of each problem, and again after it had ended.

    Args:
        spike_factor: a loss or gradient norm above this many times the median of the last `SPIKE_WINDOW` steps is a
            spike; 0 disables the warning.
    """

    def __init__(self, spike_factor: float) -> None:
        self._spike_factor = spike_factor
        self._first: list[Mapping[str, float]] = []
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._history: dict[str, deque[float]] = {name: deque(maxlen=SPIKE_WINDOW) for name in ("loss", "grad_norm")}
        self._active: set[str] = set()
        self._clipped: deque[float] = deque(maxlen=WINDOW)  # gradient norms of the last steps if all were clipped
        self._steps = self._unclipped = 0
        self._slow: tuple[str, str] | None = None  # ranks and hosts of the last comparison's straggler
        self._straggler = ""
        self.skipped = self.skipped_in_a_row = 0

    def read(self, line: Line) -> dict[str, str]:
        """Reads a training line and returns its new warnings, one line of text by name.

        Raises:
            Diverged: the last `MOST_SKIPPED` steps were all skipped.
        """
        if line.get("skipped"):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MOST_SKIPPED:
                raise Diverged(
                    "steps-skipped",
                    f"step {line['step']}: the {MOST_SKIPPED}th step in a row without a finite loss and gradient; "
                    "the last checkpoint is kept: check the examples, or start a new run with a lower --lr",
                )
            return {}
        self.skipped_in_a_row = 0
        return self._warnings(line)

    def _warnings(self, line: Line) -> dict[str, str]:
        warnings = self._spikes(line) | self._clipping(line) | self._stragglers(line)
        if len(self._first) < WINDOW:
            self._first.append(line)
        self._recent.append(line)
        if len(self._first) == WINDOW and self._recent[0]["step"] > self._first[-1]["step"]:
            first, now = _means(self._first), _means(self._recent)
            warnings |= _displacement(first, now) | _short_side(first, now)
        if len(self._recent) == WINDOW:
            warnings |= _waits(self._recent)
        new = {name: text for name, text in warnings.items() if name not in self._active}
        self._active = set(warnings)
        return new

    def replay(self, lines: Iterable[Line]) -> None:
        """Reads the lines that earlier starts of this run wrote, without warnings."""
        for line in lines:
            if line.get("split") != "train":
                continue
            if line.get("skipped"):
                self.skipped += 1
                self.skipped_in_a_row += 1
            else:
                self.skipped_in_a_row = 0
                self._warnings(line)

    def _spikes(self, line: Line) -> dict[str, str]:
        spikes = []
        for name, past in self._history.items():
            value = line[name]
            usual = median(past) if len(past) >= WINDOW else None
            if self._spike_factor and usual is not None and value > self._spike_factor * usual > 0:
                spikes.append(f"{name.replace('_', ' ')} {value:.4g} (median {usual:.4g})")
            past.append(value)
        return {SPIKE: f"a spike: {', '.join(spikes)}"} if spikes else {}

    def _clipping(self, line: Line) -> dict[str, str]:
        self._steps += 1
        if not line.get("clipped"):  # older runs have no such field
            self._unclipped += 1
            self._clipped.clear()
            return {}
        self._clipped.append(line["grad_norm"])
        if len(self._clipped) < WINDOW:
            return {}
        return {CLIPPED: f"every one of the last {WINDOW} steps was clipped {self._how(line)}"}

    def _stragglers(self, line: Line) -> dict[str, str]:
        """Warns where the same copy is slow in two comparisons one after the other, until one without it."""
        if "slowest_ratio" in line:
            before, ratio, lost = self._slow, line["slowest_ratio"], line["slowest_seconds"]
            named = line["slowest_ranks"], line["slowest_hosts"]
            self._slow = named if ratio > SLOW and lost > NOTICED else None
            if self._slow is None or self._slow != before:
                self._straggler = ""
            elif not self._straggler:
                self._straggler = (
                    f"straggler: {named[0]} on {named[1]} took {ratio:.2f} times as long as the median of the other "
                    f"copies of the model for the same work ({lost:.2g} s a step lost; reported above {SLOW:g})"
                )
        return {STRAGGLER: self._straggler} if self._straggler else {}

    def at_end(self, done: int) -> list[str]:
        """Returns lines about the run as a whole, for its end after step ``done``."""
        lines = []
        if self.skipped:
            lines.append(f"skipped {self.skipped} steps whose loss or gradient was not finite (see metrics.jsonl)")
        if self.skipped_in_a_row:
            trained = done - self.skipped_in_a_row
            lines.append(
                f"warning: every step after step {trained} was skipped: the model is still that of step {trained}; "
                "check their examples, or start a new run with a lower --lr"
            )
        if clipped := self.all_clipped():
            lines.append(f"warning: {clipped}")
        return lines

    def all_clipped(self) -> str | None:
        """Returns a line if every step of a run that is too short for the warning was clipped, else None."""
        if self._unclipped or not 0 < self._steps < WINDOW:
            return None
        return f"every step ({self._steps}) was clipped {self._how(self._recent[-1])}"

    def _how(self, line: Line) -> str:
        return (
            f"to --clip-grad {line['clip_grad']:g} (gradient norm {min(self._clipped):.3g} to "
            f"{max(self._clipped):.3g}), so the size of the gradient has no effect; lower --lr if the loss does not "
            "fall, or raise --clip-grad"
        )


def _means(lines: Sequence[Line]) -> dict[str, float]:
    names = ("logp_chosen", "margin", "alignment_loss", "reward_chosen", "reward_long_chosen")
    return {name: fmean(line[name] for line in lines) for name in names if name in lines[0]}


def _displacement(first: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Warns where the margin grows while both responses become less likely (likelihood displacement, arXiv
    2410.08847)."""
    if "logp_chosen" not in first:
        return {}
    before, after = first["logp_chosen"], now["logp_chosen"]
    if before - after < max(1.0, FALL * abs(before)) or now["margin"] <= first["margin"]:
        return {}
    return {
        DISPLACEMENT: f"the chosen responses' log-prob fell from {before:.2f} to {after:.2f} nats while the margin "
        f"grew from {first['margin']:.3g} to {now['margin']:.3g}; the model may be unlearning both responses: lower "
        "--lr, add --sft-weight, or use ORPO"
    }


def _waits(recent: Collection[Mapping[str, float]]) -> dict[str, str]:
    """Warns where steps wait for their packs, which a thread makes during the step before."""
    waited = fmean(line.get("data_seconds", 0.0) for line in recent)
    seconds = fmean(line.get("seconds", 0.0) for line in recent)
    if waited <= max(NOTICED, DATA_SHARE * seconds):
        return {}
    rank = mode(line["data_rank"] for line in recent if "data_rank" in line)
    return {
        WAITS: f"the last {len(recent)} steps waited {waited:.2g} of {seconds:.2g} s a step for data, rank {rank:g} "
        "mostly the longest: see whether its cores are busy, and put --data-cache on a disk of the node"
    }


def _short_side(first: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Warns where the alignment loss fell more because the short reward fell than because the long one rose."""
    if "alignment_loss" not in first or now["alignment_loss"] >= first["alignment_loss"]:
        return {}
    fell = first["reward_chosen"] - now["reward_chosen"]
    rose = now["reward_long_chosen"] - first["reward_long_chosen"]
    if fell <= max(rose, 0) or fell < FALL * first["alignment_loss"]:
        return {}
    return {
        SHORT_SIDE: f"the alignment loss fell from {first['alignment_loss']:.3g} to {now['alignment_loss']:.3g} mostly "
        f"because the chosen response's short-context reward fell by {fell:.3g} (the long one changed by {rose:+.3g}): "
        "add --alignment-stop-short-gradient or lower --alignment-weight"
    }


def no_transfer(method: MethodConfig) -> str | None:
    """Returns a line about a form of the alignment that transferred nothing where it was measured, or None."""
    solo = method.objective == "preference" and method.context_mode == "solo" and method.alignment_weight
    aligned = aligns_with_reference(loss_class(method.preference_loss))
    if not solo or not aligned or method.alignment_reference != "per_context":
        return None
    return (
        f"--preference-loss {method.preference_loss} with --alignment-reference per_context (the default): "
        "measured for dpo at toy size, it transferred nothing to the long context (docs/method.md); "
        "--alignment-reference short transferred"
    )


def length_bias(lengths: Sequence[tuple[int, int]]) -> str | None:
    """Returns a warning where (chosen, rejected) lengths in tokens differ so much that training may favour a length,
    or None."""
    return Lengths.of("tokens", lengths).bias()
