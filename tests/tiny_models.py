"""Tiny Hugging Face folders and data sets for tests that start a trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<assistant> ' + m.content + ' <end> ' if m.role == 'assistant' else '<user> ' + m.content + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(WORDS) + len(SPECIAL),
    max_position_embeddings=256,
)
EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE: dict[str, Any] = dict(moe_intermediate_size=24, head_dim=16, norm_topk_prob=True)
RECURRENT: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=12,
    linear_value_head_dim=20,
)
SHARED_EXPERT: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
)

LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)

QWEN2_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WIDE = SHAPE | dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
"""Can be cut in four, by heads and by layers."""


def write_model(
    folder: Path,
    config: PretrainedConfig | None = None,
    seed: int = 1,
    noise: float = 0.1,
    template: str | None = TEMPLATE,
) -> Path:
    """A folder of config, random weights (norms and biases moved off their initial values) and word-level tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE, tie_word_embeddings=False))
    with torch.no_grad():
        buffers = (x for name, x in model.named_buffers() if name.endswith(("bias", "layer_scalar")))
        for parameter in (*model.parameters(), *buffers):
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", additional_special_tokens=SPECIAL[1:3]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(folder: Path, model_type: str = "llama", digits: bool = True, **settings: Any) -> Path:
    """A folder of config.json and a byte-level tokenizer of at most 300 tokens.

    Args:
        digits: cut numbers into digits, as SmolLM2's does; else cut as Qwen2's does.
        settings: tokenizer_config.json.
    """
    words = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits)
    split = pre_tokenizers.Digits(individual_digits=True) if digits else pre_tokenizers.Split(QWEN2_WORDS, "isolated")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(["The quick fox in 2026, 1234 56", "two  spaces\n\t½ hi 2026"] * 9, trainer)
    words.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    words.normalizer = None if digits else normalizers.NFC()
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def preference_groups(count: int, seed: int = 0, long_is_short: bool = False) -> list[dict[str, Any]]:
    """Preference groups of random words and very different lengths."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        short = _text(draw, draw.randint(4, 20))
        long = short if long_is_short else _text(draw, draw.randint(10, 60)) + " " + short
        chosen = _text(draw, draw.randint(1, 6))
        rejected = "w0 " + _text(draw, draw.randint(1, 9))
        records.append(
            {
                "id": f"g{number}",
                "short_messages": _chat(short),
                "long_messages": _chat(long),
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    return records


def in_paragraphs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Preference groups whose long contexts have a blank line after each fourth word."""
    for record in records:
        words = record["long_messages"][0]["content"].split()
        record["long_messages"] = _chat("\n\n".join(" ".join(words[at : at + 4]) for at in range(0, len(words), 4)))
    return records


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations whose answer is the prompt's first word again: easy to learn."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        word = draw.choice(WORDS[:8])
        prompt = " ".join([word] * draw.randint(2, 9))
        records.append(
            {"id": f"c{number}", "messages": [*_chat(prompt), {"role": "assistant", "content": f"{word} {word}"}]}
        )
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
