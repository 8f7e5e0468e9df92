"""Parameters of a process, and what it holds of them between steps, on the device and on the host, in closed form."""

from __future__ import annotations

from megatron_solopo.lora_options import ATTENTION, MLP, RECURRENT, adapts_experts, modules_of
from megatron_solopo.planning.memory import GRADIENTS, INPUTS, OPTIMIZER, WEIGHTS
from megatron_solopo.planning.process import Process, Shape

SIZES = {"fp32": 4, "bf16": 2}
"""Bytes of a number, by names of dtypes in options."""


def attention_parameters(shape: Shape) -> int:
    """Counts the parameters of a layer's attention: queries, keys, values and output, with biases."""
    return shape.attention + shape.biases


def layer_parameters(process: Process) -> tuple[int, int]:
    """Counts the parameters of a layer on a process: (without experts, of experts)."""
    shape = process.shape
    h, norms = shape.hidden, shape.norms * shape.hidden + (2 * shape.head_dim if shape.head_norms else 0)
    attention = (attention_parameters(shape) - shape.whole) // process.tensor + shape.whole
    if not shape.experts:
        return attention + norms + 3 * h * shape.ffn // process.tensor, 0
    expert = 3 * h * shape.ffn // process.expert_tensor + shape.experts_biases
    others = attention + norms + router_parameters(shape) + 3 * h * shape.shared // process.tensor
    return others, shape.experts // process.expert_parallel * expert


def router_parameters(shape: Shape) -> int:
    """Counts the parameters of a layer's router."""
    return shape.experts * (shape.hidden + bool(shape.experts_biases))


def stage_parameters(process: Process, stage: int) -> tuple[int, int]:
    """Counts the parameters of a pipeline stage on a process: (without experts, of experts)."""
    dense, experts = layer_parameters(process)
    shape, before = process.shape, sum(process.sizes[:stage])
    # layers of this stage that have an MLP instead of experts; interleaved stages are counted as if they were not
    first = min(max(shape.first - before, 0), process.sizes[stage])
    mlp = 3 * shape.hidden * (shape.first_ffn - shape.shared) // process.tensor - router_parameters(shape)
    last = stage == process.stages - 1
    matrix = process.shape.vocabulary * process.shape.hidden // process.tensor
    matrices = (stage == 0) + last - (process.shape.tied and process.stages == 1)
    layers = process.sizes[stage]
    of_mlps = first * mlp if first else 0
    return layers * dense + of_mlps + matrices * matrix + last * shape.hidden, (layers - first) * experts


