"""What Transformer Engine is called with: names, widths, token counts, and sequences as its kernels require."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from refusals import refused
from tiny_models import EXPERTS, SHAPE
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, MixtralConfig

from megatron_solopo.config import FP8_MULTIPLES, Config
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.model import transformer_engine
from megatron_solopo.model.attention import PackedAttention, pack_layout
from megatron_solopo.model.build import transformer_config
from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.pack import Context, Side
from megatron_solopo.parallel.layout import block_layout, select
from megatron_solopo.parallel.sequences import sequence_layout


def fp8(recipe: str = "tensorwise", **parallel: int | bool) -> Config:
    config = Config()
    config.model.bf16, config.model.transformer_impl = True, transformer_engine.NAME
    config.model.fp8_format, config.model.fp8_recipe = "hybrid", recipe
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


def draw_groups(count: int) -> list[TokenGroup]:
    draw = torch.Generator().manual_seed(count)

    def ids(longest: int) -> list[int]:
        return torch.randint(1, 60, (int(torch.randint(1, longest, (1,), generator=draw)),), generator=draw).tolist()

    return [
        TokenGroup(
            str(number),
            tuple(
                Prompt(context, ids(40), tuple(Completion(side, ids(12)) for side in (Side.CHOSEN, Side.REJECTED)))
                for context in Context
            ),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_every_process_computes_as_many_tokens_as_fp8_requires(
    recipe: str, tensor: int, context: int, share: bool
) -> None:
    config = fp8(recipe, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1, context_parallel_size=context)
    config.training.micro_batch_size, config.data.share_prompts = 3, share
    groups = draw_groups(8)
    plan = plan_step(groups, 32, 2, config)
    for places in itertools.chain(*plan.shares, [[]]):
        pack = build_pack([groups[i] for i in places], places, share, plan.of_packs, plan.of_pieces)
        assert pack.tokens.numel() % (FP8_MULTIPLES[recipe] * tensor * context) == 0


def test_padding_computes_nothing_that_the_pack_does_not() -> None:
    """The largest value of a tensor is FP8's scale."""
    group = draw_groups(1)[0]
    pack = build_pack([group], [0], True, 128)
    first, last = pack.pieces[0], pack.pieces[-1]
    assert last.length == 0 and last.padding == pack.padding > first.length
    same = slice(last.start, last.start + first.length)
    assert pack.tokens[same].tolist() == pack.tokens[: first.length].tolist() == group.prompts[0].ids
    assert pack.positions[same].tolist() == list(range(first.length))
    assert set(pack.tokens[last.start :].tolist()) <= set(pack.tokens[: last.start].tolist())
    assert build_pack([], [], True, 16).tokens.tolist() == [0] * 16


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout, scale: float) -> torch.Tensor:
    """Each sequence of cumulated lengths alone, queries aligned to the end of the keys."""
    sequences = layout.attention
    query, key = rotate(query, layout.cos, layout.sin), select(rotate(key, layout.cos, layout.sin), sequences.keys)
    value, outputs = select(value, sequences.keys), []
    bounds = zip(itertools.pairwise(sequences.cu_seqlens_q), itertools.pairwise(sequences.cu_seqlens_kv), strict=True)
    for (q, next_q), (k, next_k) in bounds:
        mask = torch.ones(next_q - q, next_k - k, dtype=torch.bool).tril(int((next_k - k) - (next_q - q)))
        parts = (x.transpose(0, 1) for x in (query[q:next_q], key[k:next_k], value[k:next_k]))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("share", [True, False])
def test_sequences_attend_to_what_pieces_attend_to(share: bool, multiple: int) -> None:
    pack = build_pack(draw_groups(3), [0, 1, 2], share, multiple)
    frequencies = RotaryFrequencies(LlamaConfig(**SHAPE))
    sequences = pack_layout(sequence_layout(pack.pieces), pack.positions, frequencies, torch.float64)
    layout = sequences.attention
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(pack.tokens.numel(), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    settings = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    portable = PackedAttention(settings, 1, None, "self", softmax_scale=0.4)
    blocks = pack_layout(block_layout(pack.pieces), pack.positions, frequencies, torch.float64)
    expected = portable(query, key, value, None, packed_seq_params=blocks)
    torch.testing.assert_close(attend(query, key, value, sequences, 0.4), expected, rtol=0, atol=1e-13)
    assert (layout.keys is None) == (not share)
    assert layout.max_seqlen_q == max(layout.cu_seqlens_q.diff()) and layout.cu_seqlens_q.dtype == torch.int32
    assert layout.max_seqlen_kv == max(layout.cu_seqlens_kv.diff())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        ("layers.0.mlp.experts.linear_fc2.weight12", "layers.0.mlp.experts.local_experts.12.linear_fc2.weight"),
    ],
)  # fmt: skip
def test_fused_parameters_have_their_portable_names(theirs: str, ours: str) -> None:
    assert transformer_engine.portable_name(theirs) == ours == transformer_engine.portable_name(ours)


