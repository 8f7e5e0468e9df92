"""Checks and measures a GPU in one unattended command: correctness, kernels, training, speed, memory.

    python tools/gpu_suite.py --output gpu_suite                     # on a CUDA machine
    python tools/gpu_suite.py --dry-run --output gpu_suite           # every cell on the CPU, with small shapes

Its cells (tools/gpu/cells.py) run one after the other. Each runs in a process that is forked after all imports, and is
killed after its time limit. Every figure is appended to OUTPUT/results.jsonl and flushed as soon as it is measured. A
failure is a result, and the exit status is 0 (2 for a wrong command line). tools/gpu_report.py writes the tables of
docs/gpu.md from the results.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [
    str(ROOT / folder) for folder in ("", "tools", "examples/benchmarks", "tests", "tests/distributed", "tests/gpu")
]
sys.path[:0] = FOLDERS
# Asking for CUDA's devices must not start CUDA: a process that did cannot fork ones that compute.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gpu.cells import CELLS, Cell  # noqa: E402
from gpu.record import RESULTS, Recorder, Skipped, append, brief, read  # noqa: E402

TAIL = 3000
"""Characters of a cell's output that are kept."""

PRINTED = 9500
"""Characters of the table at the end."""

WARM = ("transformers", "megatron_solopo.training.trainer", "gpu.models", "gpu.kernels", "gpu.context", "gpu.traces")
WARM_ENGINE = ("transformer_engine.pytorch", "megatron_solopo.model.te_layers", "gpu.engine")
"""What is imported before forking; torch comes first, because Transformer Engine finds NCCL through it."""

BAD_FORK = ("Cannot re-initialize CUDA in forked subprocess", "CUDA error: initialization error")
"""The error of CUDA in a process whose parent had started it."""

SKIPPED, FAILED = 3, 1
"""Exit statuses of a cell's process."""


