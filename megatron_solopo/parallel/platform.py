"""The two platforms, CUDA with NCCL and CPU with gloo, behind one object."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import itertools
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import restore_flash_attention_impl

from megatron_solopo import environment
from megatron_solopo.errors import LostProcess, UserError, system_reason
from megatron_solopo.parallel import cpu_shim, flash
from megatron_solopo.terminal import write_line


@dataclass(frozen=True)
class Platform:
    """The device of this process.

    Attributes:
        name: ``cuda`` or ``cpu``.
        device: the device of this process.
        backend: torch.distributed's backend.
        undo: removes the patches of megatron-core that `start` installed.
        return_pages: returns free memory to the system, see `return_freed_blocks`; None: there is none to return.
    """

    name: str
    device: torch.device
    backend: str
    undo: Callable[[], None]
    return_pages: Callable[[], object] | None = None

    def peak_memory_gib(self) -> float:
        """Returns the peak memory of this process since `reset_peak_memory`, in GiB: device memory on CUDA, resident
        set on CPU."""
        if self.name == "cuda":
            return torch.cuda.max_memory_reserved() / 2**30
        with contextlib.suppress(OSError):  # no /proc; the other figure is never reset
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

    def reset_peak_memory(self) -> bool:
        """Restarts `peak_memory_gib` from the current memory; returns False where the system does not allow that."""
        if self.name == "cuda":
            torch.cuda.empty_cache()  # freed memory counts as reserved until then
            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
        except OSError:
            return False
        return True

    def peak_allocated_gib(self) -> float | None:
        """Returns the peak device memory of tensors since `reset_peak_memory`, in GiB, or None on CPU.

        The rest of `peak_memory_gib` is cached or fragmented memory.
        """
        return torch.cuda.max_memory_allocated() / 2**30 if self.name == "cuda" else None


def resolve(device: str) -> str:
    """Resolves ``auto`` to ``cuda`` where a GPU is usable, else to ``cpu``; ``cuda`` may be another machine's."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def choose(device: str) -> str:
    """Resolves the device of this machine, see `resolve`.

    Raises:
        UserError: ``cuda`` was requested and torch sees no GPU.
    """
    device = resolve(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "cuda-missing",
            "--device cuda: torch sees no CUDA device here; use --device cpu, or check the driver with nvidia-smi",
        )
    return device