LARGE = SHAPE | dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=4)


@pytest.mark.parametrize(
    ("shape", "recipe", "parallel", "named"),
    [
        (dict(hidden_size=1000), "tensorwise", {}, ["hidden_size", " 1000,", "multiple of 16;"]),
        (dict(intermediate_size=2816 + 16), "mxfp8", {}, ["MLP width", " 2832,", "multiple of 32;"]),
        (dict(), "mxfp8", dict(tensor_model_parallel_size=16), ["MLP width", " 176,", "multiple of 32;"]),
        (dict(head_dim=60), "delayed", {}, None),
        (dict(head_dim=60), "mxfp8", {}, None),
        (dict(head_dim=60), "blockwise", {}, ["attention width", " 480,", "multiple of 128;"]),
        (dict(num_key_value_heads=1, head_dim=8), "blockwise", {}, ["attention width", " 64,"]),
        (dict(), "blockwise", {}, None),
    ],
)  # fmt: skip
def test_widths_that_fp8_does_not_support_are_one_line(
    shape: dict, recipe: str, parallel: dict, named: list[str] | None
) -> None:
    hf_config = LlamaConfig(**LARGE | shape)
    if parallel:
        hf_config.num_attention_heads = hf_config.num_key_value_heads = 16
    if named is None:
        transformer_engine.check_widths(hf_config, fp8(recipe, **parallel))
        return
    with refused("fp8-width", f"--fp8-recipe {recipe}: ", "--fp8-format", *named):
        transformer_engine.check_widths(hf_config, fp8(recipe, **parallel))


def test_width_of_an_expert_counts_for_models_with_experts() -> None:
    hf_config = MixtralConfig(**LARGE | EXPERTS | dict(intermediate_size=200))
    with refused("fp8-width", "MLP width", " 200,", "multiple of 16;"):
        transformer_engine.check_widths(hf_config, fp8())
    hf_config.intermediate_size = 64
    transformer_engine.check_widths(hf_config, fp8(expert_tensor_parallel_size=4))
    with refused("fp8-width", "MLP width", " 8,", "multiple of 16;"):
        transformer_engine.check_widths(hf_config, fp8(expert_tensor_parallel_size=8))


def test_heads_that_cannot_be_exchanged_for_sequence_are_one_line() -> None:
    config = fp8(context_parallel_size=8, tensor_model_parallel_size=1)
    config.model.fp8_format, config.parallel.cp_comm_type = None, "a2a"
    with refused(
        "layout-not-divisible", "--cp-comm-type a2a: ", "num_key_value_heads", " 4,", "--context-parallel-size 8"
    ):
        transformer_engine.check_widths(LlamaConfig(**LARGE), config)
    config.parallel.context_parallel_size = 4
    transformer_engine.check_widths(LlamaConfig(**LARGE), config)
    config.parallel.cp_comm_type, config.parallel.context_parallel_size = "p2p", 8
    transformer_engine.check_widths(LlamaConfig(**LARGE), config)
    config.parallel.cp_comm_type, config.parallel.context_parallel_size = "a2a", 3
    odd = LlamaConfig(**LARGE | dict(hidden_size=1536, num_attention_heads=12, num_key_value_heads=3))
    with refused("layout-not-divisible", "--cp-comm-type a2a: ", "num_key_value_heads", " 3,", "odd", "p2p"):
        transformer_engine.check_widths(odd, config)


def test_a_machine_without_it_is_one_line() -> None:
    with refused("cuda-missing", "--transformer-impl transformer_engine: "):
        transformer_engine.check_machine(fp8(), "cpu")
    transformer_engine.check_machine(Config(), "cpu")


