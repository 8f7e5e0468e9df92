"""Fields of records that were read from files, checked: an error names ``file:line`` and the field."""

from __future__ import annotations

from typing import Any

from megatron_solopo.errors import UserError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": text}``."""

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""``from`` of ``{from, value}`` messages -> role."""

TOOL_CALLS = ("tool_calls", "function_call")

_OURS = (
    ({"short_messages", "chosen", "rejected"}, "preference groups, as build-pairs writes them"),
    ({"short_messages", "long_messages", "short_tokens"}, "contexts, as prepare-data writes them"),
    ({"id", "responses"}, "responses, as sample-responses writes them"),
    ({"settings"}, "an unfinished file of sample-responses; repeat that command to complete it"),
)
_OTHERS = (
    ({"completion", "label"}, "single answers with a label, as KTO's; pair a true with a false one of the same prompt"),
    ({"prompt", "chosen", "rejected"}, "pairs for --objective preference"),
    ({"conversation_a", "conversation_b"}, "votes between conversations; name the better chosen, the other rejected"),
    ({"response_a", "response_b"}, "votes between responses; name the better one chosen, the other rejected"),
    ({"response_0", "response_1"}, "votes between responses; name the better one chosen, the other rejected"),
    ({"completions"}, "several rated answers a prompt; make pairs of them: prompt, chosen, rejected"),
    ({"messages"}, "conversations for --objective sft"),
    ({"conversations"}, "conversations for --objective sft (ShareGPT)"),
    ({"prompt", "completion"}, "prompts with one answer each, for --objective sft"),
    ({"instruction", "output"}, "instructions with one answer each, for --objective sft (Alpaca)"),
    ({"text"}, "plain texts, which say of no part who wrote it; give conversations"),
)
"""Fields that tell what a record is, for a file that was given in another one's place; questions stand between."""


def kind_of(record: dict[str, Any]) -> str | None:
    """What a record is by its fields, in words; None where they do not say."""
    from megatron_solopo.data.building.sources import kinds_of  # sources read their fields with this module

    fields = {name for name, value in record.items() if value is not None}
    names = kinds_of(fields)
    questions = [(set[str](), f"questions of --source {' or '.join(names)}")] if names else []
    return next((words for needed, words in (*_OURS, *questions, *_OTHERS) if needed <= fields), None)


def require(
    record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str, otherwise: str | None = None
) -> Any:
    """``record[key]``, checked to be there and of the kind.

    Args:
        otherwise: what to do where the field is missing and the others do not say what the record is.

    Raises:
        UserError: naming ``where`` and the key.
    """
    if key not in record:
        raise UserError(missing(record, key, where, otherwise))
    value = record[key]
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise UserError(f"{where}: the field '{key}' must be {wanted}, found {type(value).__name__}")
    return value


def missing(record: dict[str, Any], key: str, where: str, otherwise: str | None = None) -> str:
    """The line that says that a field is missing; see `require`."""
    known = ", ".join(sorted(record)) or "none"
    kind = kind_of(record)
    hint = f"these are {kind}" if kind else otherwise
    return f"{where}: the field '{key}' is missing (fields found: {known})" + (f"; {hint}" if hint else "")


def check_messages(value: Any, key: str, where: str) -> list[Message]:
    """A chat as ``{role, content}`` messages with text contents.

    ShareGPT's ``{from, value}`` and contents that are lists of ``{"type": "text", "text": ...}`` are read too; the
    texts of a list are joined without anything between them, as chat templates write them. Other fields of a message
    stay, for the chat template; nulls, which tables put where a field is absent, do not.

    Raises:
        UserError: it is no such list, or holds what is not text: images, tool calls.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the field '{key}' must be a non-empty list of {{role, content}} messages")
    return [_message(message, f"{where}: {key}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where} must be an object with a text 'content'")
    message = {name: field for name, field in message.items() if field is not None}
    if "from" in message and "role" not in message:
        author = message.pop("from")
        if author not in SHAREGPT:
            raise UserError(f"{where} is from {author!r}; of ShareGPT's, {', '.join(SHAREGPT)} are read")
        message = {"role": SHAREGPT[author], "content": message.pop("value", None)} | message
    for name in TOOL_CALLS:
        if message.get(name):
            raise UserError(f"{where} has '{name}', which are not read; write the call into 'content', or leave it out")
        message.pop(name, None)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where} must be an object with a text 'content'")
    if message.get("role") not in ROLES:
        raise UserError(f"{where} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
    return message | {"content": content}


def _joined(parts: list[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}, content[{index}] is a part of type {kind!r}; only parts of type 'text' with a 'text' are "
                "read"
            )
        texts.append(part["text"])
    return "".join(texts)
