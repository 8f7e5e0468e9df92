"""``--chat-template-kwargs``: values for variables of a chat template, such as Qwen3's ``enable_thinking``; and
``--chat-template-date``: the date for a template that prints one (``strftime_now``, as in Llama 3.2's).

Both belong to the tokenizer, as its chat template does, and apply to every chat that it renders. They are stored in
``tokenizer_config.json`` under `KEY` and `DATE`, where transformers keeps unknown fields, so an exported folder records
the values that the model was trained with.

transformers prints today's date, so the same text would have other tokens tomorrow. Here the date is fixed when a
command starts, recorded in its outputs, and read from there (`apply`). A template that prints no date has none, and
nothing is recorded.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_solopo import json_text
from megatron_solopo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAG = "--chat-template-kwargs"
KEY = "chat_template_kwargs"
DATE_FLAG = "--chat-template-date"
DATE = "chat_template_date"
NOW = "strftime_now"
"""The function that transformers passes to every template: ``strftime_now("%d %b %Y")`` is today."""


Values = dict[str, Any]
"""Values of a template's variables, by name."""


def parse(text: str) -> Values:
    """Parses a JSON object such as ``'{"enable_thinking": false}'``.

    Raises:
        UserError: not JSON, or JSON but not an object.
    """
    try:
        values = json_text.loads(text)
    except json_text.KeyTwice as error:
        raise UserError("json-key-twice", f"{FLAG} {text}: {error}; keep one of them") from None
    except json.JSONDecodeError as error:
        raise UserError(
            "not-json",
            f"{FLAG} {text}: not valid JSON ({json_text.fault(error)} at column {error.colno}); "
            """set an object such as '{"enable_thinking": false}'""",
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            "option-value", f"""{FLAG} {text}: must be a JSON object such as '{{"enable_thinking": false}}'"""
        )
    return values


def canonical(text: str) -> str:
    """Returns the same text for the same values: sorted keys, no extra spaces."""
    return json.dumps(parse(text), ensure_ascii=False, sort_keys=True)


def today() -> str:
    """This machine's date, ``2026-01-31``."""
    return datetime.date.today().isoformat()


def check_date(text: object, where: str = DATE_FLAG) -> str:
    """Returns a date of the form ``2026-01-31``.

    Args:
        where: the option or field, with which the message starts.

    Raises:
        UserError: it is not a date of this form.
    """
    with contextlib.suppress(ValueError):
        if isinstance(text, str) and datetime.date.fromisoformat(text).isoformat() == text:
            return text
    raise UserError("template-date", f"{where} {text}: set a date as YYYY-MM-DD, such as 2026-01-31")


def of(tokenizer: PreTrainedTokenizerBase) -> Values:
    """Returns the values of a tokenizer's template variables, without the date."""
    return tokenizer.init_kwargs.get(KEY) or {}


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the date of a tokenizer's chats; None if its template prints none."""
    return tokenizer.init_kwargs.get(DATE)


def rendering(tokenizer: PreTrainedTokenizerBase) -> Values:
    """Returns the keyword arguments for `apply_chat_template`: the values, and a clock that is fixed at the date."""
    values, date = of(tokenizer), date_of(tokenizer)
    if date is None:
        return values
    moment = datetime.datetime.fromisoformat(date)
    return values | {NOW: moment.strftime}


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    chat: Sequence[Mapping[str, Any]],
    values: Values | None = None,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """Returns the text of a chat; ``values`` in the place of `rendering`, ``tools`` as definitions for the template."""
    values = rendering(tokenizer) if values is None else values
    text = tokenizer.apply_chat_template(
        [dict(message) for message in chat],
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **values,
    )
    assert isinstance(text, str)
    return text


