"""The time of a step in closed form, to sort layouts before the best are rehearsed.

It is a sum of what `planning.forecast` takes from a rehearsal: products by the machine's rate, attention, what memory
bandwidth bounds, or the time in which the host starts all of these where that is longer, collectives one after another,
the pipeline's bubble, what main memory adds. Its absolute value means little.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_solopo.config_checks import recomputed_modules
from megatron_solopo.planning.estimate import checkpoints, mlp_results, results
from megatron_solopo.planning.machines import Machine
from megatron_solopo.planning.process import Process
from megatron_solopo.planning.states import (
    SIZES,
    attention_parameters,
    has_remainders,
    offloaded,
    share,
    trained_parameters,
)

OF_PARTS = {"mlp": 10, "moe": 75, "core_attn": 20}
"""Operators that the recomputation of a part of a layer starts: of router, experts and attention together counted in
a rehearsal (95), their shares and the MLP's assumed."""


def seconds_of_step(process: Process, machine: Machine) -> float:
    """Returns the seconds of a step of ``process.work.packs`` packs."""
    return seconds_of_packs(process, machine) + seconds_of_update(process, machine)


def seconds_of_packs(process: Process, machine: Machine) -> float:
    """Returns the seconds of all packs: the slowest stage's, with the bubble of Narayanan et al. 2021 (arXiv
    2104.04473), section 2.2."""
    slowest = max(_pack(process, machine, stage) for stage in process.key_stages)
    return slowest * (process.work.packs + (process.stages - 1) / process.chunks)


def seconds_of_update(process: Process, machine: Machine) -> float:
    """Returns the seconds of what is once in a step: the exchange of gradients and weights, and Adam."""
    return max(_update(process, machine, stage) for stage in process.key_stages)


def _middle(share: Sequence[float]) -> float:
    return sum(share) / 2


def _pack(process: Process, machine: Machine, stage: int) -> float:
    """Returns the seconds of forward and backward of a pack on a stage, and of a resident reference's forward."""
    shape, e, work = process.shape, process.e, process.work
    achieved, dtype = machine.achieved, "bfloat16" if e == 2 else "float32"
    products = machine.peak(dtype) * _middle(achieved.products)
    attention = machine.peak(dtype) * _middle(achieved.attention)
    memory = machine.memory_gb_per_s * 1e9 * _middle(achieved.memory)
    layers = process.sizes[stage]
    recomputed = process.recomputed(stage) * process.chunks / layers
    again = recomputed + process.scores  # forward passes beside the first
    # 2 operations a weight and token forward, twice that backward; attention 4 a pair and width, 2.5 times backward
    passes = 3 if process.config.model.lora_rank is None else 2  # frozen matrices have no gradients
    weights = process.t * attention_parameters(shape) / process.tensor * (passes + again)
    if shape.experts:
        weights += process.rows * 3 * shape.hidden * shape.ffn / process.expert_tensor * (passes + again)
        weights += process.t * 3 * shape.hidden * shape.shared / process.tensor * (passes + again)
    else:  # a tile computes gate and up again, and no layer the whole MLP
        of_mlp = passes + (process.scores + 2 / 3 if process.tiles else again)
        weights += process.t * 3 * shape.hidden * shape.ffn / process.tensor * of_mlp
    pairs = 4 * work.pairs * shape.queries / process.tensor / process.context
    layer = 2 * weights / products + pairs * (3.5 + again) / attention
    layer += results(process) * (4 + 2 * again) / memory  # written, read by the next operation, and both backward
    if process.tiles:
        layer += mlp_results(process) * 2 * (1 - recomputed) / memory
    computing = layers * layer
    if process.config.model.recompute_keep:
        computing -= layers * recomputed * pairs / attention
    modules = recomputed_modules(process.config.model)
    if "mlp_act" in modules:  # reads gate and up, writes their product
        computing += layers * mlp_results(process) / memory
    if "mlp" in modules:
        computing += layers * 6 * process.t * shape.hidden * shape.ffn / process.tensor / products
    if "moe" in modules:
        computing += layers * 6 * process.rows * shape.hidden * shape.ffn / process.expert_tensor / products
    if "core_attn" in modules:
        computing += layers * pairs / attention
    if stage == process.stages - 1:  # logits forward and again backward, and both gradients
        rows = shape.vocabulary / process.tensor
        computing += (8 + 2 * process.scores) * rows * shape.hidden * work.predicted / process.context / products
    launching = operators(process, stage) * _middle(machine.launch_us) / 1e6
    total = max(computing, launching) + layers * _exchanged(process, machine, again)
    if process.config.model.activation_offload:  # hidden by forward, about a quarter, and by the rest
        _, size = checkpoints(process, stage)
        copying = layers * size / link_rate(machine)
        total += max(0.0, copying - total / 4) + max(0.0, copying - 3 * total / 4)
    if process.stages > 1:
        state = e * shape.hidden * process.s * process.chunks
        total += 2 * state / (machine.network_gb_per_s * 1e9 * _middle(achieved.collectives))
    return total


