"""Tokenizers of Hugging Face folders, read by transformers whatever their form, and special tokens added to them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_solopo.errors import UserError

NEEDED = {"sentencepiece": "SentencePiece models", "tiktoken": "tiktoken's rank files"}
"""Packages that transformers converts a ``tokenizer.model`` with; both forms have that name."""


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder: ``tokenizer.json``, or what transformers converts to one: a SentencePiece model or
    tiktoken's ranks (``tokenizer.model``, ``tiktoken.model``), vocab.json and merges.txt.

    Raises:
        UserError: no such folder, no tokenizer in it, or a package is missing that its form needs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder with a tokenizer")
    models = [] if (folder / "tokenizer.json").is_file() else sorted(folder.glob("*.model*"))
    if models:
        absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if _is_ranks(models[0]) and "tiktoken" in absent or not _is_ranks(models[0]) and "sentencepiece" in absent:
            name = "tiktoken" if _is_ranks(models[0]) else "sentencepiece"
            raise UserError(
                f"{models[0]}: transformers reads {NEEDED[name]} with the package {name}, which is not installed; "
                f"pip install {name}, or give a folder with a tokenizer.json"
            )
    told = logging.getLogger(transformers.tokenization_utils_tokenizers.__name__)
    before = told.level
    if models and _is_ranks(models[0]):
        told.setLevel(logging.ERROR)  # transformers tries SentencePiece first, and warns of a file that is none
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; the first line says which file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no tokenizer could be loaded ({reason})") from None
    finally:
        told.setLevel(before)


def _is_ranks(path: Path) -> bool:
    """Whether a file holds tiktoken's ranks: lines of base64 and a number; a SentencePiece model is binary."""
    with path.open("rb") as file:
        token, _, rank = file.readline(1024).strip().partition(b" ")
    return bool(token) and rank.isdigit()


def parse_tokens(text: str) -> list[str]:
    """``<think>,</think>`` -> its tokens.

    Raises:
        UserError: naming --add-special-tokens.
    """
    tokens = [token.strip() for token in text.split(",")]
    if not all(tokens):
        raise UserError(f"--add-special-tokens {text}: an empty token; give them as '<think>,</think>'")
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise UserError(f"--add-special-tokens {text}: {twice} stands twice")
    return tokens


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str, folder: str | Path) -> list[int]:
    """Adds the tokens of --add-special-tokens, never split and left out of decoded text like other special ones.

    Returns:
        Their ids, which follow the tokenizer's largest.

    Raises:
        UserError: a token that the tokenizer of ``folder`` has already.
    """
    tokens, vocabulary = parse_tokens(text), tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for token in tokens:
        if token in vocabulary:
            kind = "a special" if token in special else "an ordinary"
            raise UserError(
                f"--add-special-tokens {token}: the tokenizer of {folder} has it already as {kind} token (id "
                f"{vocabulary[token]}); leave it out, or give another"
            )
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(tokens)
