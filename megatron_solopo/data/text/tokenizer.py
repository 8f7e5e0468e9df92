"""Reads the tokenizers of Hugging Face folders in any form that transformers reads, and adds special tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, tokenization_utils_tokenizers
from transformers.convert_slow_tokenizer import LlamaConverter, SpmConverter, generate_merges

from megatron_solopo.data.text.control import RESPONSE_TOKENS, control_tokens
from megatron_solopo.errors import UserError, require
from megatron_solopo.json_text import check_json
from megatron_solopo.model_folder import check_is_folder, seen_in

PROBES = ("The quick brown fox, 1,234.56 € in 2026.", "  two spaces\n\n\ttab ", "Größe 東京 🙂 \u00a0½")
"""Texts on which a converted SentencePiece model is compared with the sentencepiece library, and a tokenizer of
transformers with its tokenizer.json."""

SPACE = "\u2581"
"""The character that SentencePiece puts in the place of a space."""

TRAINED_BPE = 2
"""model_type in a SentencePiece model."""


SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside a tokenizer that people edit by hand."""


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a folder.

    It is tokenizer.json unchanged, or else what transformers makes of a SentencePiece model or of tiktoken's ranks
    (``tokenizer.model``, ``tiktoken.model``), or of vocab.json and merges.txt.

    Raises:
        UserError: the folder is missing, it has no tokenizer, or the conversion would yield other tokens.
    """
    folder = Path(folder)
    check_is_folder(str(folder), folder, "set a Hugging Face folder with a tokenizer")
    check_json(*(folder / name for name in SETTINGS))
    model = find_model(folder)
    try:
        if model is None:
            # Not imported above: with AutoTokenizer comes torch._dynamo, which worker processes do not need.
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            if _is_cut_otherwise(tokenizer, folder / "tokenizer.json"):
                return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            return tokenizer
        return _from_ranks(folder, model) if _is_ranks(model) else _from_sentencepiece(folder, model)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds here; the first line names the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = reason.removesuffix(" from one of: ")
        raise UserError(
            "tokenizer-unreadable",
            f"{folder}: no tokenizer could be loaded ({reason}); "
            + (seen_in(folder) or "set a folder with tokenizer.json or tokenizer.model"),
        ) from None


def _is_cut_otherwise(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether transformers splits texts into words differently from tokenizer.json.

    transformers 5.17 replaces the file's pre-tokenizer by class: by LlamaTokenizer's SentencePiece words, which
    do not have the byte-level tokens of DeepSeek's distilled models, or by GPT2Tokenizer's, which does not split
    SmolLM2's digits. Files with SentencePiece's words are read by transformers: only spaces at the start and after
    special tokens differ there, as ``legacy`` of tokenizer_config.json states.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(tokenizer) is PreTrainedTokenizerFast or not (isinstance(backend, Tokenizer) and file.is_file()):
        return False
    document = json.loads(file.read_text(encoding="utf-8"))
    words = {key: document.get(key) for key in ("normalizer", "pre_tokenizer")}
    if SPACE in json.dumps(words, ensure_ascii=False):
        return False
    # An empty model: loading one takes most of the time, and it is not needed to split words.
    alone = Tokenizer.from_str(json.dumps(words | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    return any(_words(alone, text) != _words(backend, text) for text in PROBES)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def find_model(folder: Path) -> Path | None:
    """Returns the SentencePiece model or rank file of a folder without tokenizer.json, None if it has neither."""
    if (folder / "tokenizer.json").is_file():
        return None
    paths = (folder / name for name in ("tokenizer.model", "tiktoken.model"))
    return next((path for path in paths if path.is_file()), None)


def _from_sentencepiece(folder: Path, model: Path) -> PreTrainedTokenizerBase:
    """Converts a SentencePiece model with the normalizer that the model defines.

    transformers 5.17 omits SentencePiece's normalization (AutoTokenizer: no space at the start) or a part of it
    (LlamaTokenizer: none before a space); its converters of older versions implement it.

    Raises:
        UserError: the tokenizer has other tokens than the model.
    """
    require(str(model), "sentencepiece", "sentencepiece", ", or set a folder with a tokenizer.json")
    from sentencepiece import SentencePieceProcessor  # of the extra "sentencepiece"

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    settings = folder / "tokenizer_config.json"
    legacy = json.loads(settings.read_text(encoding="utf-8")).get("legacy") if settings.is_file() else None
    original = SimpleNamespace(vocab_file=str(model), add_prefix_space=True, legacy=legacy is not False)
    converter = LlamaConverter(original)
    proto: Any = converter.proto  # generated by protobuf, without types
    if proto.trainer_spec.model_type != TRAINED_BPE:
        converter = SpmConverter(original)
    else:
        scores = {piece.piece: piece.score for piece in proto.pieces}
        ids = {piece: number for number, piece in enumerate(scores)}
        # from_pretrained orders merges by id; SentencePiece by score, which differs for runs of spaces.
        tokenizer.backend_tokenizer.model = BPE(
            ids,
            generate_merges(ids, scores),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    prefix = original.add_prefix_space = proto.normalizer_spec.add_dummy_prefix
    backend = tokenizer.backend_tokenizer
    backend.normalizer = converter.normalizer(proto)
    backend.pre_tokenizer = converter.pre_tokenizer(SPACE, prefix)
    backend.decoder = converter.decoder(SPACE, prefix)
    theirs = SentencePieceProcessor(model_file=str(model))
    for text in PROBES if original.legacy else ():
        if theirs.encode(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                "tokenizer-conversion",
                f"{model}: as transformers reads it, {text!r} has other tokens than in SentencePiece; set a folder "
                "with a tokenizer.json",
            )
    return tokenizer


def _from_ranks(folder: Path, model: Path) -> PreTrainedTokenizerBase:
    """Reads a rank file, which does not define how texts are split into words; transformers splits as Llama 3 does.

    Raises:
        UserError: the folder is not a Llama model's.
    """
    require(str(model), "tiktoken", "tiktoken", ", or set a folder with a tokenizer.json")
    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind != "llama":
        raise UserError(
            "tokenizer-conversion",
            f"{model}: tiktoken's ranks do not define how texts are split into words; they are read as Llama 3's where "
            f"config.json has model_type llama, and it has {kind}; set a folder with a tokenizer.json",
        )
    logger = logging.getLogger(tokenization_utils_tokenizers.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # transformers tries SentencePiece first, and warns
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    finally:
        logger.setLevel(level)


def _is_ranks(path: Path) -> bool:
    """Whether a file holds tiktoken's ranks: lines of base64 and a number; a SentencePiece model is binary."""
    with path.open("rb") as file:
        token, _, rank = file.readline(1024).strip().partition(b" ")
    return bool(token) and rank.isdigit()


