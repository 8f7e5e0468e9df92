"""The machine: what is installed, how fast its parts are, whether one process starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from importlib import metadata
from typing import Any

from gpu.record import Recorder, brief, host_milliseconds, milliseconds, synchronize


def machine_name() -> str:
    """Returns a name for files: the GPU's, or the CPU's architecture."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"cpu-{os.uname().machine.replace('_', '-')}"


def environment(out: Recorder) -> None:
    """Versions, and ceilings: no share of the machine can be above them."""
    import torch

    from megatron_solopo.environment import collect, describe

    facts = collect()
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()})
    (out.folder / "env.txt").write_text(describe(facts) + "\n\n" + "\n".join(packages) + "\n", encoding="utf-8")
    out.value("machine", machine_name())
    out.value("dry_run", out.dry)
    out.value("date", time.strftime("%Y-%m-%d", time.gmtime()))
    for name, version in facts["packages"].items():
        out.value(name, version)
    out.value("python", facts["python"])
    out.value("cores", facts["cores"])
    out.value("memory", facts["memory_gib"]["total"], "GiB")
    compiler = shutil.which("gcc")
    out.value("gcc", _first_line([compiler, "--version"]) if compiler else None)
    if out.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out.value("gpu", properties.name)
        out.value("gpu_memory", properties.total_memory / 2**30, "GiB")
        out.value("multiprocessors", properties.multi_processor_count)
        out.value("driver", facts["cuda"]["driver"])
        out.value("cuda", torch.version.cuda)
        out.value("cudnn", torch.backends.cudnn.version())
        out.value("nccl", facts["cuda"]["nccl"])
    with out.part("product"):
        size = 256 if out.dry else 8192
        a, b = (torch.randn(size, size, device=out.device, dtype=torch.bfloat16) for _ in range(2))
        out.value("product", 2 * size**3 / milliseconds(lambda: a @ b, out.device) / 1e9, "TFLOP/s")
    with out.part("copy"):
        count = 2**20 if out.dry else 2**31
        source, target = (torch.empty(count, device=out.device, dtype=torch.uint8) for _ in range(2))
        took = milliseconds(lambda: target.copy_(source), out.device)
        out.value("copy", 2 * count / took / 1e6, "GB/s read and written")
    for kind, pinned in (("pinned", True), ("pageable", False)):
        with out.part(f"to_device_{kind}"):
            out.need_cuda()
            host = torch.empty(2**30, dtype=torch.uint8, pin_memory=pinned)
            there = torch.empty_like(host, device="cuda")
            for key, target, source in ((f"to_device_{kind}", there, host), (f"to_host_{kind}", host, there)):
                took = milliseconds(
                    lambda target=target, source=source: target.copy_(source, non_blocking=True), "cuda"
                )
                out.value(key, 2**30 / took / 1e6, "GB/s")
    with out.part("pin"):
        out.need_cuda()
        took = host_milliseconds(lambda: torch.empty(2**32, dtype=torch.uint8, pin_memory=True), "cuda")
        out.value("pin", took / 4, "ms a GiB")


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def start_platform(out: Recorder) -> Any:
    """Returns the started platform: a lone process without rendezvous or, where NCCL refuses that, as torchrun starts
    one."""
    from megatron_solopo.parallel import platform

    try:
        return platform.start(out.device)
    except Exception as error:
        out.value("start_alone", f"failed: {brief(error)}")
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        return platform.start(out.device)


def start(out: Recorder) -> None:
    """One process, its process groups, and one step."""
    import torch
    import torch.distributed as dist

    from gpu.models import TINY, build, packs_of, step_of

    before = time.perf_counter()
    started = start_platform(out)
    out.value("backend", started.backend)
    out.value("start", time.perf_counter() - before, "s")
    one = torch.ones((), device=started.device)
    dist.all_reduce(one)
    out.require("all_reduce", one.item() == 1)
    dist.barrier()
    engine, config = build(out, started, TINY, torch.bfloat16, recompute=False)
    packs = packs_of(engine, config, 64, 512, 16)
    before = time.perf_counter()
    loss = step_of(engine, config, packs)()
    synchronize(out.device)
    out.value("first_step", time.perf_counter() - before, "s")
    out.require("loss_is_finite", bool(torch.isfinite(torch.tensor(loss))))
    if out.device == "cuda":
        out.value("allocator", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
