"""Memory of a layout in closed form: the filter before the best are rehearsed (`planning.search`).

The formulas count what portable layers hold; each names its code. Everything else follows from the rehearsal, which
runs that code, and `solopo plan` prints how far both are apart. Transformer Engine's layers keep other tensors.

Symbols: ``e`` bytes of a value, ``h`` hidden size, ``q`` and ``k`` width of queries and of keys, ``f`` of the MLP, all
of one tensor-parallel rank; ``t`` tokens of a rank, ``s`` those of its norms and residuals, which sequence parallelism
divides by the tensor-parallel size.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_solopo.config_checks import recomputed_modules
from megatron_solopo.model.log_probs import block_size, chunk_size, is_kept
from megatron_solopo.parallel.recurrence import CHUNK
from megatron_solopo.planning.memory import ACTIVATIONS, COMMUNICATION, KINDS, LOG_PROBS, WORKING, Moment
from megatron_solopo.planning.process import Process
from megatron_solopo.planning.states import standing, states_on_host, trained_parameters

KEPT_WIDTHS, KEPT_CHUNKS = 18, 5
"""See `recurrent_kept`; fitted to a rehearsal of a Qwen3.5 shape: six such layers, 16 heads of 128, 16K tokens."""


def attention_kept(process: Process) -> float:
    """Returns the bytes that the attention of a layer keeps for backward: rotated queries, the kernel's output and,
    without context parallelism, ``linear_proj``'s input (parallel/layout.py), keys and values, log-sum-exps; of norms
    of heads their input (model/norm.py); in float32, and of wide heads, keys and values of each piece for each query
    head. With latents also these, and where values are narrower than keys always ``linear_proj``'s input."""
    shape, e, t, tensor = process.shape, process.e, process.t, process.tensor
    projected = shape.values if process.context == 1 or shape.values != shape.queries else 0
    kept = t * (e * (2 * shape.queries + 2 * shape.keys + projected) + 4 * shape.heads) / tensor
    kept += e * process.s * shape.latents
    if shape.head_norms:
        kept += t * e * (shape.queries + shape.keys) / tensor
    kept += 2 * e * process.work.key_rows * process.repeated_keys / tensor
    return (1 - shape.recurrent) * kept + shape.recurrent * recurrent_kept(process)


def recurrent_kept(process: Process) -> float:
    """Returns the bytes that a layer with a recurrent state keeps for backward, in float32: of each value head of a
    token `KEPT_WIDTHS` times its width, `KEPT_CHUNKS` rows of matrices of a chunk, and its part of the chunk's state
    (model/delta_rule.py)."""
    shape = process.shape
    width = KEPT_WIDTHS * shape.state_width + KEPT_CHUNKS * CHUNK + shape.state_width**2 / CHUNK
    return 4 * process.t * shape.recurrent_heads * width / process.tensor


def mlp_results(process: Process) -> float:
    """Returns the bytes that the MLP of a layer writes for backward: gate and up of ``linear_fc1`` (model/swiglu.py),
    and their product.

    Of experts the same for each row, with its input and the product times its weight; and the router's tables of all
    experts.
    """
    shape, e = process.shape, process.e
    if not shape.experts:
        return process.t * 3 * e * shape.ffn / process.tensor
    rows = process.rows * (e * shape.hidden + 4 * e * shape.ffn / process.expert_tensor)
    return rows + process.s * 20 * shape.experts + process.t * 3 * e * shape.shared / process.tensor


def mlp_kept(process: Process) -> float:
    """Returns what of `mlp_results` is kept: nothing with --mlp-tiles (model/tiled_mlp.py)."""
    return 0.0 if process.tiles else mlp_results(process)


def results(process: Process) -> float:
    """Returns the bytes that the forward pass of a layer writes for backward; of each of its norms the input, and the
    result, which is that of the next matrix or of the residual stream."""
    return (
        2 * process.shape.norms * process.e * process.shape.hidden * process.s
        + attention_kept(process)
        + mlp_results(process)
    )


def kept(process: Process) -> float:
    """Returns the bytes of `results` that are kept without recomputation: of norms not their results, which are
    computed again (model/repeated.py) or are added, except that of which experts are chosen."""
    repeated = (process.shape.norms - bool(process.shape.experts)) * process.e * process.shape.hidden * process.s
    return results(process) - repeated - (mlp_results(process) - mlp_kept(process))


