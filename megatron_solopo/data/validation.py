"""The one layer that checks records of files: pydantic makes dataclasses of them.

An error is one line that names ``file:line``, the field, what it must be, and what the record looks like where another
kind of file was passed. The types here are stricter than pydantic's: numbers and flags are never read from texts, chats
have the forms that `check_messages` reads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from megatron_solopo import template_kwargs
from megatron_solopo.errors import UserError

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": text}``; an assistant's may have ``tool_calls``."""

Answer = str | list[Message]
"""A response: a text, or its turns, the first and last of which are the assistant's."""

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""``from`` of ``{from, value}`` messages -> role."""

TOOL_CALLS, FUNCTION_CALL = "tool_calls", "function_call"

TOOLS = "tools"
"""Field of a record beside its messages, and of the first message that is read from it: the tools that the model may
call, as OpenAI's API and transformers' chat templates take them."""

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
    ({"text"}, "plain texts, whose parts have no role; pass conversations"),
)
"""Fields that identify a record, for a file passed in another one's place; questions are tried between the two."""


def kind_of(record: Mapping[str, object]) -> str | None:
    """Returns the kind of a record, known by its fields, in words; None where they do not identify it."""
    # Not at the top: the sources check their records with this module, and only an error asks for their fields.
    from megatron_solopo.data.building.sources import kinds_of

    fields = {name for name, value in record.items() if value is not None}
    names = kinds_of(fields)
    questions = [(set[str](), f"questions of --source {' or '.join(names)}")] if names else []
    return next((words for needed, words in (*_OURS, *questions, *_OTHERS) if needed <= fields), None)


def missing(record: Mapping[str, object], key: str, where: str, otherwise: str | None = None) -> str:
    """Returns the message that a field is missing.

    Args:
        otherwise: what to do where the other fields do not identify the kind of record.
    """
    fields = ", ".join(sorted(record)) or "none"
    kind = kind_of(record)
    hint = f"these are {kind}" if kind else otherwise
    return f"{where}: the field '{key}' is missing (fields found: {fields})" + (f"; {hint}" if hint else "")


def wrong_kind(value: object, key: str, where: str, kind: str) -> str:
    """Returns the message that a field is of another kind than it must be."""
    return f"{where}: the field '{key}' must be {kind}, found {type(value).__name__}"


def validated[T](kind: TypeAdapter[T], record: Mapping[str, object], where: str, **otherwise: object) -> T:
    """Returns the record as its type; a null is an absent field, a field that the type does not know is left out.

    Args:
        otherwise: values of absent fields.

    Raises:
        UserError: naming ``where`` and the first field that is missing or of the wrong kind.
    """
    present = {name: value for name, value in record.items() if value is not None}
    try:
        return kind.validate_python(otherwise | present, context=where)
    except ValidationError as errors:
        raise _refusal(errors.errors(include_url=False)[0], present, where) from None


def check_unique(name: str, where: str, seen: dict[str, str]) -> None:
    """Refuses an id that a record before had; ``seen`` holds where each was, and gets this one."""
    if name in seen:
        raise UserError("id-twice", f"{where}: the id {name!r} was used before at {seen[name]}; ids must be unique")
    seen[name] = where


_KINDS = {
    **{"string": "str", "int": "int", "float": "a number", "bool": "bool", "list": "list", "tuple": "list"},
    **{"dict": "dict", "dataclass": "an object", "too_long": "shorter"},
}
"""pydantic's names of types -> ours."""

_VALUE, _TYPE, _EMPTY = "wrong_value", "wrong_type", "empty"
"""The types of the errors that validators raise here."""