def adapter_parameters(process: Process, stage: int) -> tuple[int, int]:
    """Counts the parameters of LoRA's adapters of a pipeline stage on a process (model/lora.py): (without experts, of
    experts)."""
    shape, model = process.shape, process.config.model
    if model.lora_rank is None:
        return 0, 0
    widths = dict(q_proj=shape.queries * (1 + shape.gated), k_proj=shape.keys, v_proj=shape.keys, o_proj=shape.queries)
    widths |= dict(gate_proj=shape.ffn, up_proj=shape.ffn, down_proj=shape.ffn)
    heads, values = shape.recurrent_heads, shape.recurrent_heads * shape.state_width
    mixed = 2 * shape.recurrent_keys + values
    widths |= dict(in_proj_qkv=mixed, in_proj_z=values, in_proj_b=heads, in_proj_a=heads, out_proj=values)
    widths |= dict(in_proj_qkvz=mixed + values, in_proj_ba=2 * heads)
    dense = experts = 0
    for name in (name for name in modules_of(model) if name in shape.projections):
        layers = shape.recurrent if name in RECURRENT else 1 - shape.recurrent if name in ATTENTION else 1
        if not (shape.experts and name in MLP):
            dense += layers * (shape.hidden + widths[name] // process.tensor)
        elif adapts_experts(model):
            experts += shape.experts // process.expert_parallel * (shape.hidden + widths[name] // process.expert_tensor)
    layers = process.sizes[stage] * model.lora_rank
    return round(layers * dense), layers * experts


def trained_parameters(process: Process, stage: int) -> tuple[int, int]:
    """Counts the parameters of a pipeline stage on a process that have gradients: (without experts, of experts)."""
    if process.config.model.lora_rank is not None:
        return adapter_parameters(process, stage)
    return stage_parameters(process, stage)


def share(process: Process, stage: int) -> float:
    """Counts the parameters whose optimizer state a process has."""
    dense, experts = trained_parameters(process, stage)
    return dense / process.copies + experts / process.expert_copies


def optimizer_bytes(process: Process) -> tuple[float, float]:
    """Returns the bytes of the optimizer's state a parameter, (on the device, on the host): two moments and, of
    bfloat16 weights, main parameters in float32 or remainders of 16 bits (training/adam.py)."""
    training = process.config.training
    moments = SIZES[training.exp_avg_dtype] + SIZES[training.exp_avg_sq_dtype]
    if process.e == 4:
        return moments, 0.0
    away = offloaded(process)
    return (1 - away) * (moments + (2 if has_remainders(process) else 4)), away * (moments + 4)


def has_remainders(process: Process) -> bool:
    """Whether main parameters on the device are 16 bits beside each bfloat16 weight."""
    training = process.config.training
    return training.use_precision_aware_optimizer and training.store_param_remainders


def offloaded(process: Process) -> float:
    """Returns which part of the optimizer's state is on the host."""
    training = process.config.training
    return training.optimizer_offload_fraction if training.optimizer_cpu_offload else 0.0


def states_on_host(process: Process, stage: int) -> float:
    """Returns the bytes of the states that a process keeps on the host: its part of the optimizer's, and with
    --reference resident of the reference's weights (training/resident.py)."""
    reference = process.e * process.scores
    return (optimizer_bytes(process)[1] + reference) * share(process, stage)


def saved(process: Process, stage: int) -> float:
    """Returns the bytes that a process copies to the host to write them in a checkpoint: its part of the optimizer's
    state on the device, with main parameters in float32 (training/adam.py), and of the weights as many as each of the
    processes that hold them."""
    device, _ = optimizer_bytes(process)
    if has_remainders(process):
        device += 2 * (1 - offloaded(process))
    weights = sum((*stage_parameters(process, stage), *adapter_parameters(process, stage)))
    return device * share(process, stage) + process.e * weights / process.copies


def standing(process: Process, stage: int) -> dict[str, float]:
    """Returns the bytes held between steps: DDP's buffers of gradients, and the distributed optimizer's share."""
    dense, experts = trained_parameters(process, stage)
    weights = sum((*stage_parameters(process, stage), *adapter_parameters(process, stage)))
    of_gradient = SIZES[process.config.training.main_grads_dtype]
    t, work = process.t, process.work
    return {
        WEIGHTS: process.e * weights,
        GRADIENTS: of_gradient * (dense + experts),
        OPTIMIZER: optimizer_bytes(process)[0] * share(process, stage),
        # ids, positions and attention rows as int64 (pack.py, parallel/layout.py)
        INPUTS: 8 * (2 * t + work.key_rows / process.context) * min(work.packs, process.stages + 1),
    }


def fp8_copies(process: Process, stage: int) -> float:
    """Returns the bytes of the FP8 copies of a stage's matrices at the peak.

    They are each matrix as it is and transposed, two bytes a weight, of all layers; with
    --disable-parameter-transpose-cache the layers that are recomputed have one set.
    """
    shape, model = process.shape, process.config.model
    _, experts = layer_parameters(process)
    matrices = 2 * shape.hidden * (shape.queries + shape.keys) // process.tensor
    matrices += experts or 3 * shape.hidden * shape.ffn // process.tensor
    layers = process.sizes[stage]
    if model.disable_parameter_transpose_cache and (recomputed := process.chunks * process.recomputed(stage)):
        layers += 1 - recomputed
    return 2 * matrices * layers
