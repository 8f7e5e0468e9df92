"""Transformer Engine's layers built on a machine without a GPU; run by test_te_layers.py in a separate process.

Its kernels need CUDA, but its modules hold their parameters on any device. Here they are built on the CPU
(Transformer Engine sees a pretended CUDA device), which shows names, shapes, cuts, checkpoints and what attention is
called with; the kernels themselves are compared in tests/gpu.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from megatron_solopo.pack import Context, Side

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import EXPERTS, QWEN3_MOE, SHAPE, write_model  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo.config import Config  # noqa: E402
from megatron_solopo.parallel import cpu_shim, platform  # noqa: E402

MODELS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **QWEN3_MOE, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
}


MARKS = {"tensor_model_parallel": False, "partition_dim": -1, "allreduce": True, "sequence_parallel": False}
"""What megatron-core reads of a parameter, and its default where nothing is set."""


def options() -> Config:
    """Tensor and sequence parallel over all processes."""
    config = Config()
    config.parallel.tensor_model_parallel_size = processes = int(os.environ.get("WORLD_SIZE", "1"))
    config.parallel.sequence_parallel = processes > 1
    config.model.make_vocab_size_divisible_by = SHAPE["vocab_size"]  # no process holds padding only
    return config


@contextlib.contextmanager
def cuda_seems_there() -> Iterator[None]:
    with mock.patch("torch.cuda.is_available", lambda: True):
        yield


def engine_of(here: Any, folder: Path, implementation: str, **model: Any) -> Any:
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine

    config = options()
    config.model.hf_path, config.model.bf16 = str(folder), True
    config.model.transformer_impl = implementation
    for name, value in model.items():
        setattr(config.model, name, value)
    with cuda_seems_there() if implementation != "portable" else contextlib.nullcontext():
        return build_engine(here, read_hf_config(folder), config)


def compare_models(here: Any, folder: Path) -> dict[str, Any]:
    """Parameters of both implementations from one folder, what the export makes of them, and random ones."""
    from megatron_solopo.conversion.hf import hf_tensors
    from megatron_solopo.model.transformer_engine import portable_name

    engines = [engine_of(here, folder, name) for name in ("portable", "transformer_engine")]
    ours, theirs = (dict(engine.models[0].named_parameters()) for engine in engines)
    renamed = {portable_name(name): parameter for name, parameter in theirs.items()}
    exports = [dict(hf_tensors(engine.models, engine.hf_config)) for engine in engines]
    drawn = [
        {portable_name(name): parameter for name, parameter in engine.models[0].named_parameters()}
        for engine in (engine_of(here, folder, name, random_init=True) for name in ("portable", "transformer_engine"))
    ]
    return {
        "kinds": sorted({type(module).__name__ for module in engines[1].models[0].modules()}),
        "ours": ours_in(engines[1]),
        "fused": sorted(set(theirs) - set(ours)),
        "same_names": ours.keys() == renamed.keys(),
        "same_values": all(torch.equal(ours[name], renamed[name]) for name in ours),
        "same_drawn": all(torch.equal(drawn[0][name], drawn[1][name]) for name in ours),
        "other_marks": [
            [name, key]
            for name, parameter in ours.items()
            for key, default in MARKS.items()
            if getattr(parameter, key, default) != getattr(renamed[name], key, default)
            and (key != "partition_dim" or parameter.tensor_model_parallel)
        ],
        "same_export": exports[0].keys() == exports[1].keys()
        and all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0]),
    }


def ours_in(engine: Any) -> list[str]:
    """The modules of this package in a model."""
    kinds = {type(module) for module in engine.models[0].modules()}
    return sorted(kind.__name__ for kind in kinds if kind.__module__.startswith("megatron_solopo."))


def options_in_layers(here: Any, folder: Path) -> dict[str, Any]:
    """What options make of Transformer Engine's layers: the modules of this package that are left, and what its
    matrices are built with."""
    from megatron.core.tensor_parallel import layers

    engine = engine_of(here, folder, "transformer_engine", use_te_activation_func=True)
    facts: dict[str, Any] = {"ours with its activation": ours_in(engine)}
    with mock.patch.object(layers, "_grad_accum_fusion_available", True):  # as on CUDA
        for fused in (True, False):
            changed = {"gradient_accumulation_fusion": fused, "disable_parameter_transpose_cache": fused}
            engine = engine_of(here, folder, "transformer_engine", fp8_format="hybrid", **changed)
            matrices = [m for m in engine.models[0].modules() if hasattr(m, "fuse_wgrad_accumulation")]
            facts[f"fused {fused}"] = [
                len(matrices),
                sorted({(m.fuse_wgrad_accumulation, m.disable_parameter_transpose_cache) for m in matrices}),
            ]
    return facts


def compare_checkpoints(here: Any, folder: Path, work: Path, first: str, then: str) -> dict[str, Any]:
    """A run of one implementation saves, one of the other loads: weights and Adam's moments."""
    from megatron_solopo.config import TrainingConfig
    from megatron_solopo.model.transformer_engine import portable_name
    from megatron_solopo.training.checkpoint import Checkpoints, load_checkpoint
    from megatron_solopo.training.engine import build_optimizer

    training = TrainingConfig()
    states, parameters = [], []
    for number, implementation in enumerate((first, then)):
        engine = engine_of(here, folder, implementation)
        optimizer, scheduler = build_optimizer(engine, training, 10)
        named = {portable_name(name): parameter for name, parameter in engine.models[0].named_parameters()}
        if number == 0:
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                part._init_optimizer_states_with_dummy_values()
            for seed, (_, moment) in enumerate(sorted(second_moments(optimizer, named).items())):
                moment.copy_(torch.rand(moment.shape, generator=torch.Generator().manual_seed(seed)))
            config = options()
            config.output.save = str(work)
            Checkpoints(config, engine, optimizer, scheduler, 0, {}).save(1)
        else:
            with torch.no_grad():
                for parameter in named.values():
                    parameter.zero_()
            load_checkpoint(work / "iter_0000001", engine, optimizer, scheduler)
        parameters.append({name: parameter.detach().clone() for name, parameter in named.items()})
        states.append({name: moment.clone() for name, moment in second_moments(optimizer, named).items()})
    return {
        "same_values": all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0]),
        "same_moments": states[0].keys() == states[1].keys() == parameters[0].keys()
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0]),
        "not_zero": all(bool(tensor.any()) for tensor in [*states[1].values(), *parameters[1].values()]),
    }