Tokens = Encoding | list[int]
"""The tokens of a text: ids, or the Rust tokenizer's encoding, which makes its ids on access."""


def parse_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool = False) -> Sequence[Tokens]:
    """Returns the tokens of each rendered chat. Control tokens in it count; no special tokens are added.

    The Rust tokenizer is called directly: transformers builds ids, masks and offsets as Python objects for every
    text, which takes longer than the tokenization. A batch runs on all cores (RAYON_NUM_THREADS sets how many).
    Tokenizers without a Rust backend are called through transformers.

    Args:
        offsets: whether encodings know the characters of their tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    # A tokenizer.json may carry both; transformers switches them off on each call.
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    return encode(list(texts), add_special_tokens=False)


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sequence[Tokens]:
    """Returns the tokens of each text, without special tokens; control tokens that it spells are text (`control`)."""
    control = control_tokens(tokenizer)
    spelled = [number for number, text in enumerate(texts) if control.spelled(text)]
    if not spelled:
        return parse_batch(tokenizer, texts)
    plain = control.reader(texts[number] for number in spelled).encode_batch([texts[number] for number in spelled])
    encoded = list(parse_batch(tokenizer, ["" if control.spelled(text) else text for text in texts]))
    for number, tokens in zip(spelled, plain, strict=True):
        encoded[number] = tokens
    return encoded


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a text; see `encode_batch`."""
    (tokens,) = encode_batch(tokenizer, [text])
    return tokens if isinstance(tokens, list) else tokens.ids


def parse_tokens(text: str) -> list[str]:
    """Splits the value of --add-special-tokens, such as ``<think>,</think>``, into its tokens.

    Raises:
        UserError: a token is empty or occurs twice.
    """
    tokens = [token.strip() for token in text.split(",")]
    if not all(tokens):
        raise UserError(
            "option-value",
            f"--add-special-tokens {text}: an empty token; write them as '<think>,</think>'",
        )
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise UserError("option-value", f"--add-special-tokens {text}: {twice} occurs twice; keep one of them")
    return tokens


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str, folder: str | Path) -> list[int]:
    """Adds the tokens of --add-special-tokens, which like other special tokens are never split and not decoded.

    Unlike others they are tokens in the assistant's texts too, also when the tokenizer is read from a saved folder
    (`control`).

    Returns:
        Their ids, which follow the tokenizer's largest.

    Raises:
        UserError: the tokenizer of ``folder`` has a token already, or as `parse_tokens`.
    """
    tokens, vocabulary = parse_tokens(text), tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for token in tokens:
        if token in vocabulary:
            kind = "a special" if token in special else "an ordinary"
            raise UserError(
                "token-exists",
                f"--add-special-tokens {token}: the tokenizer of {folder} has it already as {kind} token (id "
                f"{vocabulary[token]}); leave it out, or set another",
            )
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.init_kwargs[RESPONSE_TOKENS] = [*tokenizer.init_kwargs.get(RESPONSE_TOKENS, ()), *tokens]
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]
