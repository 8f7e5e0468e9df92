"""Tiny models that answer, questions over documents, and the answers of transformers alone."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{index}" for index in range(48)]


SPECIAL = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content }}<end>"
    "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder, seed=0, positions=256, stored=None):
    """A random Llama with a word-level tokenizer as a Hugging Face folder; large weights make responses vary."""
    torch.manual_seed(seed)
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, "?", ".", *WORDS])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<pad>"],
    )
    model = LlamaForCausalLM(config)
    if stored:
        model.generation_config = GenerationConfig(**stored)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_questions(path, count=6, documents=12):
    """MuSiQue-format questions: the one supporting document has the answer; each document has four words."""
    rng = random.Random(0)
    with open(path, "w") as out:
        for number in range(count):
            answer = f"w{40 + number % 8}"
            gold = rng.randrange(documents)
            paragraphs = []
            for index in range(documents):
                last = answer if index == gold else f"w{20 + index % 20}"
                text = f"w{index} w{rng.randrange(40)} {last} ."
                paragraphs.append(
                    {"idx": index, "title": f"w{index}", "is_supporting": index == gold, "paragraph_text": text}
                )
            record = {"id": f"q{number}", "question": f"w{gold} ?", "answer": answer, "answer_aliases": []}
            out.write(json.dumps({**record, "paragraphs": paragraphs}) + "\n")
    return path


PROMPT = ["--document-template", "{text}", "--document-separator", " ", "--prompt-template", "{documents} {question}"]


def random_prompts(count, longest=40):
    rng = random.Random(1)
    return [
        [rng.randrange(len(SPECIAL), len(SPECIAL) + 2 + len(WORDS)) for _ in range(rng.randint(1, longest))]
        for _ in range(count)
    ]


def one_by_one(folder, prompts, max_new_tokens):
    """Greedy responses by transformers alone, one prompt at a time, without padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts, lengths = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )[0, len(prompt) :]
        lengths.append(len(out))
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    return texts, lengths
