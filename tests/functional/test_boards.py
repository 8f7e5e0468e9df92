"""Weights & Biases (offline), TensorBoard and metrics.jsonl agree on one run, in two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

FLAGS = ["--wandb-project", "tests", "--preference-loss", "orpo", "--eval-interval", 2, "--save-interval", 2]


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run, as Weights & Biases' own reader finds them."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    store, rows = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
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
        flags = [*FLAGS, "--valid-data", home.folder / "valid.jsonl", "--tensorboard-dir", home.folder / "board"]
        assert run(main, home.argv("runs/both", *flags)) == 0
    return home


def test_all_three_agree(home: Home) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(home.folder / "board"))
    board.Reload()
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
            assert [event.value for event in board.Scalars(f"{split}/{name}")] == pytest.approx(expected, rel=1e-6)


def test_the_run_keeps_its_id(home: Home) -> None:
    """A resumed run goes on with the same curves."""
    folder = home.folder / "runs" / "both"
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    assert (folder / "wandb_run_id.txt").read_text().strip() == path.stem.removeprefix("run-")


def test_what_weights_and_biases_refuses_is_one_line(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "no-key")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    assert run(main, home.argv("runs/refused", "--wandb-project", "tests", "--preference-loss", "orpo")) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--wandb-project: Weights & Biases cannot start" in errors[0]
    assert "WANDB_MODE=offline" in errors[0]
