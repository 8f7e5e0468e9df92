"""--profile and --nvtx: steps of some ranks under a profiler, and the phases of a step by name in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_solopo.config import OutputConfig
from megatron_solopo.config_checks import profiled_ranks
from megatron_solopo.training.engine import Engine

FOLDER = "profile"
"""Folder in the run folder of the traces."""

NAMES = {"forward-compute": "forward", "backward-compute": "backward", "all-grads-sync": "reduce"}
"""megatron-core's timer -> the phase's name; other timers keep theirs."""


class Profiler:
    """Profiles the steps of --profile on this rank.

    Torch's profiler writes a trace into the run folder; on CUDA without --use-pytorch-profiler the CUDA profiler is
    started and stopped, for ``nsys profile --capture-range cudaProfilerApi``.
    """

    def __init__(self, output: OutputConfig, on_cuda: bool) -> None:
        self._output, self._on_cuda = output, on_cuda
        self._rank = dist.get_rank()
        self._chosen = output.profile and self._rank in profiled_ranks(output)
        self._trace: profile | None = None
        self._running, self._first = False, 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Names what is done inside the block, where --nvtx is set."""
        return _named(name, self._on_cuda) if self._output.nvtx else nullcontext()

    def before_step(self, done: int) -> None:
        """Starts the profiler where the next step is the first one; ``done`` steps are done."""
        if not self._chosen or done != self._output.profile_step_start:
            return
        self._running, self._first = True, done + 1
        if self._on_cuda and not self._output.use_pytorch_profiler:
            torch.cuda.profiler.start()
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        self._trace = profile(activities=kinds, record_shapes=True, acc_events=True)
        self._trace.start()

    def after_step(self, done: int) -> Path | None:
        """Stops the profiler after its last step; returns the trace that was written, if any."""
        return self.close(done) if done == self._output.profile_step_end else None

    def close(self, done: int) -> Path | None:
        """Stops a profiler that is running; returns the trace that was written, if any."""
        if not self._running:
            return None
        self._running = False
        if self._trace is None:
            torch.cuda.profiler.stop()
            return None
        self._trace.stop()
        folder = Path(self._output.save) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}_steps{self._first}-{done}.json.gz"
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        return path


@contextmanager
def _named(name: str, on_cuda: bool) -> Iterator[None]:
    span = _Span(name, on_cuda)
    span.start()
    try:
        yield
    finally:
        span.stop()


class _Span:
    """A named range in the traces of torch's profiler, on CUDA in NVTX too."""

    def __init__(self, name: str, on_cuda: bool) -> None:
        self._name, self._on_cuda, self._record = name, on_cuda, record_function(name)

    def start(self, barrier: bool = False) -> None:
        if self._on_cuda:
            torch.cuda.nvtx.range_push(self._name)
        self._record.__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._record.__exit__(None, None, None)
        if self._on_cuda:
            torch.cuda.nvtx.range_pop()


class _Timers:
    """megatron-core's timers (``config.timers``) as ranges; a timer that is started is stopped under the same name."""

    def __init__(self, on_cuda: bool) -> None:
        self._on_cuda, self._open = on_cuda, dict[str, _Span]()

    def __call__(self, name: str, log_level: int | None = None) -> _Span:
        if name in self._open:
            return self._open.pop(name)
        self._open[name] = _Span(NAMES.get(name, name), self._on_cuda)
        return self._open[name]


def name_phases(engine: Engine) -> None:
    """Names forward, head, backward and reduce of each pack; call it where --nvtx is set."""
    on_cuda = engine.platform.name == "cuda"
    engine.chunks[0].config.timers = _Timers(on_cuda)  # the schedule reads the first chunk's config
    model = engine.models[-1]
    if model.post_process:  # between the layers and the end of the forward pass is the head
        spans: list[_Span] = []

        def begin(*ignored: object) -> None:
            spans.append(_Span("head", on_cuda))
            spans[-1].start()

        def end(*ignored: object) -> None:
            spans.pop().stop()

        model.decoder.register_forward_hook(begin)
        model.register_forward_hook(end)
