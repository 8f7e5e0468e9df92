"""What the token ids of a data set depend on beside its texts: the tokenizer, its chat template and how it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.data.text.control import RESPONSE_TOKENS
from megatron_solopo.data.text.tokenizer import find_model

_NOT_THE_TOKENIZER = (
    *("chat_template", template_kwargs.KEY, template_kwargs.DATE),
    *("is_local", "local_files_only", "model_max_length", "name_or_path"),
)
"""Fields of tokenizer_config.json that change no id; the template and its values are compared as they are used."""

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)


AS_READ = "what is read of them"
"""Beside the names of files: the tokenizer that was made of them. Other files may hold the same, as a SentencePiece
model and the tokenizer.json that an exported folder has of it."""

TEXT_FACTS = ("tokenizer", "added_tokens", "chat_template", "chat_template_kwargs", "end_of_turn")
"""The keys of `text_facts`; a template that prints the date adds `template_kwargs.DATE`."""


Facts = dict[str, Any]
"""What `text_facts` makes, now or in a file that this package wrote; its keys are `TEXT_FACTS`."""


def text_facts(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """What turns a chat into ids: digests of the tokenizer, its files and its chat template, and how it is used.

    Args:
        folder: the tokenizer's.
    """
    files, model = {}, find_model(Path(folder))
    names = (*_FILES, *tokenizer.vocab_files_names.values(), *([model.name] if model else []))
    for name in dict.fromkeys(names):
        path = Path(folder) / name
        if path.is_file():
            data = path.read_bytes()
            if name == "tokenizer_config.json":
                fields = json.loads(data)
                data = _canonical({key: fields[key] for key in fields if key not in _NOT_THE_TOKENIZER})
            files[name] = hashlib.sha256(data).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        backend.no_truncation()  # as on each call
        backend.no_padding()
        # Templates write special tokens by their role.
        read = backend.to_str().encode() + _canonical(tokenizer.special_tokens_map)
        if words := tokenizer.init_kwargs.get(RESPONSE_TOKENS):
            read += _canonical(words)
        files[AS_READ] = hashlib.sha256(read).hexdigest()
    chosen, date = tokenizer.chat_template, template_kwargs.date_of(tokenizer)
    return {
        "tokenizer": files,
        "added_tokens": dict(sorted((str(token), number) for number, token in tokenizer.added_tokens_decoder.items())),
        "chat_template": hashlib.sha256(chosen.encode() if isinstance(chosen, str) else _canonical(chosen)).hexdigest(),
        "chat_template_kwargs": template_kwargs.of(tokenizer),
        "end_of_turn": tokenizer.eos_token,
        **({} if date is None else {template_kwargs.DATE: date}),
    }


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def text_differences(made: Facts, now: Facts) -> list[str]:
    """In words, how two results of `text_facts` differ."""
    told = []
    made_files, files = made["tokenizer"], now["tokenizer"]
    as_read = files.get(AS_READ)
    same = as_read is not None and made_files.get(AS_READ) == as_read
    for name in () if same else sorted((made_files.keys() | files.keys()) - {AS_READ}):
        if made_files.get(name) != files.get(name):
            lacks = "" if name in made_files and name in files else " (only one of them has it)"
            told.append(f"another tokenizer ({name} differs{lacks})")
            break
    if not told and made["added_tokens"] != now["added_tokens"]:
        other = sorted(token for token, _ in made["added_tokens"].items() ^ now["added_tokens"].items())
        told.append(f"other --add-special-tokens ({', '.join(dict.fromkeys(other))})")
    if made["chat_template"] != now["chat_template"]:
        told.append("another chat template")
    for key, what in (
        ("chat_template_kwargs", "--chat-template-kwargs"),
        (template_kwargs.DATE, template_kwargs.DATE_FLAG),
        ("end_of_turn", "end of turn"),
    ):
        if made.get(key) != now.get(key):
            told.append(f"{what} {made.get(key)!r} where the run has {now.get(key)!r}")
    return told
