"""Command lines for tests."""

from collections.abc import Callable

from megatron_solopo.config import flag

NEEDED = {"hf_path": "m", "train_data": "t.jsonl", "save": "run", "train_iters": "10"}


def argv(*extra, **changed):
    """The needed options, with replacements (None: left out) and additions."""
    options = NEEDED | changed
    return [text for name, value in options.items() if value is not None for text in (flag(name), value)] + list(extra)


def last_wins(argv: list[str]) -> list[str]:
    """A command line without the options that a later one replaces; commands refuse an option that occurs twice."""
    current: list[str] = []
    options = {"": current}
    for text in argv:
        if text.startswith("--"):
            name = text.removeprefix("--no-").removeprefix("--")
            options.pop(name, None)
            options[name] = current = [text]
        else:
            current.append(text)
    return [text for option in options.values() for text in option]


def last_wins_in(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A command that a later option of a test's command line overrides an earlier one in."""
    return lambda argv: main(last_wins(list(map(str, argv))))
