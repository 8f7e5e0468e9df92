"""What a plan is made for, and a layout with its options: estimated, rehearsed, forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PretrainedConfig

from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.planning.estimate import on_host, peak
from megatron_solopo.planning.forecast import Forecast
from megatron_solopo.planning.machines import Machine
from megatron_solopo.planning.memory import Moment
from megatron_solopo.planning.process import Process
from megatron_solopo.planning.rehearse import Outcome
from megatron_solopo.planning.states import saved
from megatron_solopo.planning.table import UNITS

GIB = UNITS["GiB"]

PROCESS_GIB = 3.0
"""Host memory of a process with torch and CUDA's libraries. Assumed, not measured."""


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        config: of the run, not resolved for a layout; what is explicit in it is not varied.
        group: the longest example.
        limit: bytes that a process may hold.
    """

    hf_config: PretrainedConfig
    config: Config
    group: TokenGroup
    gpus: int
    limit: int
    machine: Machine

    def fixed(self, name: str) -> bool:
        return name in self.config.explicit

    @property
    def host_limit(self) -> float:
        """Bytes of main memory that a process may use: its GPU's share of the node's."""
        return self.machine.host_share().memory_gib * GIB if self.machine.host is not None else math.inf


@dataclass
class Candidate:
    """A layout that training would accept, with --micro-batch-size and what saves memory.

    Attributes:
        groups: of a pack.
        seconds: of a step, in closed form.
        outcomes: of the rehearsed stages; forecast: of a step, from them.
    """

    config: Config
    groups: int
    process: Process
    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)
    forecast: Forecast | None = None

    @property
    def packs(self) -> int:
        """Packs of a process and step."""
        return self.process.work.packs

    @cached_property
    def estimated(self) -> Moment:
        """The largest peak of `table.stages_that_matter`, in closed form."""
        moments = (peak(self.process, stage) for stage in self.process.key_stages)
        return max(moments, key=lambda moment: moment.total)

    @property
    def step(self) -> Forecast:
        """The forecast of a layout that was rehearsed."""
        assert self.forecast is not None
        return self.forecast

    @property
    def peak(self) -> Moment:
        """The largest moment of all rehearsed stages; the estimated one of a layout that was not rehearsed."""
        return max((outcome.peak for outcome in self.outcomes), key=lambda it: it.total, default=self.estimated)

    @property
    def kept_on_host(self) -> float:
        """Bytes that a process keeps on the host for its GPU; estimated where the layout was not rehearsed."""
        rehearsed = [float(outcome.host) for outcome in self.outcomes]
        return max(rehearsed or [on_host(self.process, stage) for stage in self.process.key_stages])

    @property
    def saved(self) -> float:
        """Bytes that a process copies to the host while it saves a checkpoint."""
        return max(saved(self.process, stage) for stage in self.process.key_stages)

    @property
    def host(self) -> float:
        """Bytes of host memory of a process at its largest, as far as they are counted."""
        return PROCESS_GIB * GIB + self.kept_on_host + self.saved

    def fits(self, request: Request) -> bool:
        return self.peak.total <= request.limit and self.host <= request.host_limit

    def lacks(self, request: Request) -> str:
        """Says how much memory is missing, for a layout that does not `fit`."""
        if self.peak.total > request.limit:
            return f"{(self.peak.total - request.limit) / GIB:.1f} GiB"
        return f"{(self.host - request.host_limit) / GIB:.1f} GiB of host memory"

    @property
    def name(self) -> str:
        """``tp4 sp cp2 pp2 dp4``, as `parallel.layouts` reads it, then what no such name has."""
        parallel, model = self.config.parallel, self.config.model
        first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
        recomputed = model.recompute_granularity or "none"
        if model.recompute_granularity and model.recompute_method == "block":
            recomputed = f"block {model.recompute_num_layers}"
        recomputed += f" {model.recompute_modules}" if model.recompute_modules else ""
        recomputed += f" keeping {model.recompute_keep}" if model.recompute_keep else ""
        recomputed += " offloaded" if model.activation_offload else ""
        others = [recomputed]
        if model.mlp_tiles is not None:
            others.append(f"MLP in tiles {model.mlp_tiles}")
        if (adam := _adam(self.config)) is not None:
            others.append(adam)
        return (
            layout_name(parallel, self.process.copies // self.process.context)
            + (f" (stages of {', '.join(map(str, self.process.sizes))})" if first or last else "")
            + f", micro-batch {self.groups}, recompute {', '.join(others)}"
        )

    @property
    def error(self) -> float:
        """How far the estimated peak is from the rehearsed one, relative to it."""
        return self.estimated.total / self.peak.total - 1


def _adam(config: Config) -> str | None:
    """Returns what distinguishes the optimizer from the plain one; None for that."""
    training = config.training
    if not training.precision_aware:
        return None
    moments = {training.exp_avg_dtype, training.exp_avg_sq_dtype}
    words = ["on host"] if training.optimizer_cpu_offload else ["with remainders"] * training.store_param_remainders
    words += ["moments in bf16"] * ("bf16" in moments) + ["gradients in bf16"] * (training.main_grads_dtype == "bf16")
    return " ".join(["Adam", *words])


def layout_name(parallel: ParallelConfig, copies: int) -> str:
    """Returns the name of a layout with ``copies`` of the model; see `parallel.layouts`."""
    tensor = parallel.tensor_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size
    parts = [
        ("tp", tensor),
        ("sp", "" if parallel.sequence_parallel else 1),
        ("cp", parallel.context_parallel_size),
        ("pp", parallel.pipeline_model_parallel_size),
        ("vpp", parallel.num_virtual_stages_per_pipeline_rank),
        ("dp", copies),
        ("ep", parallel.expert_model_parallel_size),
    ]
    words = [f"{kind}{size}" for kind, size in parts if size != 1]
    if expert_tensor is not None and expert_tensor != tensor:
        words.append(f"etp{expert_tensor}")
    return " ".join(words) or "1"
