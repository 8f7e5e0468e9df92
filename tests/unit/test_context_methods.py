"""A --cp-comm-type is one file: a stub that is put into the folder, and the forward of two context-parallel ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import preference_groups, write_lines, write_model

TESTS = Path(__file__).resolve().parents[1]

STUB = '''
"""Halves of the pack as it is; each rank attends to its rows alone."""
import numpy as np
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.layout import BlockLayout, RankLayout
from megatron_solopo.parallel.method import ContextMethod

CALLS = []

class Layout(RankLayout):
    def attend(self, query, key, value, scale):
        CALLS.append(len(query))
        return query.clone()

class Halves(ContextMethod):
    about = "nothing at all"
    def check(self, config):
        if config.data.share_prompts:
            raise UserError("option-conflict", "--cp-comm-type halves: not with shared prompts")
    def piece_multiple(self, size):
        return 3 * size
    def rows(self, pieces, rank, size):
        rows = np.arange(sum(piece.slot for piece in pieces))
        return np.split(rows, size)[rank]
    def share(self, rank, size):
        return f"half {rank}"
    def layout(self, pieces, rank, size, group, kernels):
        return Layout()

METHOD = Halves()
'''

PROCESS = """
import json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_solopo.parallel import context
stubs, job = sys.argv[1], json.loads(sys.argv[2])
context.__path__.append(stubs)

from megatron_solopo import config_load
from megatron_solopo.errors import UserError
from host_reads import host_reads
from megatron_solopo.parallel import cpu_shim, platform
uninstall = cpu_shim.install()
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.training.dry_run import _rank_table
from megatron_solopo.training.engine import build_engine, initialize_parallel
from megatron_solopo.training.objective import step_inputs
from megatron_solopo.training.preflight import load_data
from megatron_solopo.training.step import run_parts
from megatron_solopo.training.step_work import make_packs

result = {"choices": context.choices(), "help": config_load.build_parser().format_help()}
try:
    config_load.load(job["argv"])
except UserError as error:
    result["refused"] = str(error)
config, _ = config_load.load([*job["argv"], "--no-share-prompts"] if job["stub"] else job["argv"])
result["ranks"] = _rank_table(config.parallel, 2, 2)[1:]
data = load_data(config).train  # in one process: the others of the fake group never arrive where it waits for them
uninstall()
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # collectives do nothing
here = platform.start("cpu")
initialize_parallel(config)
engine = build_engine(here, read_hf_config(config.model.hf_path), config)
plan = plan_step(data.groups, 32, 1, config)
result["multiple"] = plan.of_pieces
packs = make_packs(engine, data, range(len(data.groups)), config)
result["tokens"] = [(pack.tokens, len(pack.pack.tokens)) for pack in packs]
result["slots"] = [piece.slot for pack in packs for piece in pack.pack.pieces]
inputs = step_inputs([pack.pack for pack in packs], None, config.method, here.device)
with host_reads() as reads:
    run_parts(engine, packs, inputs, len(data.groups), config.method)
result["reads"] = reads
if job["stub"]:
    result["calls"] = context.methods()["halves"].__class__.layout.__globals__["CALLS"]
print(json.dumps(result))
"""


@pytest.mark.parametrize("method", ["halves", "all_gather"])
def test_a_method_is_one_file(method: str, tmp_path: Path) -> None:
    """Choices, help, refusals, padding, the dry run, packs and the forward come to it; nothing reads the device."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "halves.py").write_text(STUB)
    argv = [
        "--hf-path", write_model(tmp_path / "hf"), "--save", tmp_path / "run", "--device", "cpu",
        "--train-data", write_lines(tmp_path / "groups.jsonl", preference_groups(5)), "--seq-length", 128,
        "--train-iters", 1, "--global-batch-size", 5, "--micro-batch-size", 2, "--preference-loss", "simpo",
        "--context-parallel-size", 2, "--cp-comm-type", method,
    ]  # fmt: skip
    stub = method == "halves"
    job = json.dumps({"argv": list(map(str, argv)), "stub": stub})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROCESS, str(stubs), job],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["choices"] == ["all_gather", "a2a", "halves", "p2p"]
    assert "halves: nothing at all" in " ".join(result["help"].split())
    assert result.get("refused") == ("--cp-comm-type halves: not with shared prompts" if stub else None)
    multiple = 6 if stub else 4
    assert result["multiple"] == multiple and all(slot % multiple == 0 for slot in result["slots"])
    shares = [f"half {rank}" if stub else f"chunks {rank + 1} and {4 - rank} of 4 of each sequence" for rank in (0, 1)]
    assert all(line.endswith(f", {share}") for line, share in zip(result["ranks"], shares, strict=True))
    assert all(rank_tokens * 2 == tokens for tokens, rank_tokens in result["tokens"])
    assert not result["reads"]
    if stub:
        layers, rank_tokens = 2, [rank for _, rank in result["tokens"]]
        assert sorted(result["calls"]) == sorted(rank_tokens * layers)
