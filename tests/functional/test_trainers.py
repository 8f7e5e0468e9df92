"""Checkpoints of Megatron-LM and Megatron-Bridge: models of megatron-core's own layers, saved and loaded by it alone as
those trainers do, against this package's commands and transformers."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import check_refusal
from test_convert import convert, same, succeed
from tiny_models import QWEN3_MOE, SHAPE, write_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

IDS = torch.tensor([[4, 9, 17, 5, 33, 21, 60, 8, 50, 4]])
MODELS: dict[str, Any] = {
    "qwen2": Qwen2Config(
        **SHAPE, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, **QWEN3_MOE, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
}
PADDED = 80
"""Rows of the vocabulary; this package has others."""


@contextlib.contextmanager
def megatron_core() -> Iterator[None]:
    """megatron-core on one CPU process."""
    from megatron.core import parallel_state

    from megatron_solopo.parallel import platform

    started = platform.start("cpu")
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        platform.stop(started)


def trainers_model(hf_config: Any, fused_before_experts: bool = False, **changes: Any) -> Any:
    """A GPTModel as Megatron-LM makes one of its arguments, of megatron-core's layers, RoPE and attention.

    Args:
        fused_before_experts: its names are Transformer Engine's, which does not fuse the norm before experts.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    experts = getattr(hf_config, "num_experts", None)
    of_experts = dict(
        num_moe_experts=experts,
        moe_ffn_hidden_size=getattr(hf_config, "moe_intermediate_size", None),
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
    )
    config = TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=getattr(hf_config, "head_dim", None),
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=hf_config.model_type == "qwen2",
        qk_layernorm=bool(experts),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **(of_experts if experts else {}),
        **changes,
    )
    model_parallel_cuda_manual_seed(7)
    spec: Any = get_gpt_layer_local_spec(experts, qk_layernorm=bool(experts), normalization="RMSNorm")
    if experts and not fused_before_experts:
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=hf_config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(hf_config.rope_parameters["rope_theta"]),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
    )


def log_probs_of(model: Any, rows: int) -> torch.Tensor:
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.triu(torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool), 1)  # True: hidden
    with torch.no_grad():
        return model(IDS, positions, mask)[..., :rows].log_softmax(-1)


