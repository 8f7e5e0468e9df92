"""The megatron-core model equals transformers: log-probs, packs, both directions of conversion."""

import json

import pytest
import torch
import transformers_in_double
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GptOssConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.stretch import Jump
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Side

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=211,
    max_position_embeddings=512,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = SMALL | EXPERTS | dict(moe_intermediate_size=40, head_dim=24)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING, FULL = "sliding_attention", "full_attention"
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GEMMA3 = dict(
    pad_token_id=None, head_dim=24, query_pre_attn_scalar=20, sliding_window=9, layer_types=[SLIDING, FULL, SLIDING]
)
# Layers without a window have other heads, whose values are their keys. The cap bends logits of up to 4.
GEMMA4 = dict(
    pad_token_id=None,
    head_dim=24,
    global_head_dim=40,
    sliding_window=9,
    layer_types=[FULL, SLIDING, FULL],
    final_logit_softcapping=2.5,
)
# Windows shorter than a response, and gate and up beyond their limit of 7.
GPT_OSS = dict(head_dim=24, sliding_window=5, pad_token_id=None, rope_parameters=YARN | {"truncate": False})
GLM4_MOE = SMALL | dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, head_dim=24, pad_token_id=None
)
# RoPE on adjacent pairs of 8 channels, keys of 20 and values of 12; YaRN's scale of the scores is 1.11 squared.
LATENT = SMALL | dict(num_key_value_heads=4, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, kv_lora_rank=20)
LATENT |= dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, first_k_dense_replace=1)
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.8}
LINEAR = dict(
    head_dim=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=12,
    linear_value_head_dim=20,
    layer_types=["linear_attention", FULL, "linear_attention"],
    rope_parameters=PARTIAL,
)
LINEAR_MOE = SMALL | LINEAR | dict(moe_intermediate_size=40, shared_expert_intermediate_size=56)
LINEAR_MOE |= dict(num_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, head_dim=24, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama3-rope": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SMALL, tie_word_embeddings=False, rope_parameters=YARN),
    "qwen2-window-of-some-layers": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=101, max_window_layers=1, tie_word_embeddings=False
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=False),
    "qwen3-tied-yarn": Qwen3Config(
        **SMALL, head_dim=24, tie_word_embeddings=True, rope_parameters=YARN | {"attention_factor": 1.3}
    ),
    "mistral": MistralConfig(**SMALL, head_dim=24, sliding_window=None, tie_word_embeddings=False),
    # As long as the longest sequence of these tests, which it must not touch.
    "mistral-window": MistralConfig(**SMALL, sliding_window=101, tie_word_embeddings=False),
    "mistral-short-window": MistralConfig(**SMALL, sliding_window=7, tie_word_embeddings=False),
    "mistral-window-of-1": MistralConfig(**SMALL, sliding_window=1, tie_word_embeddings=False),
    "qwen2-short-window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=23, max_window_layers=1, tie_word_embeddings=False
    ),
    "qwen3-moe-short-window": Qwen3MoeConfig(
        **QWEN3_MOE, norm_topk_prob=True, use_sliding_window=True, sliding_window=17
    ),
    "ministral": MinistralConfig(**SMALL, head_dim=24, sliding_window=13, layer_types=[SLIDING, FULL, SLIDING]),
    "ministral3": Ministral3Config(
        pad_token_id=None,
        **SMALL,
        head_dim=24,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1], pad_token_id=None),
    "smollm3-window-without-rope": SmolLM3Config(
        **SMALL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=11, pad_token_id=None
    ),
    "phi3": Phi3Config(**SMALL, sliding_window=15, pad_token_id=None),
    "phi3-partial": Phi3Config(**SMALL, rope_parameters=PARTIAL, pad_token_id=None, tie_word_embeddings=True),
    "glm": GlmConfig(**SMALL, head_dim=24, pad_token_id=None),
    "glm4": Glm4Config(**SMALL, head_dim=24, pad_token_id=None),
    "glm4-moe": Glm4MoeConfig(**GLM4_MOE, use_qk_norm=True, routed_scaling_factor=2.5),
    "glm4-moe-groups-and-biases": Glm4MoeConfig(
        **GLM4_MOE | dict(first_k_dense_replace=2, n_shared_experts=2),
        attention_bias=True,
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        tie_word_embeddings=True,
    ),
    "deepseek-v2-lite": DeepseekV2Config(**LATENT, q_lora_rank=None, rope_parameters=MSCALE),
    "deepseek-v2": DeepseekV2Config(
        **LATENT | dict(first_k_dense_replace=0),
        q_lora_rank=28,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.6,
        tie_word_embeddings=True,
    ),
    "deepseek-v3": DeepseekV3Config(
        **LATENT | dict(first_k_dense_replace=2), q_lora_rank=28, n_group=4, topk_group=2, rope_parameters=MSCALE
    ),
    "deepseek-v3-wide-values": DeepseekV3Config(
        **LATENT | dict(v_head_dim=20), q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False
    ),
    # rms_norm_eps is not that of the latents' norms
    "glm4-moe-lite": Glm4MoeLiteConfig(
        **{name: value for name, value in LATENT.items() if name != "first_k_dense_replace"} | {"n_routed_experts": 4},
        q_lora_rank=28,
        rms_norm_eps=1e-5,
        pad_token_id=None,
    ),
    "gemma3": Gemma3TextConfig(**SMALL, **GEMMA3),
    "gemma3-untied-linear": Gemma3TextConfig(
        **SMALL,
        **GEMMA3,
        tie_word_embeddings=False,
        rope_parameters={
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma4": Gemma4TextConfig(
        **SMALL, **GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1
    ),
    "gemma4-untied-without-cap": Gemma4TextConfig(
        **SMALL, **GEMMA4 | dict(final_logit_softcapping=None, hidden_size_per_layer_input=0), tie_word_embeddings=False
    ),
    "gemma4-unified": Gemma4UnifiedTextConfig(**SMALL, **GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=4),
    "olmo2": Olmo2Config(**SMALL, pad_token_id=None),
    "olmo3": Olmo3Config(**SMALL, sliding_window=9, layer_types=[SLIDING, FULL, SLIDING], pad_token_id=None),
    "gpt-oss": GptOssConfig(**SMALL, **EXPERTS, **GPT_OSS),
    "gpt-oss-default-rope": GptOssConfig(
        **SMALL, **EXPERTS, **GPT_OSS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "mistral-linear": MistralConfig(
        **SMALL, sliding_window=None, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    # With 1e-6 this model is 1.9e-5 from float64 in float32, and transformers 1.8e-5.
    "qwen3-5": Qwen3_5TextConfig(**SMALL, **LINEAR, rms_norm_eps=1e-5),
    "qwen3-5-tied": Qwen3_5TextConfig(
        **SMALL | LINEAR | dict(linear_num_value_heads=2, linear_conv_kernel_dim=3), tie_word_embeddings=True
    ),
    "qwen3-5-moe": Qwen3_5MoeTextConfig(**LINEAR_MOE),
    "qwen3-next": Qwen3NextConfig(**LINEAR_MOE | dict(norm_topk_prob=False)),
    "mixtral": MixtralConfig(**SMALL, **EXPERTS),
    "qwen3-moe": Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True),
    "qwen3-moe-softmax-over-all": Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=False, tie_word_embeddings=True),
}