def options_of(argv: list[str] | None) -> argparse.Namespace:
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="gpu_suite", metavar="DIR", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--budget-s", type=float, default=400, metavar="S", help="seconds in all (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="CELL", help=f"of {', '.join(names)}")
    parser.add_argument("--resume", metavar="FILE", help="an earlier results.jsonl: what is ok there is not run again")
    parser.add_argument("--dry-run", action="store_true", help="every cell on the CPU, shapes cut")
    parser.add_argument(
        "--te-site", metavar="DIR", help="folder with Transformer Engine, on the path of its cells alone"
    )
    parser.add_argument("--max-files", type=int, default=8, metavar="N", help="files to leave (default: %(default)s)")
    parser.add_argument("--max-file-mib", type=float, default=16, metavar="M", help="MiB a file (default: %(default)s)")
    parser.add_argument(
        "--write-answers", action="store_true", help="compute the oracle's float64 answers (tests/gpu) and do no more"
    )
    # How the suite starts itself: for one cell, and for all cells with Transformer Engine on the path.
    parser.add_argument("--cell", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--with-transformer-engine", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the cells; see ``--help``."""
    options = options_of(argv)
    output = Path(options.output).resolve()
    if options.write_answers:
        import torch
        from gpu import answers

        torch.save(answers.compute(), answers.FILE)
        print(f"wrote {answers.FILE} ({answers.FILE.stat().st_size / 2**20:.2f} MiB)")
        return 0
    if options.cell:
        return work(next(cell for cell in CELLS if cell.name == options.cell), output, options.dry_run)
    chosen = [cell for cell in CELLS if not options.only or cell.name in options.only]
    if options.with_transformer_engine:
        Suite(options, output, options.with_transformer_engine).run([c for c in chosen if c.transformer_engine])
        return 0
    from megatron_solopo.data.options import check_outputs

    earlier = read(Path(options.resume)) if options.resume else []
    check_outputs([("--output", output / RESULTS)], [])
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text("")
    done = {r["cell"] for r in latest_statuses(earlier).values() if r["status"] == "ok"}
    for record in earlier:
        if record["cell"] in done:
            append(output / RESULTS, record)
    suite = Suite(options, output, time.time() + options.budget_s)
    left = [cell for cell in chosen if cell.name not in done]
    for apart, cells in itertools.groupby(left, lambda cell: cell.transformer_engine and not options.dry_run):
        (suite.run_with_transformer_engine if apart else suite.run)(list(cells))
    table = table_of(read(output / RESULTS))
    (output / "table.md").write_text(table, encoding="utf-8")
    trim(output, options.max_files, options.max_file_mib)
    print(table if len(table) <= PRINTED else table[:PRINTED] + f"\n... the rest in {output / 'table.md'}", flush=True)
    return 0


class Suite:
    """A process that runs cells one after the other.

    Args:
        deadline: by time.time(): no cell starts that is not expected to end before.
    """

    def __init__(self, options: argparse.Namespace, output: Path, deadline: float) -> None:
        self.options, self.output, self.deadline = options, output, deadline
        self.dry, self.forks, self.warm = options.dry_run, hasattr(os, "fork"), False

    def run(self, cells: list[Cell]) -> None:
        for cell in cells:
            refusal = self.refusal(cell)
            if refusal:
                self.note(cell, "skipped", 0.0, refusal)
                continue
            if not self.warm:
                self.prepare()
            status, seconds, tail = self.attempt(cell)
            if self.forks and any(text in tail for text in BAD_FORK):
                self.forks = False
                status, seconds, tail = self.attempt(cell)
            self.note(cell, status, seconds, tail)

    def refusal(self, cell: Cell) -> str:
        """Why a cell is not run, or nothing."""
        import torch

        if not self.dry and not torch.cuda.is_available():
            return "torch sees no CUDA device; --dry-run runs on the CPU"
        if self.dry and not cell.on_cpu:
            return "needs CUDA"
        left = self.deadline - time.time()
        return f"{left:.0f} s are left, expected {cell.expected:.0f}" if not self.dry and left < cell.expected else ""

    def prepare(self) -> None:
        """Imports what cells need, and checks whether this process may fork ones that use CUDA."""
        start, self.warm = time.monotonic(), True
        warnings.simplefilter("ignore")  # of imports, and of threads that no fork has
        if not self.options.with_transformer_engine:
            hide_transformer_engine()
        for name in (*WARM, *(WARM_ENGINE if self.options.with_transformer_engine else ())):
            try:
                importlib.import_module(name)
            except Exception as error:  # the cells will report it again
                print(f"import {name}: {brief(error)}", flush=True)
        import torch

        if torch.cuda.is_initialized() or threading.active_count() > 1:
            self.forks = False
        record = {"cell": "imports", "key": "seconds", "value": round(time.monotonic() - start, 1), "unit": "s"}
        append(self.output / RESULTS, record | {"t": round(time.time(), 3)})

    def cap(self, cell: Cell) -> float:
        """Seconds after which a cell is killed."""
        return 600.0 if self.dry else min(cell.cap, max(cell.expected, self.deadline - time.time()))

    def note(self, cell: Cell, status: str, seconds: float, tail: str) -> None:
        record = {"cell": cell.name, "status": status, "seconds": round(seconds, 1)}
        append(self.output / RESULTS, record | ({"tail": tail[-TAIL:]} if status != "ok" else {}))
        print(f"{cell.name:<20} {status:<10} {seconds:6.1f} s  {last_line(tail) if status != 'ok' else ''}", flush=True)

    def attempt(self, cell: Cell) -> tuple[str, float, str]:
        """Returns (status, seconds, end of the output) of a cell, which runs in a separate process."""
        cap, start = self.cap(cell), time.monotonic()
        reading, writing = os.pipe()
        sys.stdout.flush()
        if self.forks:
            child = os.fork()
            if child == 0:
                try:
                    os.setsid()
                    os.dup2(writing, 1), os.dup2(writing, 2)
                    os.close(reading)
                    os._exit(work(cell, self.output, self.dry, cap))
                finally:
                    os._exit(FAILED)
        else:
            argv = [sys.executable, __file__, "--cell", cell.name, "--output", str(self.output)]
            argv += ["--dry-run"] if self.dry else []
            # Not this process's hidden Transformer Engine: PYTHONPATH decides.
            child = subprocess.Popen(argv, stdout=writing, stderr=writing, start_new_session=True).pid
        os.close(writing)
        status, tail = watch(child, reading, start + cap)
        seconds = time.monotonic() - start
        if status == -signal.SIGKILL and seconds >= cap or status == FAILED and seconds >= cap - 3:
            return "timeout", seconds, tail
        if status < 0:
            return f"killed by {signal.Signals(-status).name}", seconds, tail
        return {0: "ok", SKIPPED: "skipped"}.get(status, "failed"), seconds, tail

    def run_with_transformer_engine(self, cells: list[Cell]) -> None:
        """Runs cells in a process that imports Transformer Engine. Other cells do not import it, since megatron-core
        would use its Adam, and a broken library of it would end every cell."""
        runnable = [cell for cell in cells if not self.refusal(cell)]
        for cell in cells:
            if cell not in runnable:
                self.note(cell, "skipped", 0.0, self.refusal(cell))
        if not runnable:
            return
        site = self.options.te_site
        paths = [*([str(Path(site).resolve())] if site else []), os.environ.get("PYTHONPATH", "")]
        argv = [sys.executable, __file__, "--with-transformer-engine", str(self.deadline), "--output", str(self.output)]
        argv += ["--only", *(cell.name for cell in runnable)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.run(argv, env=environment)
        for cell in runnable:
            if cell.name not in latest_statuses(read(self.output / RESULTS)):
                self.note(cell, "failed", 0.0, f"the process of its cells ended with {process.returncode}")


def hide_transformer_engine() -> None:
    """Makes it impossible to import in this process and those it forks."""
    sys.modules.update(dict.fromkeys(("transformer_engine", "transformer_engine.pytorch")))


def work(cell: Cell, output: Path, dry: bool, cap: float | None = None) -> int:
    """Returns what the process of a cell does; the exit status."""
    if cap is not None:
        faulthandler.dump_traceback_later(max(cap - 3, 1), exit=True)
    if not cell.transformer_engine:
        hide_transformer_engine()
    folder = Path(tempfile.mkdtemp(prefix=f"solopo-{cell.name}-"))
    out = Recorder(cell.name, output, folder, dry)
    try:
        if not dry:
            from megatron_solopo.parallel.platform import expand_segments

            expand_segments()
            wait_for_memory()
        module, function = cell.work.split(":")
        getattr(importlib.import_module(f"gpu.{module}"), function)(out)
    except Skipped as reason:
        print(reason, flush=True)
        return SKIPPED
    except BaseException as error:
        traceback.print_exc()
        print(brief(error), flush=True)
        return FAILED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
    if out.failures:
        print("; ".join(out.failures), flush=True)
    return FAILED if out.failures else 0


def wait_for_memory(seconds: float = 10.0) -> None:
    """Until the device memory of the cell before, which may have been killed, is free."""
    import torch

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        free, total = torch.cuda.mem_get_info()
        if free > 0.95 * total:
            return
        time.sleep(0.2)


def watch(child: int, reading: int, deadline: float) -> tuple[int, str]:
    """Returns (exit status, minus the signal's number; end of the output) of a process, killed at the deadline with all
    that it started."""
    tail, status = b"", None
    while True:
        ready, _, _ = select.select([reading], [], [], 0.05)
        data = os.read(reading, 65536) if ready else b""
        tail = (tail + data)[-4 * TAIL :]
        if status is not None and not data:
            break  # a process of the cell's that lives on may hold the pipe open
        if status is None:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > deadline:
                kill_group(child)
            elif ready and not data:
                time.sleep(0.05)
    kill_group(child)
    os.close(reading)
    return status, tail.decode(errors="replace").strip()[-TAIL:]


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def latest_statuses(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["cell"]: record for record in records if "status" in record}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def table_of(records: list[dict[str, Any]]) -> str:
    """Returns all figures as a list for a person, the last ones of each cell."""
    statuses = latest_statuses(records)
    lines = ["| cell | status | seconds |", "|---|---|---|"]
    for name, record in statuses.items():
        lines.append(f"| {name} | {record['status']} | {record['seconds']} |")
    for name, record in statuses.items():
        lines += ["", f"{name}: {record['status']}" + (f" ({last_line(record['tail'])})" if record.get("tail") else "")]
        figures = {r["key"]: r for r in records if r["cell"] == name and "key" in r}
        lines += [f"  {key} = {r['value']} {r['unit']}".rstrip() for key, r in figures.items()]
    return "\n".join(lines) + "\n"


def trim(folder: Path, files: int, mib: float) -> None:
    """Leaves so many files, none larger: the results first."""
    first = [RESULTS, "table.md", "env.txt"]
    present = sorted(
        (path for path in folder.iterdir() if path.is_file()),
        key=lambda path: (first.index(path.name) if path.name in first else len(first), path.name),
    )
    small = [path for path in present if path.stat().st_size <= mib * 2**20]
    for path in present:
        if path not in small[:files]:
            print(f"{path.name} is not kept ({path.stat().st_size / 2**20:.1f} MiB)", flush=True)
            path.unlink()


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
