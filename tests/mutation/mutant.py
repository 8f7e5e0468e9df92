"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mutation: ``old`` occurs once in ``file`` and becomes ``new``; ``tests`` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def within(file: str, tests: str, *wrongs: tuple[str, str, str]) -> list[Mutant]:
    """Mutants, (name, old, new) each, of one file of the package with the same tests."""
    return [Mutant(name, f"megatron_solopo/{file}", old, new, tests) for name, old, new in wrongs]
