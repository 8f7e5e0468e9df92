"""Time and memory of converting a checkpoint, beside copying its files.

    python examples/benchmarks/conversion.py --gigabytes 4

A random model in the shape of a small Qwen2.5 (bfloat16, tied embeddings of 151,936 rows), converted from Hugging Face
to Megatron and back by separate processes. Their peak memory is compared with the weights, the largest tensor and
1 GB; their time with that of an interpreter that imports the same and does nothing, and with a copy of the files. The
processor's seconds (user and system) are listed beside the clock's, which other work on the machine makes longer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_solopo.conversion.hf_folder import write_folder
from megatron_solopo.conversion.sidecar_files import SidecarFiles

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, HEADS, KV_HEADS, ROWS = 2048, 8192, 16, 4, 151_936
SETTLED = 10
"""Seconds until the memory of deleted files is as free as before. A virtual machine may return it to its host, and
pays when it is used again: copying and converting must find the same."""


def shapes(layers: int) -> dict[str, torch.Size]:
    """Of every tensor of the model."""
    width, shared = HIDDEN, HIDDEN // HEADS * KV_HEADS
    of_a_layer = {
        "self_attn.q_proj.weight": (width, HIDDEN),
        "self_attn.k_proj.weight": (shared, HIDDEN),
        "self_attn.v_proj.weight": (shared, HIDDEN),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.bias": (shared,),
        "self_attn.v_proj.bias": (shared,),
        "self_attn.o_proj.weight": (HIDDEN, width),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_a_layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def tensors(layers: int) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, one at a time; their values do not matter, but each is another."""
    for name, shape in shapes(layers).items():
        yield name, torch.randint(-30000, 30000, shape, dtype=torch.int16).view(torch.bfloat16)


def config(layers: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=ROWS,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )


def tiny(folder: Path) -> Path:
    """A model of no size."""
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    AutoModelForCausalLM.from_config(Qwen2Config(**shape, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def convert(*arguments: object) -> tuple[float, float, float]:
    """(seconds until all is on the disk, the processor's seconds, peak resident memory in GB) of a conversion."""
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *arguments, "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    os.sync()  # what an earlier part left to write is not this one's
    start = time.monotonic()
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, arguments))} failed")
    os.sync()
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def copy(source: Path, target: Path) -> tuple[float, float]:
    """(seconds until all is on the disk, the processor's seconds) of copying a folder."""
    os.sync()
    time.sleep(SETTLED)
    start, before = time.monotonic(), time.process_time()
    shutil.copytree(source, target)
    os.sync()
    return time.monotonic() - start, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights, about (default: %(default)s)")
    parser.add_argument("--folder", help="where to work (default: the system's folder for temporary files)")
    options = parser.parse_args()
    embedding = 2 * ROWS * HIDDEN
    a_layer = 2 * sum(shape.numel() for shape in shapes(1).values()) - embedding
    layers = max(1, round((options.gigabytes * 1e9 - embedding) / a_layer))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        (work / "empty").mkdir()
        sidecar_files = SidecarFiles(work / "empty", config(layers).to_json_string())
        write_folder(work / "hf", sidecar_files, shapes(layers), torch.bfloat16, tensors(layers))
        size = sum(path.stat().st_size for path in (work / "hf").iterdir()) / 1e9
        bound = size + embedding / 1e9 + 1
        print(f"{size:.2f} GB, largest tensor {embedding / 1e9:.2f} GB; bound on memory {bound:.2f} GB")
        idle, idle_cpu, _ = convert("verify", "--hf-path", tiny(work / "tiny"))
        print(f"imports and a tiny model: {idle:.1f} s, of the processor {idle_cpu:.1f} s, taken off below")
        print(f"{'':<16} {'seconds':>8} {'of copying':>11} {'processor':>10} {'peak GB':>8}")
        for label, arguments in {
            "hf-to-megatron": ("hf-to-megatron", "--hf-path", work / "hf", "--save", work / "megatron"),
            "megatron-to-hf": ("megatron-to-hf", "--load", work / "megatron", "--save-hf", work / "back"),
        }.items():  # fmt: skip
            copied, copied_cpu = copy(work / "hf", work / "copy")
            shutil.rmtree(work / "copy")
            print(f"{'copy':<16} {copied:>8.1f} {1:>11.2f} {copied_cpu:>10.1f}")
            time.sleep(SETTLED)
            seconds, cpu, peak = convert(*arguments)
            seconds, cpu = seconds - idle, cpu - idle_cpu
            print(f"{label:<16} {seconds:>8.1f} {seconds / copied:>11.2f} {cpu:>10.1f} {peak:>8.2f}", flush=True)
        same = same_tensors(work / "hf", work / "back")
        print("every tensor came back bit by bit" if same else "TENSORS DIFFER")


def same_tensors(one: Path, other: Path) -> bool:
    from megatron_solopo.conversion.hf_folder import TensorReader

    ours, theirs = TensorReader(one), TensorReader(other)
    if ours.names() != theirs.names():
        return False
    return all(torch.equal(ours.get(n).view(torch.int16), theirs.get(n).view(torch.int16)) for n in ours.names())


if __name__ == "__main__":
    main()
