"""A command line of pretrain_solopo.py that lacks nothing, for tests of options."""

from megatron_solopo.config import flag

NEEDED = {"hf_path": "m", "train_data": "t.jsonl", "save": "run", "train_iters": "10"}


def argv(*extra, **changed):
    """The needed options, some replaced (None: left out), and more."""
    given = NEEDED | changed
    return [text for name, value in given.items() if value is not None for text in (flag(name), value)] + list(extra)
