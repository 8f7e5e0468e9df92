"""`solopo env`: versions, devices, cores and memory of this machine, for setup and bug reports."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch  # before Transformer Engine, which finds NCCL through it
from torch.cuda import nccl

from megatron_solopo import __version__
from megatron_solopo.arguments import Parser
from megatron_solopo.config import FP8_MULTIPLES

Facts = dict[str, Any]
"""What is printed as JSON: texts, numbers, flags, and more of these."""

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")


def package_version(name: str) -> str | None:
    """Returns the installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> float:
    """Processor cores that this process may use: its affinity, limited by the container."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(limit) == 2 and limit[0] != "max":
        cores = min(cores, int(limit[0]) / int(limit[1]))
    return cores


def memory_gib() -> dict[str, float]:
    """Main memory in GiB: ``total`` (or the container's limit if that is lower) and ``available``."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        used = _first_line("/sys/fs/cgroup/memory.current")
        total = int(limit)
        available = min(available, total - int(used)) if used.isdigit() else min(available, total)
    return {"total": round(total / 2**30, 1), "available": round(available / 2**30, 1)}


@functools.cache
def transformer_engine() -> Facts:
    """Whether Transformer Engine can be imported (``found``), or is installed and cannot (``broken``), and its use."""
    if importlib.util.find_spec("transformer_engine") is None:
        return {"found": False, "broken": False, "version": None, "note": "optional"}
    version = package_version("transformer-engine")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build for another torch or CUDA raises many kinds
        note = f"installed, but its import fails: {_brief(error)}"
        return {"found": False, "broken": True, "version": version, "note": note}
    if not torch.cuda.is_available():
        return {"found": True, "broken": False, "version": version, "note": "not used: it needs a CUDA device"}
    # megatron-core uses its fused Adam and gradient norms whenever it is installed.
    used = "used for the optimizer; for layers with --transformer-impl transformer_engine"
    return {"found": True, "broken": False, "version": version, "note": used}


def fp8_refusals() -> dict[str, str]:
    """FP8 recipe -> why this GPU does not support it, "" if it does; needs Transformer Engine."""
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")  # optional
    checks = {"mxfp8": quantization.check_mxfp8_support, "blockwise": quantization.check_fp8_block_scaling_support}
    answers = {recipe: checks.get(recipe, quantization.check_fp8_support)() for recipe in FP8_MULTIPLES}
    return {recipe: "" if possible else reason.rstrip(".") for recipe, (possible, reason) in answers.items()}


def nvidia_apex() -> Facts:
    """Whether NVIDIA Apex is installed; `apex` on PyPI is an unrelated package and does not count.

    Only files are checked, because importing the unrelated package may have side effects.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return {"found": False, "note": "optional"}
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return {"found": False, "note": "the installed 'apex' is PyPI's unrelated package, not NVIDIA's"}
    if importlib.util.find_spec("amp_C") is None:
        return {"found": True, "note": "without its CUDA extensions, so Megatron Core does not use it"}
    return {"found": True, "note": ""}


def cuda() -> Facts:
    """Returns the CUDA devices that torch sees, or why there are none."""
    driver = _first_line("/proc/driver/nvidia/version")
    facts: Facts = {
        "found": torch.cuda.is_available(),
        "torch_built_for": torch.version.cuda,
        "driver": driver.split("Kernel Module")[-1].split("(")[0].strip() or None,
        "devices": [],
        "note": "",
    }
    if facts["found"]:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "compute_capability": f"{properties.major}.{properties.minor}",
                }
            )
        facts["nccl"] = ".".join(map(str, nccl.version()))
    elif not facts["driver"]:
        facts["note"] = "no NVIDIA driver on this machine"
    elif torch.version.cuda is None:
        facts["note"] = "there is an NVIDIA driver, but this torch is built without CUDA"
    else:
        facts["note"] = "there is an NVIDIA driver, but torch sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return facts


def collect() -> Facts:
    """Returns all facts, as `solopo env --json` prints them."""
    gpu, engine = cuda(), transformer_engine()
    return {
        "megatron_solopo": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": "cuda" if gpu["found"] else "cpu",
        "cuda": gpu,
        "transformer_engine": engine,
        "fp8_refusals": fp8_refusals() if gpu["found"] and engine["found"] else None,
        "nvidia_apex": nvidia_apex(),
        "cores": usable_cores(),
        "memory_gib": memory_gib(),
    }


def describe(facts: Facts) -> str:
    """Returns the facts as readable lines."""
    gpu = facts["cuda"]
    rows = [("megatron_solopo", facts["megatron_solopo"]), ("python", facts["python"]), ("system", facts["system"])]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    if gpu["found"]:
        rows.append(("CUDA", f"{gpu['torch_built_for']}, NCCL {gpu['nccl']}, driver {gpu['driver'] or 'unknown'}"))
        for index, device in enumerate(gpu["devices"]):
            capability = device["compute_capability"]
            text = f"{device['name']}, {device['memory_gib']} GiB, compute capability {capability}"
            rows.append((f"  GPU {index}", text))
    else:
        built = f"for CUDA {gpu['torch_built_for']}" if gpu["torch_built_for"] else "without CUDA"
        rows.append(("CUDA", f"not found ({gpu['note']}; torch is built {built})"))
    for label, key in (("Transformer Engine", "transformer_engine"), ("NVIDIA Apex", "nvidia_apex")):
        fact = facts[key]
        state = fact.get("version") or "found" if fact["found"] else "not found"
        rows.append((label, f"{state} ({fact['note']})" if fact["note"] else state))
    for recipe, reason in (facts["fp8_refusals"] or {}).items():
        rows.append((f"  FP8 {recipe}", f"not on this GPU ({reason})" if reason else "possible"))
    memory = facts["memory_gib"]
    rows.append(("cores", f"{facts['cores']:g}"))
    rows.append(("memory", f"{memory['total']} GiB, {memory['available']} GiB of it available"))
    rows.append(("device", f"{facts['device']} (for --device auto)"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Prints versions, devices, cores and memory of this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of readable lines")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else describe(facts))
    return 0


def _first_line(path: str) -> str:
    """Returns the first line of a system file; "" if the file cannot be read."""
    try:
        with open(path, encoding="utf-8") as lines:
            return lines.readline().strip()
    except OSError:
        return ""


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
