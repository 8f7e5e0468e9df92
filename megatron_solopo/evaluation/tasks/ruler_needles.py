"""RULER's needles in a haystack and variable tracking (arXiv 2404.06654), generated at any length.

Templates, sizes and defaults are those of scripts/data/synthetic (constants.py, niah.py, variable_tracking.py) and
scripts/synthetic.yaml. A length is of prompt and response together, as there. Two things differ: keys are of a short
list of words and not of the package wonderwords, and every sample has as much filler as fits.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.data.building.selection import CannotBuild
from megatron_solopo.data.files.records import read_text
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.items import Item
from megatron_solopo.evaluation.tasks._task import SAMPLES, Setting, Task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {values} afterwards.\n{context}\nWhat are all the special magic {values} for {query} mentioned in the "
    "provided text?"
)
ANSWER = " The special magic {values} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {values} for {key} is: {value}."
DEPTHS = [round(100 * place / 39) / 100 for place in range(40)]
"""Places of needles in an essay, as shares of its sentences."""

ADJECTIVES = (
    "able ancient bitter brave bright calm clever crisp curious distant eager early easy faint fancy gentle giant "
    "glossy golden grand happy hollow humble icy jolly keen lively lucky mellow modest narrow noble odd patient proud "
    "quick quiet rapid rare rough royal rusty salty sharp shiny silent silver simple sleepy slow smooth steady stout "
    "sunny sweet tall tame thirsty tidy tiny tough vivid warm wild wise young zesty"
).split()
NOUNS = (
    "acorn anchor apple arrow badger bamboo barrel basket beacon bridge bucket button cabin camel candle canyon castle "
    "cedar cello cherry cliff clock comet coral cradle desert dolphin dragon drum eagle engine falcon feather fiddle "
    "forest fountain garden glacier hammer harbor hazel island ivory jacket jungle kettle kitten ladder lantern lemon "
    "lizard magnet maple marble meadow mirror monkey needle nickel ocean orchid otter paddle panda pebble pepper piano "
    "pillow planet pocket puzzle rabbit raven ribbon river rocket saddle sailor salmon shadow sparrow spider stone "
    "tiger timber tunnel turtle valley velvet violin walnut whale willow window wizard zebra"
).split()


def _word(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


DRAWN: dict[str, Callable[[random.Random], str]] = {"words": _word, "numbers": _number, "uuids": _uuid}


@dataclass(frozen=True)
class Needles:
    """A task of needles.

    Attributes:
        haystack: ``noise``, ``essay`` (a text file) or ``needle`` (other keys' needles).
        keys, values: what a key and a value is, a name of `DRAWN`.
        key_count, value_count, query_count: keys; values of each; keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1

    def items(self, setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
        """Returns the samples of the task; see `_task.Build`."""
        sentences = _sentences(file) if file else []
        items = []
        for number in range(setting.limit or SAMPLES):
            for depth in setting.depths:
                try:
                    items.append(self._item(setting, number, depth, sentences))
                except CannotBuild as reason:
                    counts[str(reason)] += 1
        return items

    def _item(self, setting: Setting, number: int, depth: float | None, sentences: Sequence[str]) -> Item:
        rng = random.Random(f"{setting.seed}\0{self}\0{number}")
        keys: dict[str, list[str]] = {}
        while len(keys) < self.key_count:
            keys.setdefault(DRAWN[self.keys](rng), [DRAWN[self.values](rng) for _ in range(self.value_count)])
        needles = [NEEDLE.format(values=self.values, key=key, value=one) for key, of in keys.items() for one in of]
        rng.shuffle(needles)
        asked = rng.sample(list(keys), self.query_count)
        answers = [value for key in asked for value in keys[key]]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        places = rng.sample(DEPTHS, len(needles)) if depth is None else [depth]
        places.sort()
        question, prefix, named = QUESTION, ANSWER, self.values
        if len(answers) == 1:
            question, prefix, named = _singular(QUESTION), _singular(ANSWER), self.values[:-1]

        def build(units: int) -> tuple[str, str]:
            context = self._context(units, needles, places, sentences, f"{setting.seed}\0{number}")
            return (
                question.format(values=named, context=context, query=query),
                prefix.format(values=named, query=query),
            )

        prompts = setting.prompts(build, len(needles))
        return Item(str(number), f"{self.values} for {query}", answers, prompts, depth)

    def _context(
        self, units: int, needles: Sequence[str], places: Sequence[float], sentences: Sequence[str], seed: str
    ) -> str:
        """Returns ``units`` sentences of filler with the needles at their places."""
        if self.haystack == "essay":
            filler = [sentences[number % len(sentences)] for number in range(units)]
        elif self.haystack == "noise":
            filler = [NOISE] * units
        else:
            filler = [self._other_needle(random.Random(f"{seed}\0filler\0{number}")) for number in range(units)]
        parts, before = [], 0
        for needle, place in zip(needles, places, strict=True):
            at = int(place * units)
            parts += [*filler[before:at], needle]
            before = at
        return (" " if self.haystack == "essay" else "\n").join([*parts, *filler[before:]])

    def _other_needle(self, rng: random.Random) -> str:
        key, value = DRAWN[self.keys](rng), DRAWN[self.values](rng)
        return NEEDLE.format(values=self.values, key=key, value=value)


def _singular(text: str) -> str:
    """RULER's wording where one value is asked for."""
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _sentences(path: str) -> list[str]:
    """Returns the sentences of a text file."""
    text = " ".join(read_text("--tasks", Path(path)).split())
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    if not sentences:
        raise UserError("data-empty", f"--tasks: {path} has no text; set a text file such as an essay or a book")
    return sentences


TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
TRACKED = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
HOPS = 4


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
    """Returns the variables of a chain, their value, and its assignments."""
    variables: dict[str, None] = {}
    while len(variables) < HOPS + 1:
        variables["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    names, value = list(variables), str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    return names, value, chain + [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]


def _tracking(context: str, value: str) -> tuple[str, str]:
    return TRACKING.format(context=context, query=value), TRACKED.format(count=HOPS + 1, query=value)


def _variable_tracking(setting: Setting, file: str | None, counts: Counter[str]) -> list[Item]:
    """Returns samples of one chain of `HOPS` hops in noise, after one solved example, as RULER's ``vt``."""
    items = []
    for number in range(setting.limit or SAMPLES):
        rng = random.Random(f"{setting.seed}\0vt\0{number}")
        names, value, chain = _chain(rng, 5)
        shown, shown_value, shown_chain = _chain(rng, 3)
        example = "".join(_tracking(_with_chain(shown_chain, 5, random.Random(number)), shown_value))
        example += " ".join(shown) + "\n\n"
        order = rng.random()

        def build(
            units: int, chain: list[str] = chain, value: str = value, example: str = example, order: float = order
        ) -> tuple[str, str]:
            question, prefix = _tracking(_with_chain(chain, units, random.Random(order)), value)
            return example + question, prefix

        try:
            prompts = setting.prompts(build, len(chain))
        except CannotBuild as reason:
            counts[str(reason)] += 1
            continue
        items.append(Item(str(number), f"variables with the value {value}", names, prompts))
    return items


def _with_chain(chain: Sequence[str], units: int, rng: random.Random) -> str:
    """Returns ``units`` lines of noise with the assignments in order, at random places."""
    lines = [NOISE] * units
    for shift, (place, assignment) in enumerate(
        zip(sorted(rng.choices(range(units + 1), k=len(chain))), chain, strict=True)
    ):
        lines.insert(place + shift, assignment)
    return "\n".join(lines).replace(". \n", ".\n")


ESSAY = "a text that hides the needles, such as an essay or a book"
NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", key_count=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", value_count=4),
    "niah_multiquery": Needles("essay", key_count=4, query_count=4),
}
"""RULER's names and settings; in ``multikey_2`` and ``multikey_3`` all filler is needles of other keys."""

TASKS = [
    *(
        Task(
            f"ruler_{name}",
            ("ruler_all",),
            128,
            needles.items,
            file=ESSAY if needles.haystack == "essay" else "",
            by_depth=needles.key_count * needles.value_count == 1,
        )
        for name, needles in NEEDLES.items()
    ),
    Task("ruler_vt", ("ruler_all",), 30, _variable_tracking),
]