def for_server(tokenizer: PreTrainedTokenizerBase) -> Values:
    """Returns the values with which a server, which renders chats with its clock, prints the date.

    Raises:
        UserError: the template has no variable for it, such as Llama's ``date_string``.
    """
    values, date = of(tokenizer), date_of(tokenizer)
    if date is None:
        return values

    def asked(values: Values) -> str:
        return rendered(tokenizer, [{"role": "user", "content": "?"}], values, add_generation_prompt=True)

    expected = asked(rendering(tokenizer))
    for sent in (values, values | {"date_string": datetime.date.fromisoformat(date).strftime("%d %b %Y")}):
        # The server's clock must not matter.
        if all(asked(sent | {NOW: lambda form, day=day: day}) == expected for day in ("one day", "another")):
            return sent
    raise UserError(
        "template-date-server",
        "--server-api chat: the chat template prints the date, and a server prints that of its clock; use --server-api "
        f"completions, whose prompts have the run's ({date})",
    )


def recorded_date(text: object) -> str | None:
    """Returns the date that an earlier command recorded; None if it recorded no valid one."""
    try:
        return check_date(text)
    except UserError:
        return None


def write(folder: Path, text: str | None, date: str | None = None) -> None:
    """Writes the values and the date, if there are any, into a folder's tokenizer_config.json.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document |= {} if text is None else {KEY: parse(text)}
    document |= {} if date is None else {DATE: date}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template calls `NOW`; the name in a text of the template does not count."""
    # Imported here: the data commands read values without transformers, which takes seconds to import.
    from jinja2 import nodes

    # transformers' parser, since templates hold its {% generation %} tag.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = tokenizer.get_chat_template()
    if NOW not in template:
        return False
    tree = _compile_jinja_template(template).environment.parse(template)
    return any(name.name == NOW for name in tree.find_all(nodes.Name))


def _apply_date(
    tokenizer: PreTrainedTokenizerBase, date: str | None, folder: str, of_resumed: str | None, of_data: str | None
) -> None:
    from_folder = tokenizer.init_kwargs.pop(DATE, None)
    if date is not None:
        check_date(date)
    if not _prints_date(tokenizer):
        if date is not None:
            raise UserError("option-unused", f"{DATE_FLAG} {date}: the chat template prints no date; remove the option")
        return
    if from_folder is not None:
        check_date(from_folder, f"{folder}: {DATE} of tokenizer_config.json,")
    tokenizer.init_kwargs[DATE] = date or recorded_date(of_resumed) or from_folder or recorded_date(of_data) or today()


def apply(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    folder: str,
    date: str | None = None,
    of_resumed: str | None = None,
    of_data: str | None = None,
) -> None:
    """Sets the options' values in a tokenizer, or checks the values of its folder.

    Args:
        text: of --chat-template-kwargs.
        date: of --chat-template-date. Without it a template that prints the date prints the first recorded one of
            ``of_resumed`` (the work that is resumed), the folder's, and ``of_data`` (the data that is read), else
            today's.

    Raises:
        UserError: a name is not a variable of the chat template, or is set by the commands; or a date is set and the
            template prints none.
    """
    _apply_date(tokenizer, date, folder, of_resumed, of_data)
    if text is not None:
        tokenizer.init_kwargs[KEY] = parse(text)
    values, where = of(tokenizer), FLAG if text is not None else f"{folder}: {KEY} of tokenizer_config.json"
    if not isinstance(values, dict):
        raise UserError("field-type", f"{where}: must be a JSON object, found {type(values).__name__}")
    if not values:
        return
    from transformers.utils.chat_template_utils import _get_template_variables  # see `_prints_date`

    reserved = {"messages", *inspect.signature(type(tokenizer).apply_chat_template).parameters}
    variables = sorted(_get_template_variables(tokenizer.get_chat_template()) - reserved)
    for name in values:
        if name == NOW:
            raise UserError(
                "template-variable", f"{where}: {NOW} is transformers' clock; set the date with {DATE_FLAG}"
            )
        if name in reserved:
            raise UserError("template-variable", f"{where}: {name} is set by every command itself; remove it")
        if name not in variables:
            raise UserError(
                "template-variable",
                f"{where}: the chat template has no variable {name}; it has {', '.join(variables) or 'none to set'}",
            )