def save_as_trainers_do(model: Any, folder: Path, iteration: int, recorded: dict[str, Any], legacy: bool) -> None:
    """As `save_checkpoint` of Megatron-LM.

    Args:
        recorded: arguments of the run.
        legacy: with a common.pt, as megatron-core before 0.19.
    """
    from megatron.core import dist_checkpointing

    source = folder / f"iter_{iteration:07d}"
    source.mkdir(parents=True)
    beside = {
        "args": argparse.Namespace(**recorded),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": {"singleton_local_shards": False},
    }
    state = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
    request = dist_checkpointing.save(
        state | ({} if legacy else beside), str(source), async_sharded_save=True, async_strategy="mcore"
    )
    assert request is not None
    request.execute_sync()  # its other way starts an interpreter
    if legacy:
        torch.save(beside, source / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


RECORDED = {"num_layers": 2, "hidden_size": 32, "rotary_percent": 1.0, "swiglu": True, "params_dtype": torch.float32}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, torch.Tensor]]:
    """name -> (folder of a trainer, folder with config.json and tokenizer, its model's log-probs)."""
    work, made = tmp_path_factory.mktemp("trainers"), {}
    cases = {"qwen2": ("qwen2", {}, False), "qwen3_moe": ("qwen3_moe", {}, True)}
    cases["experts by layer"] = ("qwen3_moe", {"moe_layer_freq": [1, 1]}, False)
    with megatron_core():
        for name, (kind, changes, fused) in cases.items():
            hf = write_model(work / name / "hf", MODELS[kind])
            (hf / "model.safetensors").unlink()
            model = trainers_model(MODELS[kind], fused, **changes)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            save_as_trainers_do(model, work / name / "trainer", 30, RECORDED, legacy=fused)
            made[name] = work / name / "trainer", hf, log_probs_of(model, SHAPE["vocab_size"])
    return made


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "experts by layer"])
def test_their_checkpoints_are_read(theirs: dict[str, Any], tmp_path: Path, name: str) -> None:
    """By name and by meaning: transformers computes what megatron-core did, from either way out."""
    folder, hf, expected = theirs[name]
    succeed("megatron-to-hf", "--load", folder, "--hf-path", hf, "--save-hf", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        found = model(IDS).logits.log_softmax(-1)
    assert (found - expected).abs().max() < 1e-5
    succeed("megatron-to-megatron", "--load", folder, "--hf-path", hf, "--save", tmp_path / "megatron")
    succeed("megatron-to-hf", "--load", tmp_path / "megatron", "--save-hf", tmp_path / "again")
    assert same(tmp_path / "hf", tmp_path / "again")


@pytest.mark.parametrize("name", MODELS)
def test_they_load_a_megatron_folder(tmp_path: Path, name: str) -> None:
    """With all that they read: the name of the checkpoint, arguments, weights and the empty scales of their layers."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    hf = write_model(tmp_path / "hf", MODELS[name])
    output = succeed("hf-to-megatron", "--hf-path", hf, "--save", tmp_path / "megatron")
    assert "Megatron-LM and Megatron-Bridge start from it too" in output
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(IDS).logits.log_softmax(-1)
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text().strip() == "release"
    source = str(tmp_path / "megatron/release")
    with megatron_core():
        model = trainers_model(MODELS[name])
        state = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
        loaded: Any = dist_checkpointing.load(state, source, strict="raise_unexpected")
        model.load_state_dict(loaded["model"])
        assert (log_probs_of(model, SHAPE["vocab_size"]) - expected).abs().max() < 1e-5
        assert dist_checkpointing.load_content_metadata(source) is not None
        keys = {part.key for part in load_sharded_metadata(source).values()}
        for number in (False, True):  # megatron-core 0.19's place and that of earlier versions
            arguments = dist_checkpointing.load_common_state_dict(source)["args"]
            for field, value in vars(model.config).items():
                known = field in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
                if known or field in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_router_topk", "add_qkv_bias"):
                    assert getattr(arguments, field, value) == value, field
            assert arguments.rotary_base == MODELS[name].rope_parameters["rope_theta"]
            if not number:
                (tmp_path / "megatron/release/common.pt").unlink()
    norms = {"decoder.final_layernorm", "decoder.layers.self_attention.linear_qkv", "decoder.layers.mlp.linear_fc1"}
    norms = norms if name == "qwen2" else {"decoder.final_layernorm", "decoder.layers.pre_mlp_layernorm"}
    assert {f"{module}._extra_state" for module in norms} <= keys


def spoil_index(folder: Path) -> None:
    (folder / "iter_0000030/.metadata").write_bytes(pickle.dumps(Spoiled()))


def spoil_common(folder: Path) -> None:
    torch.save({"args": Spoiled()}, folder / "iter_0000030/common.pt")


def other_base(folder: Path) -> None:
    torch.save({"args": argparse.Namespace(rotary_base=10_000)}, folder / "iter_0000030/common.pt")


def other_epsilon(folder: Path) -> None:
    section = {"layernorm_epsilon": 1e-3, "share_embeddings_and_output_weights": True, "num_layers": 2}
    (folder / "iter_0000030/run_config.yaml").write_text(
        yaml.safe_dump({"model": section}) + "  dtype: !!python/name:torch.bfloat16 ''\n"
    )


def cut_file(folder: Path) -> None:
    os.truncate(next((folder / "iter_0000030").glob("*.distcp")), 1000)


def other_format(folder: Path) -> None:
    (folder / "iter_0000030/metadata.json").write_text('{"sharded_backend": "zarr"}')


def not_distributed(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000030")
    (folder / "iter_0000030/mp_rank_00").mkdir(parents=True)


class Spoiled:
    """A pickle that runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (spoil_index, "pickle-unsafe", ["iter_0000030/.metadata", "mkdir"]),
        (spoil_common, "pickle-unsafe", ["iter_0000030/common.pt", "mkdir"]),
        (other_base, "checkpoint-settings", ["its args has rotary_base = 10000", "50000"]),
        (other_epsilon, "checkpoint-settings", ["its run_config.yaml has norm_epsilon = 0.001", "1e-06"]),
        (cut_file, "checkpoint-incomplete", ["__0_0.distcp has 1,000 bytes"]),
        (other_format, "checkpoint-format", ["'zarr'", "--ckpt-format torch_dist"]),
        (not_distributed, "checkpoint-incomplete", ["format torch;", "--ckpt-format torch_dist"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_refused(
    theirs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    code: str,
    named: list[str],
) -> None:
    """One line, and no code of a checkpoint runs."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(theirs["qwen2"][0], tmp_path / "trainer")
    change(folder)
    status, _, err = convert(
        "megatron-to-hf", "--load", folder, "--hf-path", theirs["qwen2"][1], "--save-hf", tmp_path / "new"
    )
    assert status == 2 and err.count("\n") == 1, err
    check_refusal(err, code, *named)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


def test_no_tensor_is_lost(theirs: dict[str, Any], tmp_path: Path) -> None:
    """A model of other layers, or with biases that config.json does not have, is refused by name."""
    folder, _, _ = theirs["qwen2"]
    llama = write_model(tmp_path / "llama", LlamaConfig(**SHAPE, rms_norm_eps=1e-6, rope_theta=5e4))
    where = ("--load", folder, "--hf-path", llama, "--save-hf", tmp_path / "new")
    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    config.rope_parameters = MODELS["qwen2"].rope_parameters
    config.save_pretrained(llama)
    status, _, err = convert("megatron-to-hf", *where)
    assert status == 2
    check_refusal(err, "tensor-left-over", "'decoder.layers.self_attention.linear_qkv.bias'")
    status, _, err = convert("megatron-to-hf", "--load", folder, "--save-hf", tmp_path / "new")
    assert status == 2
    check_refusal(err, "option-missing", "--hf-path")