def link_rate(machine: Machine) -> float:
    """Returns the bytes a second between a GPU and main memory."""
    host = machine.host_share()
    return host.link_gb_per_s * 1e9 * _middle(host.achieved)


def operators(process: Process, stage: int) -> float:
    """Returns how many operators the host starts for a pack: forward, backward, and a resident reference's forward.

    Counted in rehearsals in bfloat16 (`planning.counts`): a layer with an MLP starts 29 forward and 55 backward; one
    with experts 60 and 89, and two products for each expert of this process, which add its weights' gradients; a
    recomputed layer its forward ones again; a tile of an MLP 16; of a part that is recomputed 10 for the MLP, 75 for
    router and experts, 20 for attention; embedding, log-prob head and loss together about 190.
    """
    forward, backward = 29, 55 + 16 * process.tiles
    if process.shape.experts:
        forward, backward = 60, 89 + 2 * (process.shape.experts // process.expert_parallel)
    backward += sum(OF_PARTS.get(part, 0) for part in recomputed_modules(process.config.model))
    layers, again = process.sizes[stage], process.recomputed(stage) * process.chunks
    again += layers * process.scores
    return layers * (forward + backward) + again * forward + (190 if stage == process.stages - 1 else 0)


def _exchanged(process: Process, machine: Machine, again: float) -> float:
    """Returns the seconds of a layer's collectives in a pack: gathers and sums of tensor parallelism, two of each
    forward and as many backward, where sequence parallelism gathers inputs once more; keys and values of context
    parallelism; rows to experts and back."""
    shape, e = process.shape, process.e
    states = e * process.t * shape.hidden * (8 + 2 * (process.s != process.t) + 4 * again)
    seconds = _wire(states, machine, process.tensor, 1)
    keys = 2 * e * process.work.tokens * shape.keys / process.tensor
    # gathered forward and again backward, whose gradients are summed in float32 (parallel/sequences.py)
    seconds += _wire(keys * (2 + 4 / e + again), machine, process.context, process.tensor)
    if shape.experts:
        rows = 2 * e * process.rows / process.expert_tensor * shape.hidden
        seconds += _wire(rows * (2 + again), machine, process.expert_parallel, process.expert_tensor, ring=False)
    return seconds


def _wire(size: float, machine: Machine, ranks: int, apart: int, ring: bool = True) -> float:
    """Returns the seconds that ``size`` bytes take among ``ranks`` processes, each ``apart`` from the next. A ring
    leaves a node over the adapters of all its ranks there."""
    if ranks == 1:
        return 0.0
    here, bandwidth = max(1, machine.gpus_per_node // apart), machine.node_gb_per_s
    if ranks > here:
        bandwidth = min(bandwidth, (here if ring else 1) * machine.network_gb_per_s)
    return size * (ranks - 1) / ranks / (bandwidth * 1e9 * _middle(machine.achieved.collectives))


def _update(process: Process, machine: Machine, stage: int) -> float:
    """Returns the seconds in which gradients are summed, weights gathered, and Adam reads and writes its share; with a
    resident reference of two exchanges with main memory, each both ways, and of as many gathers more."""
    dense, experts = trained_parameters(process, stage)
    of_gradient = SIZES[process.config.training.main_grads_dtype]
    size = of_gradient + process.e * (1 + 2 * process.scores)
    seconds = _wire(size * dense, machine, process.copies, process.tensor)
    apart = process.expert_tensor * process.expert_parallel
    seconds += _wire(size * experts, machine, process.expert_copies, apart)
    updated = share(process, stage)
    if process.scores:
        seconds += 4 * process.e * updated / link_rate(machine)
    return seconds + updated * _adam(process, machine)


def _adam(process: Process, machine: Machine) -> float:
    """Returns the seconds of Adam's update of a parameter (training/adam.py), by the bytes that it reads and writes:
    28 of the fused kernel; 34 more where remainders become main parameters and back, 24 more where moments in bfloat16
    become float32 and back, 6 more where a gradient does. What is on the host passes the link besides."""
    training = process.config.training
    of_gradient = SIZES[training.main_grads_dtype]
    moments = 24 * (training.exp_avg_dtype == "bf16") + 6 * (of_gradient == 2)
    away = offloaded(process)
    on_device = 28 + moments + (34 if has_remainders(process) else 6 * training.precision_aware)
    seconds = (1 - away) * on_device / (machine.memory_gb_per_s * 1e9 * _middle(machine.achieved.memory))
    if away:
        there = machine.host_share()
        on_host = (34 + moments) / (there.memory_gb_per_s * 1e9 * _middle(there.achieved))
        copying = (of_gradient + process.e) / link_rate(machine)
        overlaps = training.overlap_cpu_optimizer_d2h_h2d
        seconds += away * (max(on_host, copying) if overlaps else on_host + copying)
    return seconds
