"""Weights & Biases (offline), TensorBoard and metrics.jsonl agree on one run, in two parts."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal
from training_home import ENVIRONMENT, Home, command, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

FLAGS = ["--wandb-project", "tests", "--preference-loss", "orpo", "--eval-interval", 2, "--save-interval", 2]


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind of each part)."""
    data, place, part = path.read_bytes(), 7, b""  # seven bytes name the format
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that an offline run logged."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        flags = [*FLAGS, "--valid-data", home.folder / "valid.jsonl", "--tensorboard-dir", home.folder / "events"]
        assert run(main, home.argv("runs/both", *flags)) == 0
    return home


def test_all_loggers_have_the_same_values(home: Home) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard = EventAccumulator(str(home.folder / "events"))
    tensorboard.Reload()
    wandb = history(home.folder / "runs" / "both")
    for split in ("train", "valid"):
        lines = home.metrics("runs/both", split)
        rows = [row for row in wandb if f"{split}/loss" in row]
        assert [row["step"] for row in rows] == [line["step"] for line in lines] and lines
        for name, value in lines[0].items():
            if not isinstance(value, int | float) or name == "step":
                continue
            expected = [line[name] for line in lines]
            assert [row[f"{split}/{name}"] for row in rows] == pytest.approx(expected, rel=1e-12)
            assert [event.value for event in tensorboard.Scalars(f"{split}/{name}")] == pytest.approx(
                expected, rel=1e-6
            )


def test_a_resumed_run_keeps_its_id(home: Home) -> None:
    """A resumed run continues the same curves."""
    folder = home.folder / "runs" / "both"
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    assert (folder / "wandb_run_id.txt").read_text().strip() == path.stem.removeprefix("run-")


def test_what_weights_and_biases_refuses_is_one_line(home: Home) -> None:
    argv = home.argv("runs/refused", "--wandb-project", "tests", "--preference-loss", "orpo")
    environment = ENVIRONMENT | {"WANDB_MODE": "online", "WANDB_API_KEY": "short", "WANDB_INIT_TIMEOUT": "5"}
    done = subprocess.run(command(argv), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    check_refusal(done.stderr, "wandb-unavailable", "--wandb-project: ", "WANDB_MODE=offline")
