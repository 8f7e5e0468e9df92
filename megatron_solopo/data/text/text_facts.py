"""Facts on which the token ids of a data set depend: the tokenizer, its chat template and their options."""

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
"""Fields of tokenizer_config.json that change no id, or that are compared as the tokenizer uses them."""

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)


AS_READ = "what is read of them"
"""Key, beside the names of files, of the tokenizer that was read from them. Different files can define the same
tokenizer, such as a SentencePiece model and the tokenizer.json that an export makes of it."""

TEXT_FACTS = ("tokenizer", "added_tokens", "chat_template", "chat_template_kwargs", "end_of_turn")
"""The keys of `text_facts`; a template that prints the date adds `template_kwargs.DATE`."""


Facts = dict[str, Any]
"""A result of `text_facts`, of this process or from a file of this package; its keys are `TEXT_FACTS`."""


def text_facts(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Returns digests of the tokenizer, its files and its chat template, and the options that change ids.

    Args:
        folder: of the tokenizer.
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


def text_differences(recorded: Facts, current: Facts) -> list[str]:
    """Describes the differences of two results of `text_facts`, for an error message."""
    differences = []
    recorded_files, files = recorded["tokenizer"], current["tokenizer"]
    as_read = files.get(AS_READ)
    same = as_read is not None and recorded_files.get(AS_READ) == as_read
    for name in () if same else sorted((recorded_files.keys() | files.keys()) - {AS_READ}):
        if recorded_files.get(name) != files.get(name):
            lacks = "" if name in recorded_files and name in files else " (only one of them has it)"
            differences.append(f"another tokenizer ({name} differs{lacks})")
            break
    if not differences and recorded["added_tokens"] != current["added_tokens"]:
        other = sorted(token for token, _ in recorded["added_tokens"].items() ^ current["added_tokens"].items())
        differences.append(f"other --add-special-tokens ({', '.join(dict.fromkeys(other))})")
    if recorded["chat_template"] != current["chat_template"]:
        differences.append("another chat template")
    for key, what in (
        ("chat_template_kwargs", "--chat-template-kwargs"),
        (template_kwargs.DATE, template_kwargs.DATE_FLAG),
        ("end_of_turn", "end of turn"),
    ):
        if recorded.get(key) != current.get(key):
            differences.append(f"{what} {recorded.get(key)!r} where the run has {current.get(key)!r}")
    return differences