def _refusal(error: ErrorDetails, record: Mapping[str, object], where: str) -> UserError:
    """Returns the error that names the place and the field of pydantic's."""
    *outer, last = error["loc"]
    if outer and isinstance(last, str):  # a field of an object inside the record
        where, outer, record = f"{where}, {_path(outer)}", [], error["input"]
    field = _path([*outer, last])
    if error["type"] == "missing":
        line = f"{where}: the field '{field}' is missing" if outer else missing(record, field, where)
        return UserError("field-missing", line)
    if kind := _KINDS.get(error["type"].removesuffix("_type")):
        return UserError("field-type", wrong_kind(error["input"], field, where, kind))
    code = "field-empty" if error["type"] == _EMPTY else "field-type" if error["type"] == _TYPE else "field-value"
    colon = "" if error["type"] in (_VALUE, _EMPTY, _TYPE) else ":"
    return UserError(code, f"{where}: the field '{field}'{colon} {error['msg']}")


def _path(parts: Sequence[int | str]) -> str:
    return str(parts[0]) + "".join(f"[{part!r}]" for part in parts[1:])


def wrong(text: str) -> PydanticCustomError:
    """Returns what a validator raises; the message has it behind the name of the field: ``must be above 0``."""
    return PydanticCustomError(_VALUE, "{text}", {"text": text})


def wrong_type(text: str) -> PydanticCustomError:
    """As `wrong`, where the value is of another type."""
    return PydanticCustomError(_TYPE, "{text}", {"text": text})


def empty(text: str) -> PydanticCustomError:
    """As `wrong`, where the value is empty."""
    return PydanticCustomError(_EMPTY, "{text}", {"text": text})


def check_messages(value: object, key: str, where: str) -> list[Message]:
    """Returns a chat as ``{role, content}`` messages with text contents.

    ShareGPT's ``{from, value}`` and contents that are lists of ``{"type": "text", "text": ...}`` are read too; the
    texts of a list are joined without anything between them, as chat templates write them. An assistant's message with
    ``tool_calls`` may have no content. Other fields of a message stay, for the chat template; nulls, which tables put
    where a field is absent, do not.

    Raises:
        UserError: it is no such list, or holds what is not text, such as images.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            "field-type", f"{where}: the field '{key}' must be a non-empty list of {{role, content}} messages"
        )
    return [_message(message, f"{where}: {key}[{index}]") for index, message in enumerate(value)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError("field-type", f"{where} must be an object with a text 'content'")
    message = {name: field for name, field in message.items() if field is not None}
    if "from" in message and "role" not in message:
        author = message.pop("from")
        if author not in SHAREGPT:
            raise UserError(
                "message-role", f"{where} is from {author!r}; of ShareGPT's, {', '.join(SHAREGPT)} are read"
            )
        message = {"role": SHAREGPT[author], "content": message.pop("value", None)} | message
    if message.pop(FUNCTION_CALL, None):
        raise UserError(
            "message-unsupported", f"{where} has '{FUNCTION_CALL}', which is not read; write it as '{TOOL_CALLS}'"
        )
    calls = message.pop(TOOL_CALLS, None)
    if calls:
        message[TOOL_CALLS] = _tool_calls(calls, message.get("role"), where)
    content = message.get("content", "" if calls else None)
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise UserError("field-type", f"{where} must be an object with a text 'content'")
    if message.get("role") not in ROLES:
        raise UserError("message-role", f"{where} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
    return message | {"content": content}


def _tool_calls(calls: object, role: object, where: str) -> list[dict[str, Any]]:
    """Returns the calls without nulls; arguments that are the JSON text of an object (OpenAI's form) become the object,
    which chat templates write.

    Raises:
        UserError: they are not calls of functions, or not an assistant's.
    """
    if role != "assistant":
        raise UserError(
            "message-role", f"{where} has '{TOOL_CALLS}' and the role {role!r}; only an assistant calls tools"
        )
    read = []
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        call = _without_nulls(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                "field-type",
                f"{where}, {TOOL_CALLS}[{index}] must be an object with a 'function' of a 'name' and 'arguments'",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
            if isinstance(arguments, dict):
                function["arguments"] = arguments
        read.append(call)
    return read


def check_tools(value: object, where: str) -> list[dict[str, Any]]:
    """Returns definitions of tools without nulls; a list, or the JSON text of one, which tables hold.

    Raises:
        UserError: they are not functions with a name.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value) if value.strip() else []
    tools = _without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _named(tool) for tool in tools):
        raise UserError(
            "field-type",
            f"{where}: the field '{TOOLS}' must be a list of objects with a 'function' of a 'name' and 'parameters'",
        )
    return tools


