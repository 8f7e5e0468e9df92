"""Checkpoints of four processes: no process gathers what others hold, all of them write, and any layout reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_worker
import pytest
import torch
from forked_runs import ForkedRun
from tiny_models import EXPERTS, WIDE
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import LlamaConfig, MixtralConfig

from megatron_solopo.conversion.manifest import problem_of

WIDTH = 1024
LARGE = LlamaConfig(
    **WIDE | dict(hidden_size=WIDTH, intermediate_size=2816, num_hidden_layers=4), tie_word_embeddings=False
)
"""51 million parameters."""


def run(folder: Path, model: Any, layouts: list[str], *flags: str) -> dict[str, Any]:
    """The results of `checkpoint_worker`; the checkpoint of layout n is in ``folder / n``."""
    (folder / "hf").mkdir()
    model.save_pretrained(folder / "hf")
    argv = ["--hf-path", folder / "hf", "--train-data", "none", "--train-iters", 1, "--random-init", "--device", "cpu"]
    job = {"out": str(folder), "layouts": layouts, "argv": [*map(str, argv), *flags]}
    (folder / "job.json").write_text(json.dumps(job))
    forked = ForkedRun([str(folder / "job.json")], 4, folder / "stderr.txt", checkpoint_worker.main)
    assert forked.wait() == [0] * 4, forked.text()[-3000:]
    return json.loads((folder / "results.json").read_text())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The stored tensors, by torch's reader and without megatron-core."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    complete = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(complete, reader, no_dist=True)
    return complete


SMALL = ("--bf16", "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16")
HOST = ("--bf16", "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5")


@pytest.mark.parametrize(
    ("model", "layouts", "flags"),
    [
        (
            LlamaConfig(**WIDE, tie_word_embeddings=True),
            ["dp4", "tp2 sp pp2", "cp2 dp2", "pp2 dp2", "tp4 sp", "tp2 dp2"],
            (),
        ),
        (MixtralConfig(**WIDE, **EXPERTS), ["dp4", "ep2 dp4", "tp2 sp ep2 dp2", "pp2 dp2"], ()),
        (LlamaConfig(**WIDE, tie_word_embeddings=True), ["dp4", "tp2 sp pp2", "cp2 dp2"], SMALL),
        (MixtralConfig(**WIDE, **EXPERTS), ["ep2 dp4", "pp2 dp2"], HOST),
    ],
    ids=["llama", "mixtral", "small", "host"],
)
def test_any_layout_reads_what_another_wrote(
    tmp_path: Path, model: Any, layouts: list[str], flags: tuple[str, ...]
) -> None:
    results = run(tmp_path, model, layouts, *flags)
    first = tensors(tmp_path / "0" / "iter_0000001")
    moments = [name for name in first if ".exp_avg." in name]
    assert moments and all(first[name].unique().numel() > 1 for name in moments)
    assert {first[name].dtype for name in moments} == {torch.bfloat16 if flags == SMALL else torch.float32}
    for number, layout in enumerate(layouts):
        assert results[layout]["unsaved"] is None
        then = tensors(tmp_path / str(number) / "iter_0000001")
        assert {name for name in first if not torch.equal(first[name], then[name])} == set(), layout
        assert then.keys() == first.keys()


def test_a_process_holds_and_writes_its_own_share(tmp_path: Path) -> None:
    layouts = ["dp4", "tp2 dp2"]
    results = run(tmp_path, LARGE, layouts, "--bf16")
    for layout in layouts:
        files = results[layout]["files"].values()
        share = sum(files) / 4
        assert share > 150 * 2**20
        assert max(files) < 1.1 * share  # everyone writes as much
        for rank, names in enumerate(results[layout]["read"]):  # and computes the digests of what it wrote
            written = [name for name in names if name.endswith(".distcp")]
            assert written and all(name.startswith(f"__{rank}_") for name in written)
        assert problem_of(tmp_path / str(layouts.index(layout)) / "iter_0000001") is None
        for peaks in results[layout]["peaks"]:
            assert peaks["save"] < 0.5 * share  # written from where it is; a GPU's share is copied to the host first
            assert peaks.get("load", 0) < 1.2 * share
