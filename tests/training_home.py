"""A user's folder for tests of pretrain_solopo.py: a tiny model, data, and what runs leave there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from option_lines import last_wins
from tiny_models import conversations, preference_groups, write_lines, write_model

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}

TIMES = frozenset(
    {
        *("seconds", "tokens_per_second", "memory_gib", "data_seconds", "data_rank"),
        *("slowest_ranks", "slowest_hosts", "slowest_ratio", "slowest_seconds"),
    }
)
"""Fields of metrics.jsonl that differ between two runs of the same steps."""


@dataclass(frozen=True)
class Home:
    """A user's folder: the model in ``hf``, data beside it, and what runs leave there."""

    folder: Path

    def argv(self, save: str, *flags: Any, data: str = "groups.jsonl", hf: str = "hf") -> list[str]:
        """A command line of five short steps; a later flag overrides an earlier one."""
        options = [
            "--hf-path",
            self.folder / hf,
            "--train-data",
            self.folder / data,
            "--save",
            self.folder / save,
            "--device",
            "cpu",
            "--seq-length",
            128,
            "--train-iters",
            5,
            "--global-batch-size",
            4,
            "--micro-batch-size",
            2,
            "--lr",
            1e-3,
            *flags,
        ]
        return last_wins(list(map(str, options)))

    def metrics(self, save: str, split: str = "train") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / save / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == split]

    def listing(self) -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in self.folder.rglob("*")}


def command(argv: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "pretrain_solopo.py"), *argv]


def as_a_user(home: Home, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(argv), cwd=home.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def furnish(folder: Path) -> Home:
    """Model and data in an empty folder."""
    write_model(folder / "hf", noise=0.02)
    write_lines(folder / "groups.jsonl", preference_groups(10))
    write_lines(folder / "valid.jsonl", preference_groups(3, seed=4))
    write_lines(folder / "chats.jsonl", conversations(24))
    return Home(folder)