def trainer_starts_from_folder(here: Any, folder: Path, work: Path) -> dict[str, bool]:
    """Whether a model of megatron-core's own spec for Transformer Engine, as Megatron-LM and Megatron-Bridge build it,
    loads a Megatron folder with their default strictness, and has its weights then."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megatron_solopo.conversion.megatron_folder import save_megatron_folder
    from megatron_solopo.conversion.sidecar_files import SidecarFiles, config_json
    from megatron_solopo.conversion.start import open_hf_weights
    from megatron_solopo.conversion.trainers import state_of_trainers
    from megatron_solopo.model.transformer_engine import portable_name
    from megatron_solopo.training.engine import build_chunks

    expected = engine_of(here, folder, "transformer_engine")
    hf_config, settings = expected.hf_config, copy.copy(expected.models[0].config)
    settings.use_te_activation_func = False  # megatron-core's default
    models = build_chunks(hf_config, options(), torch.bfloat16)
    vocabulary = models[0].vocab_size
    beside = state_of_trainers(hf_config, models[0].config, vocabulary, torch.bfloat16)
    sidecar_files = SidecarFiles(folder, config_json(folder, hf_config, torch.bfloat16))
    weights = open_hf_weights(models, hf_config, folder, None)
    save_megatron_folder(models, sidecar_files, work, weights, beside)
    spec = get_gpt_layer_with_transformer_engine_spec(
        settings.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=settings.qk_layernorm
    )
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # GPTModel sets them by the option, and refuses those of an earlier model
    with cuda_seems_there():
        model = GPTModel(
            settings,
            spec,
            vocab_size=vocabulary,
            max_sequence_length=SHAPE["max_position_embeddings"],
            position_embedding_type="none",
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        )
    state = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
    loaded: Any = dist_checkpointing.load(state, str(work / "release"))
    model.load_state_dict(loaded["model"])
    ours = {portable_name(name): parameter for name, parameter in expected.models[0].named_parameters()}
    theirs = {portable_name(name): parameter for name, parameter in model.named_parameters()}
    return {
        "same_names": ours.keys() == theirs.keys(),
        "same_values": all(torch.equal(ours[name], theirs[name]) for name in ours),
    }


def second_moments(optimizer: Any, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adam's, by the parameter's portable name."""
    names = {id(parameter): name for name, parameter in named.items()}
    moments = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in itertools.chain(*part.model_float16_groups):
            group, order = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][order]
            moments[names[id(parameter)]] = part.optimizer.state[main]["exp_avg_sq"]
    return moments


