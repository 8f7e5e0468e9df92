"""Tiny models of words to sample from, a folder with one of them and questions, and the command line of sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from option_lines import last_wins
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *(f"w{index}" for index in range(36))]


END = 1


SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": 0,
}


EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}


FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True),
}


def tiny_model(family: str = "llama", config: PretrainedConfig | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config or FAMILIES[family]
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    # Hidden defaults of a real model's generation_config must not reach the samples.
    model.generation_config.repetition_penalty = 1.7
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny model, and a contexts file of 40 questions beside it."""
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", extra_special_tokens=["<user>", "<assistant>"]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(path)
    tiny_model().save_pretrained(path)
    with (path / "contexts.jsonl").open("w", encoding="utf-8") as out:
        for index in range(40):
            chat = [{"role": "user", "content": " ".join(f"w{(index * 7 + k) % 36}" for k in range(3 + index % 5))}]
            out.write(
                json.dumps(
                    {
                        "id": f"q{index}",
                        "question": "?",
                        "answers": ["w1"],
                        "short_messages": chat,
                        "long_messages": chat * 2,
                        "short_tokens": 5,
                        "long_tokens": 9,
                        "source": "test",
                    }
                )
                + "\n"
            )
    return path


def command(folder: Path, output: Path, *more: str) -> list[str]:
    options = [
        "--model",
        str(folder),
        "--contexts",
        str(folder / "contexts.jsonl"),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--samples",
        "6",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "12",
        *more,
    ]
    return last_wins(options)
