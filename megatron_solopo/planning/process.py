"""The sizes of a model, of a pack and of a process in a layout, that closed forms are made of."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import FULL_ATTENTION, attention_cost
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.model.cost import (
    attention_weights,
    key_widths,
    latents,
    mean_width,
    query_widths,
    whole_attention_weights,
)
from megatron_solopo.model.families.family import Norms
from megatron_solopo.model.families.fields import (
    each_layer,
    has_latents,
    head_dim,
    linear_layers,
    logit_cap,
    mlp_width,
    value_dim,
)
from megatron_solopo.model.families.projections import projections_of
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.model.tiles import tiles_of
from megatron_solopo.pack import Windows
from megatron_solopo.parallel.kernels import is_wide
from megatron_solopo.parallel.topology import data_parallel_size, stage_sizes
from megatron_solopo.planning.table import stages_that_matter


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        queries, keys: widths of queries and of keys (as of values), of all heads, the mean over the layers, as of
            `head_dim`.
        attention: weights of the matrices of a layer's attention, the mean over the layers.
        whole: those of `attention` that each tensor-parallel rank has whole, and norms of latents.
        values: width of what attention makes of values, of all query heads; with latents kernels compute that of
            queries.
        latents: widths of a token's latents together, with the channels of keys that heads share; 0 without.
        recurrent: share of the layers that have a recurrent state, and `recurrent_heads` such states each of
            `state_width` keys and values; `recurrent_keys` is the width of the keys of all heads.
        gated: whether attention has an output gate.
        projections: for which LoRA may have adapters.
        ffn: width of the MLP, or of one expert.
        shared: width of the experts that compute every token; 0 without.
        first, first_ffn: number of first layers without experts in a model with some, and the width of their MLPs.
            Their parameters are counted; times and activations are those of the other layers.
        vocabulary: rows of the padded vocabulary.
        experts, chosen: experts of a layer, and those of a token; 0 without experts.
        biases: of queries, keys and values together, of what attention adds, sinks, and norms of latents.
        experts_biases: of one expert.
        norms: of a layer, over the residual stream's width.
        head_norms: whether each head of queries and keys has a norm.
        tied: whether the output weight is the embedding.
        capped: whether logits have a cap.
        wide: width of the queries of heads beyond the flash kernel's, of all heads, the mean over the layers.
        largest: the sizes with those of the layer of the widest queries in the place of means; None: layers are alike.
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
    norms: int = 2
    experts_biases: int = 0
    attention: int = 0
    whole: int = 0
    values: int = 0
    latents: int = 0
    recurrent: float = 0.0
    recurrent_heads: int = 0
    recurrent_keys: int = 0
    state_width: int = 0
    gated: bool = False
    projections: tuple[str, ...] = ()
    shared: int = 0
    first: int = 0
    first_ffn: int = 0
    capped: bool = False
    wide: int = 0
    largest: Shape | None = None

    @classmethod
    def of(cls, hf_config: PretrainedConfig, vocabulary_divisible_by: int) -> Shape:
        family, sizes = family_of(hf_config), [head_dim(layer) for layer in each_layer(hf_config)]
        options = family.transformer_options(hf_config)
        ffn = options.get("moe_ffn_hidden_size", mlp_width(hf_config))
        linear = linear_layers(hf_config)
        queries, keys = mean_width(query_widths(hf_config)), mean_width(key_widths(hf_config))
        shape = cls(
            layers=hf_config.num_hidden_layers,
            hidden=hf_config.hidden_size,
            heads=hf_config.num_attention_heads,
            queries=queries,
            keys=keys,
            ffn=ffn,
            vocabulary=padded_vocab_size(hf_config, vocabulary_divisible_by),
            experts=options.get("num_moe_experts", 0),
            chosen=options.get("moe_router_topk", 0),
            biases=(queries + 2 * keys) * bool(options.get("add_qkv_bias"))
            + hf_config.hidden_size * bool(options.get("add_bias_linear"))
            + hf_config.num_attention_heads * (options.get("softmax_type") == "learnable")
            + sum(latents(hf_config)),
            head_norms=bool(options.get("qk_layernorm")),
            head_dim=mean_width(sizes),
            tied=hf_config.tie_word_embeddings,
            attention=attention_weights(hf_config),
            whole=whole_attention_weights(hf_config) + sum(latents(hf_config)),
            values=value_dim(hf_config) * hf_config.num_attention_heads if has_latents(hf_config) else queries,
            latents=whole_attention_weights(hf_config) // hf_config.hidden_size,
            recurrent=sum(linear) / len(linear),
            recurrent_heads=getattr(hf_config, "linear_num_value_heads", 0),
            recurrent_keys=getattr(hf_config, "linear_num_key_heads", 0) * getattr(hf_config, "linear_key_head_dim", 0),
            state_width=getattr(hf_config, "linear_value_head_dim", 0),
            gated=bool(options.get("attention_output_gate")),
            projections=projections_of(hf_config),
            norms=4 if family.norms is Norms.BOTH else 2,
            experts_biases=(2 * ffn + hf_config.hidden_size) * bool(options.get("add_bias_linear")),
            shared=options.get("moe_shared_expert_intermediate_size", 0),
            first=options.get("moe_layer_freq", [1]).count(0),
            first_ffn=mlp_width(hf_config),
            capped=logit_cap(hf_config) is not None,
            wide=mean_width([width * is_wide(of) for width, of in zip(query_widths(hf_config), sizes, strict=True)]),
        )
        if len({*sizes}) == 1:
            return shape
        size, keys = max(zip(sizes, key_widths(hf_config), strict=True))
        queries = size * shape.heads
        of_largest = replace(shape, queries=queries, keys=keys, values=queries, wide=queries * is_wide(size))
        return replace(shape, largest=of_largest)


@dataclass(frozen=True)
class Work:
    """A pack, of all context-parallel ranks, and how many a process computes in a step.

    Attributes:
        tokens: with padding.
        key_rows: rows of keys that its pieces attend to: a shared prompt's again for each of its responses.
        predicted: response tokens.
        pairs: pairs of tokens that attend, the mean over the layers.
    """

    tokens: int
    key_rows: int
    predicted: int
    pairs: float
    packs: int

    @classmethod
    def of(
        cls,
        group: TokenGroup,
        groups: int,
        packs: int,
        share: bool,
        pieces: int,
        prompts: int,
        windows: Windows = FULL_ATTENTION,
    ) -> Work:
        """Returns a pack of ``groups`` times the same group, whose pieces and prompts are padded as in a `StepPlan`."""
        tokens, plain = group.tokens(share, pieces, prompts), group.tokens(share)
        repeated = sum(len(prompt.ids) * len(prompt.completions) for prompt in group.prompts) if share else 0
        return cls(
            tokens=groups * tokens,
            key_rows=groups * (tokens + repeated),
            predicted=groups * sum(len(completion.ids) for _, completion in group.segments()),
            pairs=groups * 6 * (attention_cost(group, 1, share, windows) - plain),  # which divides by 6 widths
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
        self.scores = config.method.reference == "resident"  # the reference's forward pass in each step
        tiles = config.model.mlp_tiles
        self.tiles = tiles_of(tiles, self.t, shape.hidden) if tiles else 0

    @property
    def of_largest_layer(self) -> Process:
        """The process with `Shape.largest`."""
        largest = copy.copy(self)
        largest.shape = self.shape.largest or self.shape
        return largest

    @property
    def repeated_keys(self) -> int:
        """Returns the width of keys that are repeated for each query head: torch's kernel for float32 and wide heads
        takes as many heads of keys as of queries (parallel/layout.py)."""
        if self.shape.queries == self.shape.keys or self.context > 1:
            return 0
        return self.shape.queries if self.e == 4 else self.shape.wide

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
