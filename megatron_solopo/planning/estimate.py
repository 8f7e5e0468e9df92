"""Memory and cost of a layout in closed form: the filter before the best are rehearsed (`planning.search`).

The formulas count what portable layers hold; each names its code. Everything else follows from the rehearsal, which
runs that code, and `solopo plan` prints how far both are apart. Transformer Engine's layers keep other tensors.

Symbols: ``e`` bytes of a value, ``h`` hidden size, ``q`` and ``k`` width of queries and of keys, ``f`` of the MLP, all
of one tensor-parallel rank; ``t`` tokens of a rank, ``s`` those of its norms and residuals, which sequence parallelism
divides by the tensor-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.config_checks import recomputed_modules
from megatron_solopo.data.tokenized.batches import attention_cost
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.lora_options import MLP, modules_of
from megatron_solopo.model.families.fields import head_dim
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.model.log_probs import block_size, chunk_size, is_kept
from megatron_solopo.model.tiles import tiles_of
from megatron_solopo.parallel.topology import data_parallel_size, stage_sizes
from megatron_solopo.planning.memory import (
    ACTIVATIONS,
    COMMUNICATION,
    GRADIENTS,
    INPUTS,
    KINDS,
    LOG_PROBS,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
    Moment,
)
from megatron_solopo.planning.table import stages_that_matter

SIZES = {"fp32": 4, "bf16": 2}
"""Bytes of a number, by names of dtypes in options."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        queries, keys: widths of queries and of keys (as of values), of all heads.
        ffn: width of the MLP, or of one expert.
        vocabulary: rows of the padded vocabulary.
        experts, chosen: experts of a layer, and those of a token; 0 without experts.
        biases: of queries, keys and values together.
        head_norms: whether each head of queries and keys has a norm.
        tied: whether the output weight is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    ffn: int
    vocabulary: int
    experts: int
    chosen: int
    biases: int
    head_norms: bool
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, hf_config: PretrainedConfig, vocabulary_divisible_by: int) -> Shape:
        options, size = family_of(hf_config).transformer_options(hf_config), head_dim(hf_config)
        queries, keys = size * hf_config.num_attention_heads, size * hf_config.num_key_value_heads
        return cls(
            layers=hf_config.num_hidden_layers,
            hidden=hf_config.hidden_size,
            heads=hf_config.num_attention_heads,
            queries=queries,
            keys=keys,
            ffn=options.get("moe_ffn_hidden_size", hf_config.intermediate_size),
            vocabulary=padded_vocab_size(hf_config, vocabulary_divisible_by),
            experts=options.get("num_moe_experts", 0),
            chosen=options.get("moe_router_topk", 0),
            biases=queries + 2 * keys if options.get("add_qkv_bias") else 0,
            head_norms=bool(options.get("qk_layernorm")),
            head_dim=size,
            tied=hf_config.tie_word_embeddings,
        )


@dataclass(frozen=True)
class Work:
    """A pack, of all context-parallel ranks, and how many a process computes in a step.

    Attributes:
        tokens: with padding.
        key_rows: rows of keys that its pieces attend to: a shared prompt's again for each of its responses.
        predicted: response tokens.
        pairs: pairs of tokens that attend.
    """

    tokens: int
    key_rows: int
    predicted: int
    pairs: float
    packs: int

    @classmethod
    def of(cls, group: TokenGroup, groups: int, packs: int, share: bool, pieces: int, prompts: int) -> Work:
        """Returns a pack of ``groups`` times the same group, whose pieces and prompts are padded as in a `StepPlan`."""
        tokens, plain = group.tokens(share, pieces, prompts), group.tokens(share)
        repeated = sum(len(prompt.ids) * len(prompt.completions) for prompt in group.prompts) if share else 0
        return cls(
            tokens=groups * tokens,
            key_rows=groups * (tokens + repeated),
            predicted=groups * sum(len(completion.ids) for _, completion in group.segments()),
            pairs=groups * 6 * (attention_cost(group, 1, share) - plain),  # which divides by 6 widths
            packs=packs,
        )


