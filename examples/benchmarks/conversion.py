"""Time and memory of converting a checkpoint, beside copying its files.

    python examples/benchmarks/conversion.py --gigabytes 4
    python examples/benchmarks/conversion.py --config Qwen2.5-7B-Instruct.config.json --tensor 2 --pipeline 2 --kill

A random model in bfloat16, in the shape of a small Qwen2.5 (tied embeddings of 151,936 rows) or of a config.json, is
converted from Hugging Face to Megatron and back by separate commands, and each is compared with copies of the files it
read, before and after it. The processor's seconds (user and system, of all processes) are listed beside the
clock's, which other work on the machine makes longer; those of the same command on a tiny model are taken off both.

Memory is that of the largest process: anonymous pages (what it allocated, RssAnon of /proc/PID/status, read every
20 ms) and all resident pages, of which those of mapped files belong to the file cache and are given back on demand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from megatron_solopo.conversion.hf_folder import TensorReader, write_folder
from megatron_solopo.conversion.hf_weights import stored_shapes
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.model.hf_config import read_config_file

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, HEADS, KV_HEADS, ROWS = 2048, 8192, 16, 4, 151_936
SETTLED = 10
"""Seconds until the memory of deleted files is as free as before. A virtual machine may return it to its host, and
pays when it is used again: copying and converting must find the same."""

NUMBERS = torch.randint(-30000, 30000, (2**22,), dtype=torch.int16, generator=torch.Generator().manual_seed(1))


def tensor_of(name: str, shape: torch.Size) -> Tensor:
    """Numbers that do not matter, but differ by tensor and place; the same again for the same name."""
    count, start = shape.numel(), zlib.crc32(name.encode()) % NUMBERS.numel()
    return NUMBERS.roll(start).repeat(-(-count // NUMBERS.numel()))[:count].view(torch.bfloat16).view(shape)


def small(gigabytes: float) -> Qwen2Config:
    """A small Qwen2.5 of about this size."""
    embedding = 2 * ROWS * HIDDEN
    shapes = stored_shapes(_small(1)).items()
    a_layer = 2 * sum(shape.numel() for name, shape in shapes if name.startswith("model.layers."))
    return _small(max(1, round((gigabytes * 1e9 - embedding) / a_layer)))


def _small(layers: int) -> Qwen2Config:
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


def shapes_of(hf_config: PretrainedConfig) -> dict[str, torch.Size]:
    """The tensors of a folder."""
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    return {name: shape for name, shape in stored_shapes(hf_config).items() if name not in tied}


def tiny(folder: Path) -> Path:
    """A model of no size."""
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    AutoModelForCausalLM.from_config(Qwen2Config(**shape, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Cost:
    """Seconds until all is on the disk, the processor's seconds, and peaks of the largest process in GiB."""

    seconds: float
    processor: float
    anonymous: float = 0.0
    resident: float = 0.0


