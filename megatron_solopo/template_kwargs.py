"""``--chat-template-kwargs``: values for variables of a chat template, such as Qwen3's ``enable_thinking``.

They belong to the tokenizer, as its chat template does: whatever renders a chat with it uses them. They live in
``tokenizer_config.json`` under `KEY`, where transformers keeps fields that it does not know, so a folder that a
training run exports says which values the model was trained with.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_solopo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAG = "--chat-template-kwargs"
KEY = "chat_template_kwargs"


def parse(text: str) -> dict[str, Any]:
    """``'{"enable_thinking": false}'`` -> the values.

    Raises:
        UserError: not JSON, or JSON but not an object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{FLAG} {text}: not valid JSON ({error.msg} at column {error.colno}); "
            """give an object such as '{"enable_thinking": false}'"""
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"""{FLAG} {text}: must be a JSON object such as '{{"enable_thinking": false}}'""")
    return values


def canonical(text: str) -> str:
    """One text for the same values."""
    return json.dumps(parse(text), ensure_ascii=False, sort_keys=True)


def of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The values a tokenizer renders its chats with."""
    return tokenizer.init_kwargs.get(KEY) or {}


def write(folder: Path, text: str) -> None:
    """Writes the values into a folder's tokenizer_config.json.

    Raises:
        OSError: as the system says it.
    """
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document[KEY] = parse(text)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def give(tokenizer: PreTrainedTokenizerBase, text: str | None, folder: str) -> None:
    """Gives a tokenizer the values of the option, or checks those that its folder came with.

    Raises:
        UserError: a name that the chat template has no variable for, or that is not the user's to set.
    """
    if text is not None:
        tokenizer.init_kwargs[KEY] = parse(text)
    values, where = of(tokenizer), FLAG if text is not None else f"{folder}: {KEY} of tokenizer_config.json"
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a JSON object, found {type(values).__name__}")
    if not values:
        return
    # transformers' own parser, since templates hold its {% generation %} tag.
    from transformers.utils.chat_template_utils import _get_template_variables

    ours = {"messages", *inspect.signature(type(tokenizer).apply_chat_template).parameters}
    known = sorted(_get_template_variables(tokenizer.get_chat_template()) - ours)
    for name in values:
        if name in ours:
            raise UserError(f"{where}: {name} is set by every command itself; leave it out")
        if name not in known:
            raise UserError(
                f"{where}: the chat template has no variable {name}; it has {', '.join(known) or 'none to set'}"
            )