def packed_kernel(self: Any, query: Any, key: Any, value: Any, attention_mask: None, **options: Any) -> torch.Tensor:
    """`transformer_engine.pytorch.DotProductAttention.forward` for packed sequences, as its documentation describes it,
    in plain torch."""
    assert options["qkv_format"] == "thd" and not options["pad_between_seqs"]
    bounds = [options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_kv")]
    assert all(options[name].dtype == torch.int32 for name in ("cu_seqlens_q", "cu_seqlens_kv"))
    assert bounds[0][-1] == query.shape[0] and bounds[1][-1] == key.shape[0] == value.shape[0]
    outputs = []
    for (q, next_q), (k, next_k) in zip(*map(itertools.pairwise, bounds), strict=True):
        assert next_q - q <= options["max_seqlen_q"] and next_k - k <= options["max_seqlen_kv"]
        later = 0 if options["attn_mask_type"] == "padding_causal" else (next_k - k) - (next_q - q)
        mask = torch.ones(next_q - q, next_k - k, dtype=torch.bool).tril(later)
        parts = (x.transpose(0, 1) for x in (query[q:next_q], key[k:next_k], value[k:next_k]))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=self.softmax_scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def compare_attention(here: Any, folder: Path) -> dict[str, float]:
    """Largest difference to the portable attention, over packs with shared prompts, separate ones and padding."""
    import transformer_engine.pytorch as te
    from megatron.core.models.common.embeddings import rope_utils
    from transformer_engine.pytorch.attention import rope

    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
    from megatron_solopo.model.attention import PackedAttention, pack_layout
    from megatron_solopo.model.rope import RotaryFrequencies
    from megatron_solopo.parallel.layout import block_layout
    from megatron_solopo.parallel.sequences import sequence_layout

    engine = engine_of(here, folder, "transformer_engine")
    attention = engine.models[0].decoder.layers[0].self_attention.core_attention
    attention.softmax_scale = 0.3
    portable = PackedAttention(engine.models[0].config, 1, None, "self", softmax_scale=0.3)
    frequencies = RotaryFrequencies(engine.hf_config)
    prompts = tuple(
        Prompt(
            context,
            list(range(p)),
            tuple(Completion(Side.CHOSEN, list(range(n)), None, i) for i, n in enumerate(each)),
        )
        for context, p, each in ((Context.SHORT, 5, (3, 1, 7)), (Context.LONG, 11, (2,)))
    )
    groups = [TokenGroup("a", prompts), TokenGroup("b", prompts[:1])]
    worst = {}
    # its kernel for RoPE runs on CUDA alone; here its own formula in torch
    formula = functools.partial(rope.apply_rotary_pos_emb, tensor_format="sbhd", fused=False)
    for share, pack_multiple in ((True, 1), (True, 64), (False, 1), (False, 32)):
        pack = build_pack(groups, [0, 1], share, pack_multiple)
        size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
        shapes = ((pack.tokens.numel(), heads, size) for heads in (4, 2, 2))
        inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        results = []
        with (
            mock.patch.object(te.DotProductAttention, "forward", packed_kernel),
            mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", formula),
        ):
            for module, layout in ((attention, sequence_layout), (portable, block_layout)):
                fused = module is attention
                packed = pack_layout(layout(pack.pieces), pack.positions, frequencies, torch.float64, fused)
                out = module(*inputs, None, packed_seq_params=packed)
                weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
                results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
        worst[f"shared {share}, multiple of {pack_multiple}"] = max(
            (a - b).abs().max().item() for a, b in zip(*results, strict=True)
        )
    return worst


def compare_zigzag() -> bool:
    """Whether Transformer Engine cuts packed sequences over context-parallel ranks as `parallel.zigzag` does."""
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import get_batch_on_this_cp_rank

    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.zigzag import rows_of

    for size in (2, 4):
        lengths = [size * 2 * n for n in (3, 1, 5)]
        ends = list(itertools.accumulate(lengths))
        pieces = [Piece(end - length, length) for end, length in zip(ends, lengths, strict=True)]
        rows = torch.arange(ends[-1])
        for rank in range(size):
            places = {"get_world_size": lambda group, n=size: n, "get_rank": lambda group, n=rank: n}
            with mock.patch.multiple("torch.distributed", **places):
                theirs, *_ = get_batch_on_this_cp_rank(torch.tensor([0, *ends]), rows, rows, rows)
            if theirs.tolist() != rows_of(pieces, rank, size).tolist():
                return False
    return True


def recipes() -> dict[str, list[str]]:
    """What megatron-core makes of each FP8 option."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_solopo.config import FP8_MULTIPLES
    from megatron_solopo.model.build import transformer_config

    recipes = {}
    for recipe, format_ in itertools.product(FP8_MULTIPLES, ("e4m3", "hybrid")):
        config = Config()
        config.model.bf16, config.model.transformer_impl = True, "transformer_engine"
        config.model.fp8_format, config.model.fp8_recipe = format_, recipe
        settings = transformer_config(MODELS["llama"], config, torch.bfloat16)
        try:
            recipe_of_engine = get_fp8_recipe(settings)
            recipes[f"{recipe} {format_}"] = [type(recipe_of_engine).__name__, recipe_of_engine.fp8_format.name]
        except Exception as error:
            recipes[f"{recipe} {format_}"] = [type(error).__name__, str(error)]
    return recipes


def main(work: Path) -> None:
    import transformer_engine.pytorch  # noqa: F401

    cpu_shim._hide_transformer_engine = lambda stack: None
    # Its fused optimizers are kernels; megatron-core then takes torch's.
    sys.modules.update(dict.fromkeys(("transformer_engine.pytorch.optimizers",)))
    here = platform.start("cpu")
    from megatron_solopo.training.engine import initialize_parallel

    initialize_parallel(options())
    alone = "WORLD_SIZE" not in os.environ
    if alone or os.environ["RANK"] == "0":
        for name, hf_config in MODELS.items():
            write_model(work / name, hf_config)
    torch.distributed.barrier()
    facts: dict[str, Any] = {"models": {}, "checkpoints": {}, "trainers": {}}
    for name in MODELS:
        folder = work / name
        facts["trainers"][name] = trainer_starts_from_folder(here, folder, work / f"{name}-trainer")
        facts["models"][name] = compare_models(here, folder)
        for first, then in itertools.permutations(("portable", "transformer_engine")):
            facts["checkpoints"][f"{name}, {first} to {then}"] = compare_checkpoints(
                here, folder, work / f"{name}-{first}", first, then
            )
    if alone:
        facts |= {
            "attention": compare_attention(here, work / "llama"),
            "zigzag": compare_zigzag(),
            "options": {name: options_in_layers(here, work / name) for name in ("qwen3", "qwen3_moe")},
            "recipes": recipes(),
        }
    (work / f"facts-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts, indent=1))
    platform.stop(here)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
