"""Tokenizer files of an exported folder: the same tokenizer in transformers 4, transformers 5 and their dependents.

Files that both versions read alike stay unchanged. Otherwise the folder names the class ``PreTrainedTokenizerFast``,
which every version reads from tokenizer.json alone, and tokenizer.json holds the tokenizer of the training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_solopo.data.text.control import RESPONSE_TOKENS
from megatron_solopo.data.text.tokenizer import PROBES, add_special_tokens, find_model, read_tokenizer
from megatron_solopo.errors import UserError

PORTABLE = "PreTrainedTokenizerFast"
"""The class that is read from tokenizer.json alone; transformers 5 names it TokenizersBackend and reads both names."""

ONLY_IN_5 = "Backend"
"""Suffix of classes that transformers 4 does not have: TokenizersBackend, SentencePieceBackend, PythonBackend."""

LLAMAS = ("llama", "mistral", "mixtral")
"""Values of model_type whose tokenizer is a LlamaTokenizer if no class is named."""

SETTINGS, VOCABULARY, NAMES = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"


def complete_tokenizer(folder: Path, source: Path, added_tokens: str | None) -> None:
    """Changes the files that were copied from ``source`` to ``folder``, as far as necessary.

    Args:
        source: the Hugging Face folder that the model started from.
        added_tokens: --add-special-tokens.

    Raises:
        OSError: a file cannot be written.
        UserError: see `add_special_tokens`.
    """
    settings = _read(folder / SETTINGS) or {}
    before = json.dumps(settings)
    try:
        tokenizer = read_tokenizer(source)
    except UserError:  # no tokenizer, or its package is missing: finished weights are written without it
        if added_tokens is not None:
            raise
        tokenizer = None
    _spell_as_4(settings, folder)
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        alike = _all_read_alike(source, tokenizer, settings)
        if added_tokens is not None:
            _add(settings, folder, tokenizer, add_special_tokens(tokenizer, added_tokens, source))
            alike = alike and (folder / VOCABULARY).is_file()
        backend = tokenizer.backend_tokenizer
        if not alike:
            _pin(settings, tokenizer)
            (folder / VOCABULARY).write_text(backend.to_str(pretty=True), encoding="utf-8")
        elif added_tokens is not None:
            document = _read(folder / VOCABULARY) | {"added_tokens": json.loads(backend.to_str())["added_tokens"]}
            _write(folder / VOCABULARY, document)
    elif added_tokens is not None:  # a tokenizer in Python
        add_special_tokens(tokenizer, added_tokens, source)
        tokenizer.save_pretrained(folder)
        return
    if json.dumps(settings) != before:
        _write(folder / SETTINGS, settings)


def write_chat_template(folder: Path, text: str) -> None:
    """Sets the folder's chat template in chat_template.jinja, which wins, and in tokenizer_config.json if it has one.

    Raises:
        OSError: a file cannot be written.
    """
    settings, file = _read(folder / SETTINGS) or {}, folder / "chat_template.jinja"
    stored = settings.get("chat_template")
    named = isinstance(stored, list) and not file.is_file()  # the file would hide templates of other names
    if not named:
        file.write_text(text, encoding="utf-8")
    if stored is not None:
        others = [entry for entry in stored if entry.get("name") != "default"] if isinstance(stored, list) else []
        settings["chat_template"] = [{"name": "default", "template": text}, *others] if others or named else text
        _write(folder / SETTINGS, settings)


def _spell_as_4(settings: dict[str, Any], folder: Path) -> None:
    """Replaces values that only transformers 5 reads by values that both versions read."""
    if str(settings.get("tokenizer_class", "")).endswith(ONLY_IN_5) and (folder / VOCABULARY).is_file():
        settings["tokenizer_class"] = PORTABLE
    if isinstance(settings.get("extra_special_tokens"), list):  # a dictionary in transformers 4
        _extend(settings, settings.pop("extra_special_tokens"))


def _extend(settings: dict[str, Any], tokens: list[str | dict[str, Any]]) -> None:
    """Adds special tokens to tokenizer_config.json or special_tokens_map.json."""
    if settings.get("extra_special_tokens") == {}:
        del settings["extra_special_tokens"]  # transformers 5 would read it instead
    present = settings.get("additional_special_tokens") or []
    names = {_name(token) for token in present}
    settings["additional_special_tokens"] = [*present, *(token for token in tokens if _name(token) not in names)]


def _name(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _all_read_alike(source: Path, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> bool:
    """Whether transformers 4 and 5 produce the ids of training from the files of a folder."""
    file = source / VOCABULARY
    if not file.is_file():
        return find_model(source) is None  # vocab.json and merges.txt have one meaning
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())][:3]
    texts = (*PROBES, "", *(f"{token}{space}hi {token}" for token in special for space in ("", " ")))
    ours = [tokenizer(text)["input_ids"] for text in texts]
    if _as_4(source, settings, texts) != ours:
        return False
    if settings.get("tokenizer_class") in (None, PORTABLE) or type(tokenizer) is not PreTrainedTokenizerFast:
        return True
    # Either transformers 5 uses this class for the named one, or `read_tokenizer` had to.
    theirs = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    return [theirs(text)["input_ids"] for text in texts] == ours


def _as_4(source: Path, settings: dict[str, Any], texts: tuple[str, ...]) -> list[list[int]] | None:
    """Returns the ids of transformers 4.57's AutoTokenizer with special tokens, None if it cannot load the folder:
    those of tokenizer.json, with the changes that its classes make in __init__."""
    file = Tokenizer.from_file(str(source / VOCABULARY))
    file.no_truncation()
    file.no_padding()
    if isinstance(file.pre_tokenizer, pre_tokenizers.ByteLevel):
        words = file.pre_tokenizer
        words.add_prefix_space = bool(settings.get("add_prefix_space"))
        file.pre_tokenizer = words
    config = _read(source / "config.json") or {}
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if "LlamaTokenizer" not in kind if kind else config.get("model_type") not in LLAMAS:
        return [file.encode(text).ids for text in texts]
    if settings.get("add_prefix_space") is not None and not (source / "tokenizer.model").is_file():
        return None  # it converts the SentencePiece model again
    first, last = (
        [file.token_to_id(_name(settings.get(token, default)))] if settings.get(f"add_{token}", added) else []
        for token, default, added in (("bos_token", "<s>", True), ("eos_token", "</s>", False))
    )  # instead of the post-processor of tokenizer.json
    return [[*first, *file.encode(text, add_special_tokens=False).ids, *last] for text in texts]


def _pin(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes transformers read tokenizer.json alone, by tokenizer_config.json."""
    settings["tokenizer_class"] = PORTABLE
    for role, token in tokenizer.special_tokens_map.items():
        settings.setdefault(role, token)  # the named class has defaults, this one has none
    settings.pop("add_prefix_space", None)
    words = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(words, pre_tokenizers.ByteLevel):
        settings["add_prefix_space"] = words.add_prefix_space


def _add(settings: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Adds new tokens as special tokens to every file that lists them."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    _extend(settings, tokens)
    settings[RESPONSE_TOKENS] = tokenizer.init_kwargs[RESPONSE_TOKENS]
    if "added_tokens_decoder" in settings:
        entries = {str(number): tokenizer.added_tokens_decoder[number].__getstate__() for number in ids}
        settings["added_tokens_decoder"] |= entries
    names = _read(folder / NAMES)
    if names is not None:
        _extend(names, tokens)
        _write(folder / NAMES, names)
    slow = _read(folder / "added_tokens.json")
    if slow is not None:
        _write(folder / "added_tokens.json", slow | dict(zip(tokens, ids, strict=True)))


def _read(path: Path) -> dict[str, Any] | None:
    """Returns a JSON object; None if there is none."""
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