def start(device: str, timeout_minutes: float = 30.0, split_layers: bool = False) -> Platform:
    """Prepares this process: device, patches of megatron-core, and the default process group.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them
    there is one process. On CPU this must be called before megatron.core is imported.

    Args:
        timeout_minutes: how long a collective waits for a slow process.
        split_layers: whether processes share layers or sequences, see `limit_connections`.

    Raises:
        UserError: there is no GPU for this process.
    """
    if device != "cpu" and split_layers:
        limit_connections()  # before anything starts CUDA
    name = choose(device)
    if name == "cuda":
        expand_segments()
        faulthandler.enable()  # NCCL's watchdog ends a process with SIGABRT: this shows where it was
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "gpus-too-few",
                f"local rank {local_rank}: this machine has {torch.cuda.device_count()} GPUs; "
                "lower torchrun's --nproc_per_node to that number",
            )
        torch.cuda.set_device(local_rank)
        if split_layers and os.environ.get("RANK", "0") == "0" and (warning := too_many_connections()):
            write_line(f"warning: {warning}")
        engine = environment.transformer_engine()
        if engine["broken"] and os.environ.get("RANK", "0") == "0":
            write_line(f"warning: Transformer Engine is not used: {engine['note']}")
        # Where cuBLAS splits a bfloat16 product into several sums, torch's default rounds each of them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if (refused := flash.use_fastest()) and os.environ.get("RANK", "0") == "0":
            write_line(f"warning: {refused}")
        mended = cpu_shim.mend_on_cuda(engine["broken"])

        def undo() -> None:
            mended()
            restore_flash_attention_impl(_raise_warn=False)

        platform = Platform(name, torch.device("cuda", local_rank), "nccl", undo)
    else:
        return_pages = return_freed_blocks()
        platform = Platform(name, torch.device("cpu"), "gloo", cpu_shim.install(), return_pages)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, size = (HashStore(), 0, 1) if "RANK" not in os.environ else _store_of_this_start(timeout)
        dist.init_process_group(platform.backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return platform


_rendezvous: list[tuple[Store, int, int]] = []
"""torchrun's store, this process's rank and the number of processes, once they met."""

_starts = itertools.count(1)


def _store_of_this_start(timeout: timedelta) -> tuple[Store, int, int]:
    """A store with keys of its own for each `start` of the same processes.

    torch 2.11 names the default group alike each time (distributed_c10d.py, `_process_group_name`): a second one
    would find the addresses of the first in the store, and wait for connections that nobody accepts.
    """
    if not _rendezvous:
        _rendezvous.append(next(rendezvous("env://", timeout=timeout)))
    store, rank, size = _rendezvous[0]
    store.set_timeout(timeout)
    return PrefixStore(f"solopo/start/{next(_starts)}", store), rank, size


def expand_segments() -> None:
    """Lets torch's allocator grow its segments of device memory, unless the user configured the allocator.

    Packs differ in length and would fragment segments of fixed sizes. torch reads the variables when it allocates
    device memory for the first time (c10/cuda/CUDAAllocatorConfig.h), so this must be called before.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


MAPPED = 2**25
"""Bytes from which glibc gives a block on the CPU pages of its own: the largest default (mallopt(3)), above which older
versions refuse it; 128 MiB, which 2.36 takes, made no step faster."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""


def return_freed_blocks() -> Callable[[], object] | None:
    """Makes glibc return freed memory of the CPU to the system where that costs little, and returns a function that
    returns the rest; None where the user configured glibc's malloc, or there is another one.

    Blocks from `MAPPED` bytes have pages of their own, which go back when they are freed. Smaller tensors lie side by
    side in one heap, where kept activations break the space of freed ones into pieces that no tensor fits into: the
    function (malloc_trim(3)) returns the whole pages of these pieces. Pages of their own for all tensors would hold
    little less, but the system clears a page whenever it gives one out, and that was a sixth of a step.
    """
    chosen = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)  # of glibc
    if mallopt is None or trim is None or not (mallopt(M_MMAP_THRESHOLD, MAPPED) and mallopt(M_TRIM_THRESHOLD, 2**26)):
        return None
    return partial(trim, 0)


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Environment variable of CUDA: how many queues of kernels a device has."""


def limit_connections() -> None:
    """Gives the device one queue of kernels, unless the user chose a number.

    Tensor parallelism starts a collective before the product that overlaps it (megatron-core 0.19.2,
    tensor_parallel/layers.py:640), and only one queue keeps that order up to Hopper. CUDA reads the variable when it
    starts.
    """
    os.environ.setdefault(CONNECTIONS, "1")


def too_many_connections() -> str | None:
    """Returns a warning where the user chose several queues on a device that needs one; Megatron refuses that."""
    chosen = os.environ[CONNECTIONS]
    if chosen == "1" or torch.cuda.get_device_capability()[0] >= 10:  # from Blackwell on the order is kept
        return None
    return (
        f"{CONNECTIONS}={chosen} in the environment: with --tensor-model-parallel-size or --context-parallel-size "
        "above 1 collectives may start late up to Hopper; unset it, or set 1"
    )


def end_model_parallel() -> None:
    """Destroys megatron-core's process groups, so that another layout can be built; collective.

    megatron-core 0.19.2 only drops its references (parallel_state.py, `destroy_model_parallel`), and every such gloo
    group keeps three threads that poll. A group exists while an engine refers to it, so delete engines first.
    """
    from megatron.core import parallel_state  # not at the top: `start` must come before its import

    gc.collect()  # models and optimizers have reference cycles
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def stop(platform: Platform) -> None:
    """Destroys the process groups and removes the patches of megatron-core."""
    end_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    platform.undo()


def lost_process(error: RuntimeError) -> LostProcess | None:
    """Returns the error of a process that is gone or late, by what a collective raised, or None for any other error.

    gloo raises plain RuntimeErrors with its source file in front; NCCL and the rendezvous store have their own types,
    which they raise for other mistakes too. Where NCCL's watchdog acts first, no Python code runs any more: see
    `note_sudden_death` in training/exits.py.
    """
    text = str(error).lower()
    if "gloo" not in text and not isinstance(error, dist.DistError):
        return None
    if "timed out" in text or "timeout" in text:
        return LostProcess("process-timeout", "another process did not come in time")
    gone = (
        "closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process",
        "communicator was aborted",
    )  # fmt: skip
    return LostProcess("process-lost", "another process is gone") if any(words in text for words in gone) else None


@contextmanager
def explain_lost_process(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns what a collective raises when another process is lost into one line that refers to that process's message.

    Args:
        advice: returns the end of the line; called when the line is written.

    Raises:
        LostProcess: see `lost_process`.
    """
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise LostProcess(lost.code, f"{lost}; its message says why{advice()}") from None


