"""Transformer Engine's layers hold what the portable ones hold; skipped where Transformer Engine is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "te_structure.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "tensor and sequence parallel"])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What te_structure.py recorded, of each process."""
    work = tmp_path_factory.mktemp("te")
    start = [sys.executable]
    if request.param > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    # In a separate process: in this one megatron-core may have recorded that there is no Transformer Engine.
    done = subprocess.run(
        [*start, str(SCRIPT), str(work)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((work / f"facts-{rank}.json").read_text()) for rank in range(request.param)]


def test_parameters_are_the_portable_ones(facts: list[dict[str, Any]]) -> None:
    """Names but for fusion, values from the same folder, cuts, and what is exported again."""
    for name, model in ((name, model) for process in facts for name, model in process["models"].items()):
        assert {"TEPackedAttention", "TERowParallelLinear", "TELayerNormColumnParallelLinear"} < set(model["kinds"])
        assert not {"PackedAttention", "SequentialMLP"} & set(model["kinds"])
        experts = "mixtral" in name or "moe" in name
        assert ("TEGroupedMLP" in model["kinds"]) == experts
        assert model["ours"] == [*(["Router"] if experts else []), "SwiGLU", "TEPackedAttention"]  # no norm
        assert model["fused"] and model["other_marks"] == []
        assert model["same_names"] and model["same_values"] and model["same_drawn"] and model["same_export"], name


def test_checkpoints_interchange(facts: list[dict[str, Any]]) -> None:
    for process in facts:
        assert len(process["checkpoints"]) == 2 * len(process["models"]) == 12
        for name, checkpoint in process["checkpoints"].items():
            assert all(checkpoint.values()), (name, checkpoint)


def test_other_trainers_start_from_a_megatron_folder(facts: list[dict[str, Any]]) -> None:
    for name, model in ((name, model) for process in facts for name, model in process["trainers"].items()):
        assert model == {"same_names": True, "same_values": True}, name


def test_attention_covers_what_a_pack_attends_to(facts: list[dict[str, Any]]) -> None:
    """Against the portable attention, output and gradients, float64, by a kernel in plain torch."""
    if "attention" in facts[0]:
        assert len(facts[0]["attention"]) == 4 and max(facts[0]["attention"].values()) < 1e-12


def test_options_reach_its_layers(facts: list[dict[str, Any]]) -> None:
    """Its SwiGLU instead of this package's; sums of gradients in its products, though there is no Apex; no FP8 copies
    of weights between packs. A layer has two matrices of attention and two of an MLP or of all experts."""
    for name, options in facts[0].get("options", {}).items():
        assert options["ours with its activation"] == [*(["Router"] if "moe" in name else []), "TEPackedAttention"]
        for fused in (True, False):
            assert options[f"fused {fused}"] == [4 * 2, [[fused, fused]]], name


def test_context_parallel_ranks_hold_the_tokens_that_it_expects(facts: list[dict[str, Any]]) -> None:
    assert facts[0].get("zigzag", True)


def test_fp8_options_reach_its_recipes(facts: list[dict[str, Any]]) -> None:
    kinds = {
        "tensorwise": "Float8CurrentScaling",
        "delayed": "TEDelayedScaling",
        "mxfp8": "MXFP8BlockScaling",
        "blockwise": "Float8BlockScaling",
    }
    if "recipes" in facts[0]:
        expected = {
            f"{name} {form}": [kind, form.upper()] for name, kind in kinds.items() for form in ("e4m3", "hybrid")
        }
        assert facts[0]["recipes"] == expected