def random_group(seed: int, prompts=((37, (5, 3)), (61, (5,)))) -> TokenGroup:
    """Prompts of random ids with completions of these lengths; positions of the second one are stretched."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(0, SMALL["vocab_size"], (n,), generator=g).tolist()

    return TokenGroup(
        f"g{seed}",
        tuple(
            Prompt(
                context,
                ids(p),
                tuple(Completion(side, ids(c)) for side, c in zip(Side, cs, strict=False)),
                jumps=(Jump(5, 130), Jump(30, 250)) if context == Context.LONG else (),
            )
            for context, (p, cs) in zip(Context, prompts, strict=False)
        ),
    )


@pytest.fixture
def hf_folder(request, tmp_path):
    return random_folder(request.param, tmp_path)


def random_folder(name, folder):
    """A Hugging Face folder of random weights, norms and biases included."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        buffers = (x for name, x in model.named_buffers() if name.endswith(("bias", "layer_scalar")))
        for parameter in (*model.parameters(), *buffers):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "hf")
    return folder / "hf"


def megatron_model(folder, dtype):
    from megatron_solopo.conversion.hf_weights import HfWeights
    from megatron_solopo.model.build import build_model
    from megatron_solopo.model.hf_config import read_hf_config

    hf_config = read_hf_config(folder)
    model = build_model(hf_config, Config(), dtype)
    HfWeights(folder, [model], hf_config).fill_all()
    return hf_config, model