def _named(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function", tool)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def tool_names(message: Message) -> list[str]:
    """Returns the names of the tools that come with a message."""
    tools = message.get(TOOLS)
    return [tool.get("function", tool)["name"] for tool in tools if _named(tool)] if isinstance(tools, list) else []


def _without_nulls(value: Any) -> Any:
    """Returns a copy without fields that are null: a table's column has the fields of all its rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def texts_of(message: Message) -> list[str]:
    """Returns every text of a message that a chat template may write, but its role."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for name, one in value.items():
                yield name
                yield from strings(one)
        elif isinstance(value, list):
            for one in value:
                yield from strings(one)

    return [message["content"], *strings(message.get(TOOL_CALLS, [])), *strings(message.get(TOOLS, []))]


def _joined(parts: Iterable[object], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                "message-unsupported",
                f"{where}, content[{index}] is a part of type {kind!r}; only parts of type 'text' with a 'text' are "
                "read",
            )
        texts.append(part["text"])
    return "".join(texts)


def _messages(value: object, info: ValidationInfo) -> list[Message]:
    return check_messages(value, str(info.field_name), str(info.context))


def _name(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong_type(f"must be str or int, found {type(value).__name__}")
    return str(value)


def _day(value: object, info: ValidationInfo) -> str:
    return template_kwargs.check_date(value, f"{info.context}: the field '{info.field_name}'")


def _text(value: str) -> str:
    if not value.strip():
        raise empty("is empty; fill it in or remove the record")
    return value


def _answer(value: object, name: str, info: ValidationInfo) -> Answer:
    """Returns a text, or turns; a message of the assistant alone is its text."""
    if isinstance(value, str):
        if not value.strip():
            raise empty("is empty; a response needs at least one word")
        return value
    if not isinstance(value, list):
        raise wrong_type(f"must be str or list, found {type(value).__name__}")
    turns = check_messages(value, name, str(info.context))
    if any(turns[end]["role"] != "assistant" for end in (0, -1)):
        raise wrong("must start and end with a message of the assistant")
    return turns[0]["content"] if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


def _responses(value: object, info: ValidationInfo) -> Answer | list[Answer]:
    name = str(info.field_name)
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return [_answer(one, f"{name}[{index}]", info) for index, one in enumerate(value)]
    return _answer(value, name, info)


def _sampled(value: object, tokens: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, list) and any(one is None or isinstance(one, list) for one in value):
        return [None if one is None else tokens(one) for one in value]
    return tokens(value)


def _words(value: list[str]) -> list[str]:
    if not value or not all(text.strip() for text in value):
        raise empty("must be a non-empty list of texts, none of them empty")
    return value


def _tokens(value: list[int]) -> list[int]:
    if not value or min(value) < 0:
        raise wrong("must be a non-empty list of token ids")
    return value


Name = Annotated[str, BeforeValidator(_name)]
"""An id: a text, or a number, which becomes one."""
Printed = Annotated[str, BeforeValidator(str)]
"""Converts any value to a text."""
Text = Annotated[str, AfterValidator(_text)]
"""A text with a visible character."""
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Chat = Annotated[list[Message], PlainValidator(_messages)]
"""Messages; other fields of theirs than role and content may be no texts."""
Responses = Annotated[Any, PlainValidator(_responses)]
"""A response (`Answer`), or a list of responses."""
Words = Annotated[list[str], AfterValidator(_words)]
TokenIds = Annotated[list[Whole], AfterValidator(_tokens)]
SampledIds = Annotated[TokenIds, WrapValidator(_sampled)]
"""The token ids of a response, or of each of several, null where they are not known."""
Day = Annotated[str, BeforeValidator(_day)]
DocumentSpan = tuple[Whole, Whole, Flag]
"""(start, end, gold): a document is ``content[start:end]`` of a chat's last message; gold: it is evidence."""