def tree(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [each for child in (task / "children").read_text().split() for each in tree(int(child))]
    return found


class Peaks:
    """The largest memory of a process in a tree of processes, in KiB, while it runs."""

    def __init__(self, root: int) -> None:
        self._root, self.anonymous, self.resident = root, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for process in tree(self._root):
                with contextlib.suppress(OSError, KeyError):
                    lines = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
                    status = {words[0]: int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmRSS:")}
                    self.anonymous = max(self.anonymous, status["RssAnon:"])
                    self.resident = max(self.resident, status["VmRSS:"])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def flush(folder: Path) -> None:
    """Waits until the files of a folder are on the disk; others' files do not matter."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def written(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def convert(
    options: argparse.Namespace, target: Path, *arguments: object, writers: int = 0, kill_at: float | None = None
) -> Cost:
    """Runs a conversion in the layout of the options.

    Args:
        writers: run on so many processes without a layout instead; 0: in the layout.
        kill_at: kill all its processes when its unfinished target has so many bytes.
    """
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py"]
    layout: list[object] = []
    processes = writers or options.tensor * options.pipeline
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        command.append(ROOT / "tools" / "convert_checkpoint.py")
    if not writers:
        layout = ["--tensor-model-parallel-size", options.tensor, "--pipeline-model-parallel-size", options.pipeline]
    words = [str(word) for word in (*command, *arguments, *layout, "--device", "cpu")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    start = time.monotonic()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    peaks = Peaks(process.pid)
    if kill_at is not None:
        while written(Path(f"{target}.partial")) < kill_at and not target.exists():
            time.sleep(0.05)
        for running in tree(process.pid):
            os.kill(running, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    peaks.stop()
    if status and kill_at is None:
        sys.exit(f"{' '.join(map(str, arguments))} failed")
    flush(target)
    seconds, processor = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    return Cost(seconds, processor, peaks.anonymous / 2**20, peaks.resident / 2**20)


def start_up(options: argparse.Namespace, target: Path, *words: object, writers: int = 0) -> Cost:
    """What a command costs without weights."""
    cost = convert(options, target, *words, writers=writers)
    print(
        f"a tiny model: {cost.seconds:.1f} s, of the processor {cost.processor:.1f} s, taken off below; "
        f"{cost.anonymous:.2f} GiB anonymous"
    )
    return cost


def copy(source: Path, target: Path) -> Cost:
    """Copies a folder."""
    start, before = time.monotonic(), time.process_time()
    shutil.copytree(source, target)
    flush(target)
    cost = Cost(time.monotonic() - start, time.process_time() - before)
    shutil.rmtree(target)
    time.sleep(SETTLED)
    return cost


def report(label: str, cost: Cost, copies: tuple[Cost, Cost] | None = None) -> None:
    ratios, peaks = "", ""
    if copies is not None:
        seconds, processor = (sum(getattr(c, name) for c in copies) / 2 for name in ("seconds", "processor"))
        ratios = f"{cost.seconds / seconds:>7.2f} {cost.processor / processor:>7.2f}"
        peaks = f"{cost.anonymous:>10.2f} {cost.resident:>9.2f}"
    print(f"{label:<22} {cost.seconds:>8.1f} {cost.processor:>10.1f} {ratios:>15} {peaks}", flush=True)


def measure(
    options: argparse.Namespace, label: str, source: Path, target: Path, idle: Cost, *words: object, writers: int = 0
) -> None:
    """Prints the cost of a conversion, and of copies before and after it."""
    before = copy(source, source.with_name("copy"))
    report("copy", before)
    if options.kill:
        convert(options, target, *words, writers=writers, kill_at=written(source) / 2)
        left = [path for path in target.parent.iterdir() if path.name.startswith(target.name)]
        kept = sum(file.stat().st_size for path in left for file in path.glob("*.safetensors")) / 1e9
        names = ", ".join(path.name for path in left)
        print(
            f"killed at half; left behind: {names}, {kept:.2f} GB of it complete; the same command again:", flush=True
        )
    cost = convert(options, target, *words, writers=writers)
    after = copy(source, source.with_name("copy")) if options.copies > 1 else before
    cost = Cost(cost.seconds - idle.seconds, cost.processor - idle.processor, cost.anonymous, cost.resident)
    report(label, cost, (before, after))
    if options.copies > 1:
        report("copy", after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights, about (default: %(default)s)")
    parser.add_argument("--config", help="config.json of a model, in place of --gigabytes")
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline parallel size (default: %(default)s)")
    parser.add_argument("--copies", type=int, choices=(1, 2), default=2, help="1: only before (default: %(default)s)")
    parser.add_argument(
        "--writers",
        nargs="+",
        type=int,
        default=[1],
        help="processes of megatron-to-hf, without a layout, one measurement each; 0: in the layout (default: 1)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of megatron-to-hf (default: %(default)s)")
    parser.add_argument("--kill", action="store_true", help="kill each conversion at half, and run it again")
    parser.add_argument("--folder", help="where to work (default: the system's folder for temporary files)")
    options = parser.parse_args()
    hf_config = read_config_file(Path(options.config)) if options.config else small(options.gigabytes)
    shapes = shapes_of(hf_config)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        (work / "empty").mkdir()
        hf, megatron, back = work / "hf", work / "megatron", work / "back"
        sidecar_files = SidecarFiles(work / "empty", hf_config.to_json_string())
        write_folder(
            hf, sidecar_files, shapes, torch.bfloat16, ((name, tensor_of(name, s)) for name, s in shapes.items())
        )
        largest = max(shape.numel() for shape in shapes.values()) * 2
        print(f"{written(hf) / 1e9:.2f} GB in {len(shapes)} tensors, largest {largest / 1e9:.2f} GB")
        print("load of the machine:", *os.getloadavg())
        model, of_model = tiny(work / "tiny"), work / "tiny-megatron"
        idle = start_up(options, of_model, "hf-to-megatron", "--hf-path", model, "--save", of_model)
        print(f"{'':<22} {'seconds':>8} {'processor':>10} {'ratio':>7} {'of CPU':>7} {'anonymous':>10} {'resident':>9}")
        measure(options, "hf-to-megatron", hf, megatron, idle, "hf-to-megatron", "--hf-path", hf, "--save", megatron)
        shutil.rmtree(hf)  # room for the way back
        words = "megatron-to-hf", "--load", megatron, "--save-hf", back, "--max-shard-size", options.max_shard_size
        for writers in options.writers:
            empty = "megatron-to-hf", "--load", of_model, "--save-hf", work / "tiny-back", "--overwrite"
            idle = start_up(options, work / "tiny-back", *empty, writers=writers)
            measure(options, f"megatron-to-hf, {writers}", megatron, back, idle, *words, writers=writers)
            print("every tensor came back bit by bit" if came_back(back, shapes) else "TENSORS DIFFER")
            shutil.rmtree(back)


def came_back(folder: Path, shapes: Mapping[str, torch.Size]) -> bool:
    reader = TensorReader(folder)
    return reader.names() == shapes.keys() and all(
        torch.equal(reader.get(name).view(torch.int16), tensor_of(name, shape).view(torch.int16))
        for name, shape in shapes.items()
    )


if __name__ == "__main__":
    main()