def run_pack(hf_config, model, pack, dtype, chunk=7):
    from megatron_solopo.model.build import rotary_frequencies
    from megatron_solopo.model.families.fields import logit_cap
    from megatron_solopo.model.forward import LogProbHead, device_pack, segment_log_probs

    head = LogProbHead(hf_config.vocab_size, chunk, rotary_frequencies(hf_config), logit_cap(hf_config))
    return segment_log_probs(model, device_pack(pack, model.config, torch.device("cpu")), head, dtype)


def transformers_log_probs(hf, group):
    """Each prompt with each completion, one by one, summed log-probs of the completion."""
    sums = []
    for prompt in group.prompts:
        for completion in prompt.completions:
            ids = torch.tensor([list(prompt.ids) + list(completion.ids)])
            positions = torch.arange(ids.shape[1])[None]
            for token, gap in prompt.jumps:
                positions[:, token:] += gap
            # Without a mask transformers takes a jump for the start of another sequence.
            logits = hf(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
            log_probs = logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 1:, None])[len(prompt.ids) - 1 :, 0]
            sums.append(picked.sum())
    return torch.stack(sums)


@pytest.mark.parametrize("hf_folder", CONFIGS, indirect=True)
@pytest.mark.parametrize("share_prompts", [True, False])
def test_log_probs_equal_transformers(engine, hf_folder, share_prompts):
    hf_config, model = megatron_model(hf_folder, torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    groups = [random_group(seed) for seed in (1, 2)] + [random_group(3, ((90, (4, 11)),))]
    ours = run_pack(hf_config, model, build_pack(groups, range(3), share_prompts), torch.float32)
    theirs = torch.cat([transformers_log_probs(hf, group) for group in groups])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


WITH_EXPERTS = ["mixtral", "qwen3-moe", "qwen3-moe-softmax-over-all"]


@pytest.mark.parametrize("hf_folder", CONFIGS, indirect=True)
def test_greedy_tokens_equal_transformers(engine, hf_folder):
    """Every token of the vocabulary as a separate completion: the whole distribution of the next token."""
    hf_config, model = megatron_model(hf_folder, torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    ids = list(random_group(5, ((90, (1,)),)).prompts[0].ids)
    for _ in range(6):
        every = tuple(Completion(Side.PLAIN, [token], None, token) for token in range(hf_config.vocab_size))
        pack = build_pack([TokenGroup("next", (Prompt(Context.SHORT, ids, every),))], [0])
        with torch.no_grad():
            ours = run_pack(hf_config, model, pack, torch.float32, chunk=64)
            theirs = hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.argmax() == theirs.argmax()
        ids.append(int(theirs.argmax()))


NEW_IN_DOUBLE = ["qwen3", "qwen3-tied-yarn", "mistral", "mistral-window", "mistral-linear"]
WITH_WINDOWS = ["mistral-short-window", "qwen2-short-window", "qwen3-moe-short-window"]
LATER_FAMILIES = [
    *("ministral", "ministral3", "smollm3", "smollm3-window-without-rope", "phi3", "phi3-partial"),
    *("glm", "glm4", "glm4-moe", "glm4-moe-groups-and-biases", "gemma3", "gemma3-untied-linear", "olmo2", "olmo3"),
    *("gemma4", "gemma4-untied-without-cap", "gemma4-unified"),
    *("gpt-oss", "gpt-oss-default-rope", "qwen3-5", "qwen3-5-tied", "qwen3-5-moe", "qwen3-next"),
    *("deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3-wide-values", "glm4-moe-lite"),
]


IN_DOUBLE = ["llama", "qwen2-tied", *NEW_IN_DOUBLE, *WITH_EXPERTS, *WITH_WINDOWS, *LATER_FAMILIES]


@pytest.mark.parametrize("hf_folder", IN_DOUBLE, indirect=True)
def test_gradients_equal_transformers_in_double(engine, hf_folder):
    """Chunked head, shared prompts and padded vocabulary have transformers' gradient, tensor by tensor."""
    from megatron_solopo.conversion.adapters import trained_entries

    hf_config, model = megatron_model(hf_folder, torch.float64)
    hf = transformers_in_double.load(hf_folder)
    groups = [random_group(1), random_group(2)]
    weights = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = run_pack(hf_config, model, build_pack(groups, range(2)), torch.float64)
    theirs = torch.cat([transformers_log_probs(hf, group) for group in groups])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    gradients = transformers_in_double.by_file_name(hf, gradients)
    seen = set()
    for entry, names, parameter in trained_entries(model, hf_config):
        for name, gradient in zip(names, entry.operator.to_hf(parameter.grad), strict=True):
            assert 0 < gradients[name].norm() and (gradient - gradients[name]).norm() <= 1e-10 * gradients[name].norm()
            seen.add(name)
    assert seen == gradients.keys()


@pytest.mark.parametrize("hf_folder", CONFIGS, indirect=True)
def test_round_trip_is_the_identity(engine, hf_folder, tmp_path):
    from megatron_solopo.conversion.save_folder import save_folder

    hf_config, model = megatron_model(hf_folder, torch.float32)
    assert model.vocab_size == 256 and hf_config.vocab_size == 211
    save_folder([model], hf_config, hf_folder, tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (hf_folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("hf_folder", ["qwen2"], indirect=True)
def test_files_of_old_torch_are_loaded_twice_at_most(engine, hf_folder, tmp_path, monkeypatch):
    """For names and shapes, and for the numbers: parameters are filled file by file, not kind by kind."""
    from megatron_solopo.conversion import hf_folder as reading

    tensors = load_file(hf_folder / "model.safetensors")
    file_of = {name: f"{name.split('.')[2] if '.layers.' in name else 2}.bin" for name in tensors}
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    (old / reading.BIN_INDEX).write_text(json.dumps({"weight_map": file_of}))
    for file in set(file_of.values()):
        part = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
        torch.save(part, old / file, _use_new_zipfile_serialization=False)
    loaded, load = [], reading._load_bin
    monkeypatch.setattr(reading, "_load_bin", lambda path: loaded.append(path.name) or load(path))
    _, model = megatron_model(old, torch.float32)
    assert len(loaded) <= 6 and {*loaded} == {"0.bin", "1.bin", "2.bin"}, loaded
    _, expected = megatron_model(hf_folder, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_pack_equals_its_groups_one_by_one(engine, tmp_path):
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    hf_config, model = megatron_model(tmp_path, torch.float64)
    groups = [random_group(seed, ((20 + 7 * seed, (3, 4)), (50, (3,)))) for seed in range(4)]
    together = run_pack(hf_config, model, build_pack(groups, range(4), multiple_of=64), torch.float64)
    alone = torch.cat(
        [run_pack(hf_config, model, build_pack([group], [i]), torch.float64) for i, group in enumerate(groups)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)