def backward_of_layer(process: Process) -> dict[str, float]:
    """Returns the bytes beyond `kept` while a layer is computed backward, where it is largest: in the MLP, or, when the
    MLP's part is gone, in attention.

    In the MLP: the gradient of the product, those of gate and up, and silu of gate, while the product is gone; and two
    of the residual stream; for experts see `_in_experts`. In a tile of the MLP these, gate, up and the product, rows of
    the residual stream, and its input and gradients. In attention with context parallelism, `_in_attention`.
    """
    shape, e, t, s = process.shape, process.e, process.t, process.s
    in_mlp, in_attention = e * (3 * t * shape.ffn / process.tensor + 2 * s * shape.hidden), 0.0
    if shape.experts:
        in_mlp = _in_experts(process)
    if process.tiles:
        rows = t / process.tiles
        in_mlp = e * (rows * (7 * shape.ffn / process.tensor + 2 * shape.hidden) + 3 * s * shape.hidden)
    if process.context > 1:
        in_attention = _in_attention(process) - mlp_kept(process)
    return {WORKING: max(in_mlp, in_attention), COMMUNICATION: _gathered(process)}


def _in_attention(process: Process) -> float:
    """Returns the bytes beyond what the layer keeps while attention with context parallelism is computed backward
    (parallel/sequences.py): gradients of the output and of queries, and, where they are more,

    - keys and values of all ranks, as often as chunks of queries see them (once in their piece, twice for each
      response), and their gradients; or
    - when keys and values are gone: both gradients, that of keys summed for this rank's tokens, and that of values in
      float32, beside its sum for the rows of the pack.
    """
    shape, e, work = process.shape, process.e, process.work
    seen = work.tokens + 2 * (work.key_rows - work.tokens)
    in_float32 = 4 if e == 2 else 0  # those of float32 are not copied
    rows = max(4 * e * seen, (2 * e + in_float32) * seen + 4 * work.tokens + e * process.t)
    return (rows * shape.keys + 2 * e * process.t * shape.queries) / process.tensor


def _in_experts(process: Process) -> float:
    """Returns the bytes beyond `kept` in the experts of a layer, forward or backward, where they are more.

    Forward: rows before and after they are exchanged, results before and after they are joined (moe/experts.py), and
    with tensor parallelism of experts each once more for all its ranks (moe/token_dispatcher.py). Backward: the product
    and its gradient in float32 (model/experts.py), of one expert at a time unless they are computed together; or
    gradients and matrices of ``linear_fc1`` put together.
    """
    shape, e = process.shape, process.e
    ffn, local = shape.ffn / process.expert_tensor, shape.experts // process.expert_parallel
    forward = process.rows * (e * shape.hidden * (4 if process.expert_tensor == 1 else 8) + e * ffn)
    together = e == 2 and local > 1
    at_once = process.rows if together else process.rows / local
    matrices = together * (process.rows * e * (shape.hidden + 2 * ffn) + 2 * e * local * shape.hidden * ffn)
    return max(forward, process.rows * e * shape.hidden + at_once * 12 * ffn, matrices)


def _gathered(process: Process) -> float:
    """Returns the bytes of the buffer of all tokens that sequence parallelism gathers into
    (tensor_parallel/layers.py)."""
    return process.e * process.t * process.shape.hidden if process.s != process.t else 0.0


def attention_results(process: Process) -> float:
    """Returns the bytes that --recompute-keep core_attn adds to a layer's input: output and log-sum-exps of attention's
    kernel (model/kept_attention.py)."""
    shape = process.shape
    return process.t * (process.e * shape.queries + 4 * shape.heads) / process.tensor


def kept_of_parts(process: Process) -> tuple[float, float]:
    """Returns the bytes that --recompute-modules leaves of `kept`, and those that it makes again in backward: of the
    MLP or the experts all, or the product of SwiGLU; of attention the rotated queries and the kernel's log-sum-exps."""
    again = 0.0
    modules = recomputed_modules(process.config.model)
    if {"mlp", "moe"} & {*modules}:
        again += mlp_kept(process)
        if "mlp" in modules:  # whose checkpoint keeps its input, a norm's result
            again -= process.e * process.shape.hidden * process.s
    elif "mlp_act" in modules:
        again += process.t * process.e * process.shape.ffn / process.tensor
    if "core_attn" in modules:
        again += attention_results(process)
    return kept(process) - again, again


def checkpoints(process: Process, stage: int) -> tuple[int, float]:
    """Returns how many checkpoints of recomputed layers the packs in flight have, and the bytes that each keeps: its
    input and, where it is kept, the attention of its layers."""
    model, layers, recomputed = process.config.model, process.sizes[stage] // process.chunks, process.recomputed(stage)
    together = model.recompute_num_layers if layers == recomputed else 1
    size = process.e * process.shape.hidden * process.s
    if model.recompute_keep:
        size += together * attention_results(process)
    return process.in_flight(stage) * math.ceil(recomputed / together), size


