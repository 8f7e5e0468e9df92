"""Converts models under layouts, in one launch: Hugging Face to Megatron to Hugging Face; run by test_conversion.py."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_solopo.config import Config  # noqa: E402
from megatron_solopo.parallel import platform  # noqa: E402
from megatron_solopo.parallel.layouts import parse_layout  # noqa: E402


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not bit-equal, or that one folder lacks."""
    from megatron_solopo.conversion.hf_folder import TensorReader

    ours, theirs = TensorReader(one), TensorReader(other)
    wrong = ours.names() ^ theirs.names()
    wrong |= {name for name in ours.names() & theirs.names() if not torch.equal(ours.get(name), theirs.get(name))}
    return sorted(wrong)


def convert(here: platform.Platform, source: Path, layout: str, work: Path, before: Path | None) -> dict[str, list]:
    """What comes back from a layout: from the Hugging Face folder, and from the Megatron folder of another layout."""
    from megatron_solopo.conversion.companions import Companions, config_json
    from megatron_solopo.conversion.hf import save_folder
    from megatron_solopo.conversion.megatron_folder import save_megatron_folder
    from megatron_solopo.conversion.start import load_start
    from megatron_solopo.model.build import read_hf_config
    from megatron_solopo.training.engine import build_chunks, initialize_parallel

    config = Config()
    config.parallel = parse_layout(layout).applied(config.parallel)
    hf_config = read_hf_config(source)
    initialize_parallel(config)
    found = {}
    for name, start in {"hugging face": source, "megatron": before}.items():
        if start is None:
            continue
        models = build_chunks(hf_config, config, torch.float32)
        load_start(models, hf_config, start)
        save_folder(models, hf_config, source, work / f"{name}-hf", max_shard_size="40KB")
        dist.barrier()
        found[name] = differences(source, work / f"{name}-hf") if dist.get_rank() == 0 else []
    companions = Companions(source, config_json(source, hf_config, torch.float32))
    save_megatron_folder(models, companions, work / "megatron")
    del models
    platform.end_model_parallel()
    return found


def main(plan: Path) -> None:
    here = platform.start("cpu")
    cases = json.loads(plan.read_text())
    found = {}
    for name, layouts in cases["models"].items():
        before = None
        for number, layout in enumerate(layouts):
            work = plan.parent / f"{name}-{number}"
            found[f"{name} {layout}"] = convert(here, Path(cases["folder"]) / name, layout, work, before)
            before = work / "megatron"
    if dist.get_rank() == 0:
        (plan.parent / "found.json").write_text(json.dumps(found))
    platform.stop(here)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
