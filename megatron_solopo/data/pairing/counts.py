"""Counts of ``solopo build-pairs``, which it prints at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_solopo.data.answers import golds
from megatron_solopo.data.pairing.lengths import Lengths
from megatron_solopo.data.scoring import SCORERS


@dataclass
class Counts:
    """Numbers of questions and responses by outcome, and the lengths of the paired responses.

    Attributes:
        responses: those of all groups.
        questions: all questions of the contexts; ``not_sampled`` have no line in the responses.
        yes_or_no, short: sampled questions with such a gold answer (`answers.Gold.short`), each counted once.
        short_responses, judged_otherwise: responses to these questions, and how many of them sub-EM and its plain
            form score differently.
    """

    scorer: str = "sub_em"
    questions: int = 0
    not_sampled: int = 0
    yes_or_no: int = 0
    short: int = 0
    short_responses: int = 0
    judged_otherwise: int = 0
    paired: int = 0
    all_right: int = 0
    all_wrong: int = 0
    undecided: int = 0
    no_response: int = 0
    ranked: int = 0
    gold: int = 0
    groups: int = 0
    responses: int = 0
    with_ids: int = 0
    dropped_responses: Counter[str] = field(default_factory=Counter)
    right_responses: int = 0
    undecided_responses: int = 0
    scored_responses: int = 0
    words: Lengths = field(default_factory=lambda: Lengths("words"))
    tokens: Lengths = field(default_factory=lambda: Lengths("tokens"))

    @property
    def sampled(self) -> int:
        return self.questions - self.not_sampled

    def record(self) -> dict[str, str | int]:
        """Returns the counts of questions and responses, as --counts-output holds them."""
        names = ("scorer", "questions", "sampled", "paired", "all_right", "all_wrong", "undecided", "no_response")
        counts = {name: getattr(self, name) for name in (*names, "groups")}
        return counts | {"responses": self.scored_responses, "right_responses": self.right_responses}

    def lines(self) -> list[str]:
        """Returns the lines that the command prints."""

        def share(count: int) -> str:
            return f"{count} ({count / max(self.sampled, 1):.1%})"

        responses = max(self.scored_responses, 1)
        lines = [
            f"questions: {self.questions}",
            *[f"  not sampled: {self.not_sampled}; shares are of the other {self.sampled}"] * bool(self.not_sampled),
            f"  yield, a right and a wrong answer: {share(self.paired)}",
            f"  all right: {share(self.all_right)}, all wrong: {share(self.all_wrong)}, "
            f"no usable response: {share(self.no_response)}",
        ]
        if self.undecided:
            lines.append(f"  neither right nor wrong: {share(self.undecided)}")
        if self.ranked:
            lines.append(f"  all right or all wrong, paired by score: {share(self.ranked)}")
        if self.gold:
            lines.append(
                f"  all wrong, paired with the gold answer in a sentence: {share(self.gold)}; the model did not sample "
                "it (off-policy)"
            )
        lines.append(
            f"responses scored: {self.scored_responses}, right: {self.right_responses / responses:.1%}"
            + (f", undecided: {self.undecided_responses / responses:.1%}" if self.undecided_responses else "")
        )
        lines += [f"  {count} responses dropped: {reason}" for reason, count in self.dropped_responses.most_common()]
        if self.yes_or_no or self.short:
            lines += [
                f"short gold answers: yes or no {share(self.yes_or_no)}, "
                f"one short word or a number {share(self.short)}",
                "  " + self._how_short_ones_are_scored(),
            ]
        if self.responses > 2 * self.groups:
            lines.append(f"responses of a group: {self.responses / self.groups:.2f} (mean)")
        if self.with_ids:
            lines.append(f"groups with responses whose text has other token ids than were sampled: {self.with_ids}")
        measured = [lengths for lengths in (self.words, self.tokens) if len(lengths)]
        lines += [lengths.line() for lengths in measured]
        lines += [f"warning: {bias}" for lengths in measured if (bias := lengths.bias())][:1]
        return lines

    def _how_short_ones_are_scored(self) -> str:
        other = f"{self.judged_otherwise} of their {self.short_responses} responses"
        if self.scorer == "sub_em":
            return (
                "right only as whole words of a response's answer part, yes and no only where it has not both; "
                f"{other} are judged otherwise than by --scorer sub_em_plain"
            )
        if self.scorer == "sub_em_plain":
            return f"found inside other words too ('no' in 'not'); {other} are judged otherwise than by --scorer sub_em"
        return f"scored as all others, by --scorer {self.scorer}"

    def add_short(self, answers: Sequence[str], responses: Sequence[tuple[str, float]]) -> None:
        """Counts a sampled question, if a gold answer of it is short.

        Args:
            responses: (text, score) of those that were scored.
        """
        gold = [one for one in golds(answers) if one.short]
        if not gold:
            return
        yes_or_no = any(one.yes_or_no for one in gold)
        self.yes_or_no += yes_or_no
        self.short += not yes_or_no
        if self.scorer in ("sub_em", "sub_em_plain"):
            other = SCORERS["sub_em_plain" if self.scorer == "sub_em" else "sub_em"]
            self.short_responses += len(responses)
            self.judged_otherwise += sum(other(text, answers) != score for text, score in responses)