def activations_on_host(process: Process, stage: int) -> float:
    """Returns the bytes that --activation-offload holds on the host; blocks are larger than the tensors in them."""
    count, size = checkpoints(process, stage)
    return count * size if process.config.model.activation_offload else 0.0


def on_host(process: Process, stage: int) -> float:
    """Returns the bytes that a process keeps on the host for its GPU: states and activations in flight."""
    return states_on_host(process, stage) + activations_on_host(process, stage)


def held_by_layers(process: Process, stage: int) -> dict[str, float]:
    """Returns the bytes of the packs in flight when their backward pass begins: of a recomputed layer what its
    checkpoint keeps, of others what they keep; cosines and sines of their positions; and what stages exchanged. With
    --activation-offload two checkpoints are on the device (model/offload.py)."""
    shape, e = process.shape, process.e
    layers, recomputed = process.sizes[stage] // process.chunks, process.recomputed(stage)
    offload = process.config.model.activation_offload
    state = e * shape.hidden * process.s
    of_chunk = (layers - recomputed) * kept_of_parts(process)[0] + 2 * e * shape.head_dim * process.t
    count = process.in_flight(stage)
    here, of_checkpoint = checkpoints(process, stage)
    if offload:
        here = min(here, 2)
    exchanged = 0.0
    if process.stages > 1:  # schedules.py keeps inputs and outputs of each pass, and lists of what was received
        inputs = 0 if recomputed and not offload else 1
        exchanged = state * (count * (1 + inputs) + (1 if stage == 0 else 2) + (2 if process.chunks > 1 else 0))
    return {ACTIVATIONS: count * of_chunk + here * of_checkpoint + exchanged}


def head(process: Process) -> dict[str, float]:
    """Returns the bytes of the log-prob head's backward (model/log_probs.py): the weight's gradient, but not in
    bfloat16, whose products are added to DDP's sum; what forward kept; a block's logits, or a chunk's in forward; and
    the final norm's input and result."""
    shape, e, s = process.shape, process.e, process.s
    rows = round(shape.vocabulary / process.tensor)
    trained = process.config.model.lora_rank is None
    chunk = process.config.model.logprob_chunk_size or chunk_size(rows, on_cuda=True)
    tokens = math.ceil(process.work.predicted / process.context)
    keeps = is_kept(tokens, chunk, e) and not shape.capped
    kept = e * tokens * rows if keeps else 0
    part = max(chunk // 2, 1) if keeps or shape.capped else chunk
    block = min(block_size(tokens, shape.hidden, part, rows), rows) * tokens * (1 + shape.capped)
    backward = 6 * block if e == 2 else 4 * (block + trained * rows * shape.hidden)
    forward = 4 * min(chunk, tokens) * rows
    return {
        LOG_PROBS: max(kept + backward, (kept if e == 2 else 0) + forward),
        WORKING: 2 * e * shape.hidden * s,
        COMMUNICATION: _gathered(process),
    }


def norm_of_gradients(process: Process, stage: int) -> float:
    """Returns the bytes of the largest shard of a parameter in float32, which is squared (optimizer/clip_grads.py)."""
    shape = process.shape
    dense, _ = trained_parameters(process, stage)
    ends = stage in (0, process.stages - 1)
    matrix = shape.vocabulary * shape.hidden if ends else 2 * shape.ffn * shape.hidden
    return 4 * min(matrix / process.tensor, dense / process.copies)


def peak(process: Process, stage: int) -> Moment:
    """Returns the largest moment of a stage: a layer computed backward, the log-prob head, or the update."""
    base, held = standing(process, stage), held_by_layers(process, stage)
    alone = {WORKING: kept_of_parts(process)[1]}
    model, layers = process.config.model, process.sizes[stage] // process.chunks
    if process.recomputed(stage) == layers:
        together = model.recompute_num_layers if layers > 1 else 1
        largest = process.of_largest_layer
        there = attention_results(largest) if model.recompute_keep else 0.0
        state = process.e * process.shape.hidden * process.s  # the chunk's input is among what is held
        alone = {WORKING: min(together, layers) * (kept(largest) - there) - state}
    moments = {
        "backward": (held, alone, backward_of_layer(process.of_largest_layer)),
        "update": ({WORKING: norm_of_gradients(process, stage)},),
    }
    if stage == process.stages - 1:
        moments["log-probs"] = (held, head(process))
    sums = [Moment(_sum(base, *parts), name) for name, parts in moments.items()]
    return max(sums, key=lambda moment: moment.total)


def _sum(*parts: dict[str, Any]) -> dict[str, int]:
    return {kind: round(sum(part.get(kind, 0) for part in parts)) for kind in KINDS}
