"""A machine file from a run: the fractions at which the forecast of its layout is the step that it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import attention_cost, plan_step
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.results import Row, finite, read_run
from megatron_solopo.model.cost import width_of_cost, windows_of
from megatron_solopo.parallel.topology import data_parallel_size
from megatron_solopo.planning.forecast import calibrated
from megatron_solopo.planning.machines import Machine, load_machine, names
from megatron_solopo.planning.table import outcomes_of, tasks_of
from megatron_solopo.training.preflight import load_data, read_model, run_schedule
from megatron_solopo.training.run_folder import processes_of

FLAG = "--calibrate"


def calibrate(machine: Machine, run_folder: str | Path) -> Machine:
    """Returns the machine on which the forecast of a run's median step is what the run measured.

    The run's model, data and layout are read from its config.yaml, so its paths must still hold; the first step, which
    warms up, does not count. A pack of mean cost of the process with most work is rehearsed.

    Raises:
        UserError: the folder holds no measured step, its model or data are gone, the rehearsal fails, it was a run on a
            CPU and ``machine`` is a GPU of this package, or it is so much faster than ``machine`` that it had another.
    """
    folder = Path(run_folder)
    row = _median_step(folder)
    # Only CUDA's allocator has a peak to report.
    device = "cuda" if "memory_allocated_gib" in row else "cpu"
    if device == "cpu" and machine in map(load_machine, names()):
        raise UserError(
            "machine-calibration",
            f"{FLAG} {folder}: the run was computed on a CPU, which says nothing about {machine.name}; set the "
            "folder of a run on such a GPU",
        )
    try:
        config, _ = config_load.load(["--config", str(folder / "config.yaml")])
        hf_config, data, world = read_model(config), load_data(config), processes_of(folder)
    except UserError as error:  # names an option of the run, which `solopo plan` was not called with
        raise error.at(f"{FLAG} {folder}") from None
    groups = [data.train.groups[index] for index in run_schedule(config, data).step(int(row["step"]) - 1)]
    pack, packs = _typical_pack(config, hf_config, groups, world, device)
    outcomes = outcomes_of(tasks_of(config, hf_config, pack, packs, world, device))
    if isinstance(outcomes, str):
        raise UserError("rehearsal-failed", f"{FLAG} {run_folder}: {outcomes}")
    name = f"{machine.name}, calibrated by {run_folder}"
    return calibrated(outcomes, config, world, packs, machine, float(row["seconds"]), name)


def _median_step(folder: Path) -> Row:
    try:
        steps = read_run(str(folder)).train
    except UserError as error:
        raise error.at(FLAG) from None
    rows = [row for row in steps[1:] if finite(row.get("seconds")) and "skipped" not in row]
    if not rows:
        raise UserError(
            "run-without-steps", f"{FLAG} {folder}: metrics.jsonl has no second step; calibrate by two or more"
        )
    rows.sort(key=lambda row: row["seconds"])
    return rows[len(rows) // 2]


def _typical_pack(
    config: Config, hf_config: PretrainedConfig, groups: Sequence[TokenGroup], world: int, device: str
) -> tuple[list[TokenGroup], int]:
    """Returns the groups of the pack of mean cost, of the process with the most work, and how many packs it has."""
    width, windows, copies = width_of_cost(hf_config), windows_of(hf_config), data_parallel_size(config.parallel, world)
    plan = plan_step(groups, width, copies, config, device, windows)
    share = plan.shares[plan.loads.index(max(plan.loads))]

    def cost(pack: Sequence[int]) -> float:
        return sum(attention_cost(groups[place], width, config.data.share_prompts, windows) for place in pack)

    mean = sum(map(cost, share)) / len(share)
    pack = min((pack for pack in share if pack), key=lambda pack: abs(cost(pack) - mean))
    return [groups[place] for place in pack], len(share)
