"""Records of files made into dataclasses by pydantic; an error is one line with ``file:line`` and the field.

The types here are what pydantic's own are not: numbers and flags are never made of texts, chats come in the forms that
`check_messages` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict, TypeAdapter, ValidationError, ValidationInfo

from megatron_solopo import template_kwargs
from megatron_solopo.data.fields import Message, check_messages, missing
from megatron_solopo.errors import UserError


def _messages(value: Any, info: ValidationInfo) -> list[Message]:
    return check_messages(value, info.field_name, info.context)


def _name(value: Any, info: ValidationInfo) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"{info.context}: the field '{info.field_name}' must be str or int, found {type(value).__name__}"
        )
    return str(value)


def _day(value: Any, info: ValidationInfo) -> str:
    return template_kwargs.check_date(value, f"{info.context}: the field '{info.field_name}'")


def _response(value: str, info: ValidationInfo) -> str:
    if not value.strip():
        raise UserError(f"{info.context}: '{info.field_name}' is empty; a response needs at least one word")
    return value


def _words(value: list[str], info: ValidationInfo) -> list[str]:
    if not value or not all(text.strip() for text in value):
        raise UserError(
            f"{info.context}: the field '{info.field_name}' must be a non-empty list of texts, none of them empty"
        )
    return value


def _tokens(value: list[int], info: ValidationInfo) -> list[int]:
    if not value or min(value) < 0:
        raise UserError(f"{info.context}: the field '{info.field_name}' must be a non-empty list of token ids")
    return value


Name = Annotated[str, BeforeValidator(_name)]
"""An id: a text, or a number that stands for one."""
Printed = Annotated[str, BeforeValidator(str)]
"""A text made of whatever is there."""
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Chat = Annotated[list[Any], BeforeValidator(_messages)]
"""Messages (`fields.Message`); other fields than role and content may be no texts."""
Response = Annotated[str, AfterValidator(_response)]
Words = Annotated[list[str], AfterValidator(_words)]
TokenIds = Annotated[list[Whole], AfterValidator(_tokens)]
Day = Annotated[str, BeforeValidator(_day)]
DocumentSpan = tuple[Whole, Whole, Flag]
"""(start, end, gold): a document is ``content[start:end]`` of a chat's last message; gold: it is evidence."""


def validated[T](kind: TypeAdapter[T], record: dict[str, Any], where: str, **otherwise: Any) -> T:
    """The record as its type; a null is an absent field, a field that the type does not know is left out.

    Args:
        otherwise: values of absent fields.

    Raises:
        UserError: naming ``where`` and the first field that is missing or of the wrong kind.
    """
    present = {name: value for name, value in record.items() if value is not None}
    try:
        return kind.validate_python(otherwise | present, context=where)
    except ValidationError as errors:
        raise UserError(_line(errors.errors(include_url=False)[0], present, where)) from None


_KINDS = {"string": "str", "int": "int", "bool": "bool", "list": "list", "tuple": "list", "dict": "dict"}
"""pydantic's names of types -> ours."""


def _line(error: Mapping[str, Any], record: dict[str, Any], where: str) -> str:
    first, *inner = error["loc"]
    field = str(first) + "".join(f"[{part!r}]" for part in inner)
    if error["type"] == "missing":
        return f"{where}: the field '{field}' is missing" if inner else missing(record, field, where)
    wanted = _KINDS.get(error["type"].removesuffix("_type"))
    if wanted is None:
        return f"{where}: the field '{field}': {error['msg']}"
    return f"{where}: the field '{field}' must be {wanted}, found {type(error['input']).__name__}"