def run_on_rank0(work: Callable[[], object]) -> str | None:
    """Runs file work on rank 0; returns the system's message where it fails, and None on the other ranks."""
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            return system_reason(error)
    return None


def first_error[Error: (str, UserError)](error: Error | None) -> Error | None:
    """Returns on every rank the error of the lowest rank that has one; collective."""
    errors: list[Error | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((error for error in errors if error), None)


def agreed[T](work: Callable[[], T], name: str) -> T:
    """Calls ``work``, which does not communicate, and returns its result on this rank; collective, where there are
    processes.

    Args:
        name: see `wait_for_all`.

    Raises:
        UserError: ``work`` raised one on some rank; every rank raises that of the lowest rank, with rank and machine
            in front where it is not rank 0.
    """
    result: T | None = None
    problem: UserError | None = None
    try:
        result = work()
    except UserError as error:
        if not dist.is_initialized():
            raise
        problem = error
    if dist.is_initialized():
        wait_for_all(name)
        for rank, (host, error) in enumerate(from_all_ranks(problem)):
            if error is not None:
                raise error.at(f"rank {rank} on {host}") if rank else error
    return cast(T, result)


def check_same(value: object, what: str) -> None:
    """Refuses a value that differs from rank 0's on some rank; collective, where there are processes.

    Args:
        what: the message, after rank and machine.

    Raises:
        UserError: a rank has another value.
    """
    values = from_all_ranks(value) if dist.is_initialized() else []
    for rank, (host, other) in enumerate(values):
        if other != values[0][1]:
            raise UserError("ranks-differ", f"rank {rank} on {host}: {what}")


def from_all_ranks[T](value: T) -> list[tuple[str, T]]:
    """Returns (machine, value) of every rank; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, (socket.gethostname(), value))
    return values


def first_of_node() -> bool:
    """Whether this is the first process that torchrun started on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def max_over_processes(value: float, device: torch.device) -> float:
    """Returns the largest value of all ranks; collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def wait_for_all(name: str, log_every: float = 60.0) -> None:
    """Waits until every rank calls this, without a time limit; a collective would end the run after
    --distributed-timeout-minutes. Collective.

    Args:
        name: the activity that is waited for; rank 0 logs it and the missing ranks every ``log_every`` seconds.
    """
    if dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    number = _waits[name] = _waits.get(name, 0) + 1
    keys = [f"solopo/wait/{name}/{number}/{other}" for other in range(size)]
    store.set(keys[rank], "arrived")
    logged = time.monotonic()
    pause = 0.001
    while not store.check(keys):
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        if rank == 0 and time.monotonic() - logged > log_every:
            missing = [other for other in range(size) if not store.check([keys[other]])]
            write_line(f"{name}: waiting for ranks {', '.join(map(str, missing[:16]))}")
            logged = time.monotonic()


_waits: dict[str, int] = {}
"""How often this process has called each wait; the same on every rank."""
