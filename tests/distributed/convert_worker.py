"""Converts models under layouts, in one launch: Hugging Face to Megatron to Hugging Face, and draws random ones; see
test_conversion.py."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import platform
from megatron_solopo.parallel.layouts import parse_layout

SEED = 11
"""Of the random weights."""

RESUMED = ("qwen2-tied", "qwen3_moe")
"""Models of which each layout also completes a Hugging Face folder that was left unfinished, and fails to write one."""


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not bit-equal, or that one folder lacks."""
    from megatron_solopo.conversion.hf_folder import TensorReader

    ours, theirs = TensorReader(one), TensorReader(other)
    wrong = ours.names() ^ theirs.names()
    wrong |= {name for name in ours.names() & theirs.names() if not torch.equal(ours.get(name), theirs.get(name))}
    return sorted(wrong)


class OneByOne:
    """Weights, and the most parameters that were filled and not emptied yet."""

    def __init__(self, weights: Any) -> None:
        self._weights, self._filled, self.most = weights, [], 0

    def fill(self, parameter: torch.nn.Parameter) -> None:
        self._weights.fill(parameter)
        self._filled.append(parameter)
        self.most = max(self.most, sum(one.untyped_storage().size() > 0 for one in self._filled))


def half_of(folder: Path, unfinished: Path) -> dict[str, int]:
    """Leaves what a killed process that wrote a folder would, every second file; file -> its number on the disk."""
    from megatron_solopo.conversion.shards import UNFINISHED

    unfinished.mkdir()
    (unfinished / UNFINISHED).write_text("the same")
    files = sorted(folder.glob("*.safetensors"))[::2]
    assert files
    return {Path(shutil.copy2(path, unfinished)).name: (unfinished / path.name).stat().st_ino for path in files}


def reported(save: Callable[[], None], target: Path) -> list[str]:
    """What is wrong with the report of a process that cannot write: the first one of the last replica of the model,
    on a file system with little room for a file."""
    from megatron.core import parallel_state

    experts = parallel_state.get_expert_data_parallel_world_size()
    divided = experts < parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    writer = 0 if divided else dist.get_process_group_ranks(parallel_state.get_data_parallel_group(True))[-1]
    dist.broadcast(place := torch.tensor(writer), 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits, problem = resource.getrlimit(resource.RLIMIT_FSIZE), ""
    if dist.get_rank() == int(place):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        save()
    except UserError as error:
        problem = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if dist.get_rank() > 0:
        return []
    where = f"rank {int(place)} on {socket.gethostname()}: " if place > 0 else ""
    expected = f"{where}--save-hf {target}: File too large; "
    return [*([] if problem.startswith(expected) else [problem]), *map(str, target.parent.glob(f"{target.name}*"))]


def convert(config: Config, source: Path, work: Path, before: Path | None) -> dict[str, list[str]]:
    """What comes back from a layout otherwise than it was: from the Hugging Face folder, from the Megatron folder of
    the layout before, and of the weights that the layout before drew."""
    from megatron_solopo.conversion.megatron_folder import save_megatron_folder
    from megatron_solopo.conversion.random_start import draw_start
    from megatron_solopo.conversion.save_folder import save_folder
    from megatron_solopo.conversion.sidecar_files import SidecarFiles, config_json
    from megatron_solopo.conversion.start import load_start, open_hf_weights
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_chunks

    hf_config, differing = read_hf_config(source), {}

    def compare(name: str, models: Any, expected: Path | None, made_of: str | None = None) -> None:
        save_folder(models, hf_config, source, work / name, max_shard_size="40KB", made_of=made_of)
        if expected is not None:
            differing[name] = differences(expected, work / name) if dist.get_rank() == 0 else []

    models = build_chunks(hf_config, config, torch.float32)
    draw_start(models, hf_config, SEED)
    compare("drawn", models, before / "drawn" if before else None)
    load_start(models, hf_config, source)
    compare("hugging face", models, source)
    if source.name in RESUMED:
        kept = half_of(work / "hugging face", work / "resumed.partial") if dist.get_rank() == 0 else {}
        compare("resumed", models, source, made_of="the same")
        assert all((work / "resumed" / file).stat().st_ino == number for file, number in kept.items()), "not kept"
        full = work / "full"
        differing["full"] = reported(lambda: compare("full", models, None, made_of="the same"), full)
    if before:
        models = build_chunks(hf_config, config, torch.float32)
        load_start(models, hf_config, before / "megatron")
        compare("megatron", models, source)
    sidecar_files = SidecarFiles(source, config_json(source, hf_config, torch.float32))
    models = build_chunks(hf_config, config, torch.float32)
    weights = OneByOne(open_hf_weights(models, hf_config, source, None))
    save_megatron_folder(models, sidecar_files, work / "megatron", weights)
    assert weights.most in (0, 1), f"{weights.most} parameters in memory at once"  # 0: another process writes them
    return differing


def main(argv: list[str]) -> int:
    """Reads a plan, {"layouts": layout -> names of models, "folder"}, and writes ``differing.json`` beside it."""
    from megatron_solopo.training.engine import initialize_parallel

    plan = Path(argv[0])
    warnings.filterwarnings("ignore")
    here = platform.start("cpu", timeout_minutes=2)
    cases = json.loads(plan.read_text())
    results: dict[str, dict[str, list[str]]] = {}
    before: dict[str, Path] = {}
    for layout, names in cases["layouts"].items():
        config = Config()
        config.parallel = parse_layout(layout).applied(config.parallel)
        initialize_parallel(config)
        for name in names:
            work = plan.parent / f"{name} {layout}"
            results[f"{name} {layout}"] = convert(config, Path(cases["folder"]) / name, work, before.get(name))
            before[name] = work
        platform.end_model_parallel()
    if dist.get_rank() == 0:
        (plan.parent / "differing.json").write_text(json.dumps(results))
    platform.stop(here)
    return 0