class Process:
    """The numbers of a process in a layout.

    Args:
        world: processes.
    """

    def __init__(self, shape: Shape, config: Config, work: Work, world: int) -> None:
        parallel = config.parallel
        self.shape, self.config, self.work = shape, config, work
        self.e = 2 if config.model.bf16 else 4
        self.tensor, self.context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.stages, self.chunks = (
            parallel.pipeline_model_parallel_size,
            parallel.num_virtual_stages_per_pipeline_rank,
        )
        self.copies = data_parallel_size(parallel, world) * self.context
        self.expert_tensor = parallel.expert_tensor_parallel_size or self.tensor
        self.expert_parallel = parallel.expert_model_parallel_size
        self.expert_copies = world // self.stages // self.expert_tensor // self.expert_parallel
        sizes = stage_sizes(shape.layers, parallel)
        assert sizes is not None  # `check_layout` refuses others
        self.sizes = sizes
        self.key_stages = stages_that_matter(shape.layers, parallel)
        self.t = math.ceil(work.tokens / self.context)
        self.s = self.t / self.tensor if parallel.sequence_parallel else self.t
        self.rows = self.s * shape.chosen * self.expert_tensor  # of tokens, once for each of their experts
        tiles = config.model.mlp_tiles
        self.tiles = tiles_of(tiles, self.t, shape.hidden) if tiles else 0
        # torch's kernel for float32 takes as many heads of keys as of queries (parallel/layout.py)
        self.repeats_keys = self.e == 4 and shape.queries != shape.keys and self.context == 1

    def in_flight(self, stage: int) -> int:
        """Returns how many passes of packs through a chunk wait for their backward pass at most (schedules.py of
        megatron-core: 1F1B, and get_pp_rank_microbatches of the interleaved schedule)."""
        if self.chunks == 1:
            return min(self.work.packs, self.stages - stage)
        warm_up = 2 * (self.stages - stage - 1) + (self.chunks - 1) * self.stages
        return min(self.work.packs * self.chunks, warm_up + 1)

    def recomputed(self, stage: int) -> int:
        """Returns the number of layers of a chunk whose inputs alone are kept."""
        model, layers = self.config.model, self.sizes[stage] // self.chunks
        if model.recompute_granularity != "full":
            return 0
        return layers if model.recompute_method == "uniform" else min(layers, model.recompute_num_layers)


def attention_parameters(shape: Shape) -> int:
    """Counts the parameters of a layer's attention: queries, keys, values and output, with biases."""
    return shape.hidden * (2 * shape.queries + 2 * shape.keys) + shape.biases


def layer_parameters(process: Process) -> tuple[int, int]:
    """Counts the parameters of a layer on a process: (without experts, of experts)."""
    shape = process.shape
    h, norms = shape.hidden, 2 * shape.hidden + (2 * shape.head_dim if shape.head_norms else 0)
    attention = attention_parameters(shape) // process.tensor
    if not shape.experts:
        return attention + norms + 3 * h * shape.ffn // process.tensor, 0
    experts = shape.experts // process.expert_parallel * 3 * h * shape.ffn // process.expert_tensor
    return attention + norms + shape.experts * h, experts


def stage_parameters(process: Process, stage: int) -> tuple[int, int]:
    """Counts the parameters of a pipeline stage on a process: (without experts, of experts)."""
    dense, experts = layer_parameters(process)
    last = stage == process.stages - 1
    matrix = process.shape.vocabulary * process.shape.hidden // process.tensor
    matrices = (stage == 0) + last - (process.shape.tied and process.stages == 1)
    layers = process.sizes[stage]
    return layers * dense + matrices * matrix + last * process.shape.hidden, layers * experts


def adapter_parameters(process: Process, stage: int) -> int:
    """Counts the parameters of LoRA's adapters of a pipeline stage on a process (model/lora.py)."""
    shape, model, tensor = process.shape, process.config.model, process.tensor
    if model.lora_rank is None:
        return 0
    widths = dict(q_proj=shape.queries, k_proj=shape.keys, v_proj=shape.keys, gate_proj=shape.ffn, up_proj=shape.ffn)
    rows = dict(o_proj=shape.queries, down_proj=shape.ffn)
    of_layer = 0
    for name in modules_of(model):
        if not (shape.experts and name in MLP):
            of_layer += shape.hidden + (widths | rows)[name] // tensor
    return process.sizes[stage] * model.lora_rank * of_layer


def trained_parameters(process: Process, stage: int) -> tuple[int, int]:
    """Counts the parameters of a pipeline stage on a process that have gradients: (without experts, of experts)."""
    if process.config.model.lora_rank is not None:
        return adapter_parameters(process, stage), 0
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
    remainders = training.use_precision_aware_optimizer and training.store_param_remainders
    away = training.optimizer_offload_fraction if training.optimizer_cpu_offload else 0.0
    return (1 - away) * (moments + (2 if remainders else 4)), away * (moments + 4)


def on_host(process: Process, stage: int) -> float:
    """Returns the bytes on the host: of the optimizer's state, and of activations in flight."""
    return optimizer_bytes(process)[1] * share(process, stage) + activations_on_host(process, stage)


