"""`megatron_solopo.train` on several processes: the same processes train twice, and all have the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import preference_groups
from training_home import ENVIRONMENT, ROOT, furnish

SCRIPT = """
import json, os
from pathlib import Path
from megatron_solopo import Config, train

for number, layout in enumerate([{}, {"tensor_model_parallel_size": 2}]):
    config = Config.from_options(
        hf_path="hf", train_data=json.loads(Path("groups.json").read_text()), save=f"runs/{number}", device="cpu",
        seq_length=128, train_iters=2, global_batch_size=4, lr=1e-3, preference_loss="orpo",
        distributed_timeout_minutes=2, **layout,
    )
    result = train(config)
    Path(f"{number}-{os.environ['RANK']}.json").write_text(json.dumps([result.step, str(result.save), result.metrics]))
"""


def test_the_same_processes_train_twice(tmp_path: Path) -> None:
    home = furnish(tmp_path)
    (tmp_path / "groups.json").write_text(json.dumps(preference_groups(10)))
    (tmp_path / "twice.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "megatron_solopo.cli",
        "launch",
        "--standalone",
        "--nproc_per_node",
        "2",
        "twice.py",
    ]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [[json.loads((tmp_path / f"{run}-{rank}.json").read_text()) for rank in (0, 1)] for run in (0, 1)]
    for run, (first, second) in enumerate(results):
        assert first == second == [2, f"runs/{run}", home.metrics(f"runs/{run}")[-1]]
        written = (tmp_path / f"runs/{run}/train_data.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in written] == [f"g{number}" for number in range(10)]
    assert results[0][0][2]["loss"] == pytest.approx(results[1][0][2]["loss"], rel=1e-5)