def test_a_machine_without_deepep_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.parallel.moe_token_dispatcher_type = "flex"
    with refused("cuda-missing", "--moe-token-dispatcher-type flex: ", "alltoall"):
        transformer_engine.check_machine(config, "cpu")
    with refused("package-missing", "--moe-token-dispatcher-type flex: ", "deep_ep", "alltoall"):
        transformer_engine.check_machine(config, "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "deep_ep" or None)
    transformer_engine.check_machine(config, "cuda")


def documented_rope(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_pos_emb` of Transformer Engine 2.20 for tensor_format sbhd, not interleaved, as its documentation
    describes it: angles in float32, a row of them for each row of the sequence, the same for batch and heads."""
    assert t.dim() == 4 and freqs.dtype == torch.float32 and freqs.device == t.device
    assert freqs.shape[0] >= t.shape[0] and freqs.shape[1:] == (1, 1, t.shape[3])
    freqs = freqs[: t.shape[0]]
    first, second = t.chunk(2, dim=-1)
    return t * freqs.cos().to(t.dtype) + torch.cat((-second, first), dim=-1) * freqs.sin().to(t.dtype)


@pytest.mark.parametrize("scaling", [None, 1.3], ids=["default", "yarn with a factor on cos and sin"])
@pytest.mark.parametrize("share", [True, False])
def test_its_rope_rotates_each_row_by_its_own_position(
    share: bool, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions of responses repeat where they share a prompt; values and gradients are the portable ones."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", documented_rope)
    hf_config = LlamaConfig(**SHAPE)
    if scaling is not None:
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
        hf_config = LlamaConfig(**SHAPE, rope_parameters=yarn | {"attention_factor": scaling})
    pack, frequencies = build_pack(draw_groups(3), [0, 1, 2], share, 1), RotaryFrequencies(hf_config)
    size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    mixed = torch.randn(pack.tokens.numel(), 4, 2 * size, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (True, False):
        layout = pack_layout(sequence_layout(pack.pieces), pack.positions, frequencies, torch.float64, fused)
        assert (layout.angles is not None) == fused
        rotated = layout.rotate(mixed[..., :size])  # strided, as megatron-core splits queries and keys
        results.append((rotated, torch.autograd.grad((rotated * rotated.detach().cos()).sum(), mixed)[0]))
    for ours, portable in zip(*results, strict=True):
        torch.testing.assert_close(ours, portable, rtol=0, atol=1e-6)  # cos and sin are float32 in both


def test_its_rope_gets_tensors_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with fake tensors: bfloat16 queries, float32 angles, both there."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", documented_rope)
    with FakeTensorMode(allow_non_fake_inputs=True):
        positions = torch.empty(6, dtype=torch.int64, device="cuda")
        layout = pack_layout(None, positions, RotaryFrequencies(LlamaConfig(**SHAPE)), torch.bfloat16, True)
        size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
        rotated = layout.rotate(torch.empty(6, 4, size, dtype=torch.bfloat16, device="cuda"))
    assert (rotated.shape, rotated.dtype, rotated.device.type) == ((6, 4, size), torch.bfloat16, "cuda")


@pytest.mark.parametrize("engine", [True, False])
def test_options_reach_megatron_core(engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of portable layers those that are Transformer Engine's stay off."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)  # as on CUDA
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", documented_rope)
    for name in (
        "permute",
        "permute_with_probs",
        "sort_chunks_by_index",
        "sort_chunks_by_index_with_probs",
        "unpermute",
    ):
        monkeypatch.setattr(moe_utils, f"fused_{name}", documented_rope)  # megatron-core looks whether they are there
    config = Config()
    config.model.bf16, config.model.transformer_impl = True, transformer_engine.NAME if engine else "portable"
    for on in (True, False):
        config.model.rope_fusion = config.model.gradient_accumulation_fusion = on
        config.model.moe_permute_fusion = config.model.disable_parameter_transpose_cache = on
        config.parallel.moe_token_dispatcher_type = "alltoall" if on else "allgather"
        settings = transformer_config(MixtralConfig(**SHAPE, **EXPERTS), config, torch.bfloat16)
        assert settings.apply_rope_fusion == settings.moe_permute_fusion == (on and engine)
        assert settings.gradient_accumulation_fusion == settings.disable_parameter_transpose_cache == on
        # packs of different lengths, and the dispatcher that megatron-core refuses with them
        assert (settings.moe_token_dispatcher_type, settings.variable_seq_lengths) == (
            config.parallel.moe_token_dispatcher_type,
            on,
        )


def test_a_machine_without_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("transformer-engine-unusable", "--transformer-impl transformer_engine: ", "(optional)", "pip install"):
        transformer_engine.check_machine(fp8(), "cuda")