def standing(process: Process, stage: int) -> dict[str, float]:
    """Returns the bytes held between steps: DDP's buffers of gradients, and the distributed optimizer's share."""
    dense, experts = trained_parameters(process, stage)
    weights = sum(stage_parameters(process, stage)) + adapter_parameters(process, stage)
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


def attention_kept(process: Process) -> float:
    """Returns the bytes that the attention of a layer keeps for backward: rotated queries, the kernel's output and,
    without context parallelism, ``linear_proj``'s input (parallel/layout.py), keys and values, log-sum-exps; of norms
    of heads their input (model/norm.py); in float32 keys and values of each piece for each query head."""
    shape, e, t, tensor = process.shape, process.e, process.t, process.tensor
    of_queries = 3 if process.context == 1 else 2
    kept = t * (of_queries * e * shape.queries + 2 * e * shape.keys + 4 * shape.heads) / tensor
    if shape.head_norms:
        kept += t * e * (shape.queries + shape.keys) / tensor
    if process.repeats_keys:
        kept += 2 * e * process.work.key_rows * shape.queries / tensor
    return kept


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
    return rows + process.s * 20 * shape.experts


def mlp_kept(process: Process) -> float:
    """Returns what of `mlp_results` is kept: nothing with --mlp-tiles (model/tiled_mlp.py)."""
    return 0.0 if process.tiles else mlp_results(process)


def results(process: Process) -> float:
    """Returns the bytes that the forward pass of a layer writes for backward; of each of its two norms the input, and
    the result, which is that of the next matrix."""
    return 4 * process.e * process.shape.hidden * process.s + attention_kept(process) + mlp_results(process)


def kept(process: Process) -> float:
    """Returns the bytes of `results` that are kept without recomputation: of norms not their results, which are
    computed again (model/repeated.py), except that of which experts are chosen."""
    repeated = (1 if process.shape.experts else 2) * process.e * process.shape.hidden * process.s
    return results(process) - repeated - (mlp_results(process) - mlp_kept(process))


def backward_of_layer(process: Process) -> dict[str, float]:
    """Returns the bytes beyond `kept` while a layer is computed backward, where it is largest: in the MLP, or, when the
    MLP's part is gone, in attention.

    In the MLP: the gradient of the product, those of gate and up, and silu of gate, while the product is gone; and two
    of the residual stream; for experts see `_in_experts`. In a tile of the MLP these, gate, up and the product, rows of
    the residual stream, and its input and gradients. In attention with context parallelism: keys and values of all
    ranks as often as chunks of queries see them (once in their piece, twice for each response), their gradients, and
    one of these in float32, summed to the rows of the pack (parallel/sequences.py).
    """
    shape, e, t, s = process.shape, process.e, process.t, process.s
    in_mlp, in_attention = e * (3 * t * shape.ffn / process.tensor + 2 * s * shape.hidden), 0.0
    if shape.experts:
        in_mlp = _in_experts(process)
    if process.tiles:
        rows = t / process.tiles
        in_mlp = e * (rows * (7 * shape.ffn / process.tensor + 2 * shape.hidden) + 3 * s * shape.hidden)
    if process.context > 1:
        work = process.work
        seen = work.tokens + 2 * (work.key_rows - work.tokens)
        keys = (seen * (4 * e + 4) + 4 * work.tokens) * shape.keys / process.tensor
        in_attention = keys - mlp_kept(process)
    return {WORKING: max(in_mlp, in_attention), COMMUNICATION: _gathered(process)}


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
    keeps = is_kept(tokens, chunk, e)
    kept = e * tokens * rows if keeps else 0
    block = min(block_size(tokens, shape.hidden, max(chunk // 2, 1) if keeps else chunk, rows), rows) * tokens
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
        there = attention_results(process) if model.recompute_keep else 0.0
        state = process.e * process.shape.hidden * process.s  # the chunk's input is among what is held
        alone = {WORKING: min(together, layers) * (kept(process) - there) - state}
    moments = {
        "backward": (held, alone, backward_of_layer(process)),
        "update": ({WORKING: norm_of_gradients(process, stage)},),
    }
    if stage == process.stages - 1:
        moments["log-probs"] = (held, head(process))
    sums = [Moment(_sum(base, *parts), name) for name, parts in moments.items()]
    return max(sums, key=lambda moment: moment.total)


def _sum(*parts: dict[str, Any]) -> dict[str, int]:
    return {kind: round(sum(part.get(kind, 0) for part in parts)) for kind in KINDS}
