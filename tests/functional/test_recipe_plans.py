"""Each file of examples/recipes/plans: training accepts it, and its rehearsal has the peak that it states.

`make test` (SOLOPO_LAYOUTS=cheap) rehearses those of 8 GPUs and 8K tokens alone, but for
Qwen3-30B-A3B's, which takes minutes; `make test-distributed` rehearses all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.parallel.topology import data_parallel_size
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.table import tasks_of
from megatron_solopo.planning.workers import Rehearsals
from megatron_solopo.training.preflight import check_cut

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
PLANS = sorted((RECIPES / "plans").glob("*.yaml"))
CHEAP = os.environ.get("SOLOPO_LAYOUTS") == "cheap"
REHEARSED = [path for path in PLANS if not CHEAP or ("-8xh100-8k" in path.stem and "a3b" not in path.stem)]
PEAK = re.compile(r"([\d.]+) GiB on rank (\d+)")
SHORT, RESPONSE = 1024, 256


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals(1) as rehearsals:
        yield rehearsals


@pytest.mark.parametrize("path", REHEARSED, ids=lambda path: path.stem)
def test_the_peak_is_the_one_that_the_recipe_states(rehearsals: Rehearsals, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    [stated] = [line for line in text.splitlines() if line.startswith("# rehearsed peak: ")]
    config, gpus = Config.load(path), int(re.search(r"--gpus (\d+)", text)[1])
    hf_config = read_hf_config(RECIPES / "models" / Path(config.model.hf_path).name, config.model.rope_scaling)
    check_cut(hf_config, config, gpus)
    group = example(config.method, SHORT - RESPONSE, config.data.seq_length - RESPONSE, RESPONSE)
    examples = [group] * config.training.global_batch_size
    step = plan_step(examples, hf_config.hidden_size, data_parallel_size(config.parallel, gpus), config, "cuda")
    pack = [group] * max(len(places) for share in step.shares for places in share)
    tasks = tasks_of(config, hf_config, pack, len(step.shares[0]), gpus, "cuda")
    peaks = {outcome.rank: outcome.peak.total / 2**30 for outcome in rehearsals.each(tasks)}
    assert peaks == pytest.approx({int(rank): float(size) for size, rank in PEAK.findall(stated)}, rel=0.02)
