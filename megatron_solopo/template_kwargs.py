"""``--chat-template-kwargs``: values for variables of a chat template, such as Qwen3's ``enable_thinking``; and
``--chat-template-date``: the day that a template prints which asks for the time (``strftime_now``, as Llama 3.2's).

They belong to the tokenizer, as its chat template does: whatever renders a chat with it uses them. They live in
``tokenizer_config.json`` under `KEY` and `DATE`, where transformers keeps fields that it does not know, so a folder
that a training run exports says which values the model was trained with.

transformers prints today's date, so that the same text would be other tokens tomorrow. Here the date is fixed when
work begins, recorded with what the work writes, and taken from there (`give`). A template that asks for no time has
no date, and nothing is recorded.
"""

from __future__ import annotations

import datetime
import inspect
import json
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
"""What transformers gives to every template: ``strftime_now("%d %b %Y")`` is today."""


def parse(text: str) -> dict[str, Any]:
    """``'{"enable_thinking": false}'`` -> the values.

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
            f"{FLAG} {text}: not valid JSON ({error.msg} at column {error.colno}); "
            """set an object such as '{"enable_thinking": false}'""",
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            "option-value", f"""{FLAG} {text}: must be a JSON object such as '{{"enable_thinking": false}}'"""
        )
    return values


def canonical(text: str) -> str:
    """One text for the same values."""
    return json.dumps(parse(text), ensure_ascii=False, sort_keys=True)


def today() -> str:
    """The day of this machine, ``2026-01-31``."""
    return datetime.date.today().isoformat()


def check_date(text: Any, where: str = DATE_FLAG) -> str:
    """A day as ``2026-01-31``.

    Raises:
        UserError: it is none, or written otherwise.
    """
    try:
        if datetime.date.fromisoformat(text).isoformat() == text:
            return text
    except (TypeError, ValueError):
        pass
    raise UserError("template-date", f"{where} {text}: set a day as YYYY-MM-DD, such as 2026-01-31")


def of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The values a tokenizer renders its chats with, without the date."""
    return tokenizer.init_kwargs.get(KEY) or {}


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day that a tokenizer's chats are rendered with; None where its template asks for no time."""
    return tokenizer.init_kwargs.get(DATE)


def rendering(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `apply_chat_template` is given beside the messages: the values, and a clock that stands at the date."""
    values, date = of(tokenizer), date_of(tokenizer)
    if date is None:
        return values
    moment = datetime.datetime.fromisoformat(date)
    return values | {NOW: moment.strftime}


def for_server(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The values that make a server, which renders chats by its own clock, print the date.

    Raises:
        UserError: the template has no variable ``date_string``, as Llama's has, that would.
    """
    values, date = of(tokenizer), date_of(tokenizer)
    if date is None:
        return values

    def rendered(values: dict[str, Any]) -> str:
        chat = [{"role": "user", "content": "?"}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **values)

    wanted = rendered(rendering(tokenizer))
    for sent in (values, values | {"date_string": datetime.date.fromisoformat(date).strftime("%d %b %Y")}):
        # Whatever the server's clock says.
        if all(rendered(sent | {NOW: lambda form, day=day: day}) == wanted for day in ("one day", "another")):
            return sent
    raise UserError(
        "template-date-server",
        "--server-api chat: the chat template prints the date, and a server prints its own; use --server-api "
        f"completions, whose prompts have the run's ({date})",
    )


def recorded_date(text: Any) -> str | None:
    """What work that began earlier recorded as its date, None where it recorded none."""
    try:
        return check_date(text)
    except UserError:
        return None


def write(folder: Path, text: str | None, date: str | None = None) -> None:
    """Writes the values and the date, where there are any, into a folder's tokenizer_config.json.

    Raises:
        OSError: as the system says it.
    """
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document |= {} if text is None else {KEY: parse(text)}
    document |= {} if date is None else {DATE: date}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the time; a mere mention in its text is none."""
    # Here and below, not at the top: the data commands read values without transformers, which takes seconds to import.
    from jinja2 import nodes

    # transformers' own parser, since templates hold its {% generation %} tag.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = tokenizer.get_chat_template()
    if NOW not in template:
        return False
    tree = _compile_jinja_template(template).environment.parse(template)
    return any(name.name == NOW for name in tree.find_all(nodes.Name))


def _give_date(
    tokenizer: PreTrainedTokenizerBase, date: str | None, folder: str, begun_with: str | None, of_data: str | None
) -> None:
    from_folder = tokenizer.init_kwargs.pop(DATE, None)
    if date is not None:
        check_date(date)
    if not _prints_date(tokenizer):
        if date is not None:
            raise UserError(
                "option-unused", f"{DATE_FLAG} {date}: the chat template prints no date; leave the option out"
            )
        return
    if from_folder is not None:
        check_date(from_folder, f"{folder}: {DATE} of tokenizer_config.json,")
    tokenizer.init_kwargs[DATE] = date or recorded_date(begun_with) or from_folder or recorded_date(of_data) or today()


def give(
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    folder: str,
    date: str | None = None,
    begun_with: str | None = None,
    of_data: str | None = None,
) -> None:
    """Gives a tokenizer the values of the options, or checks those that its folder came with.

    Args:
        date: of --chat-template-date. Without it a template that prints the date prints, of these, the first that is
            recorded: ``begun_with`` (of the work that is resumed), the folder's, ``of_data`` (of the data that the
            work reads), or else today's.

    Raises:
        UserError: a name that the chat template has no variable for, or that is not the user's to set; a date of a
            template that prints none.
    """
    _give_date(tokenizer, date, folder, begun_with, of_data)
    if text is not None:
        tokenizer.init_kwargs[KEY] = parse(text)
    values, where = of(tokenizer), FLAG if text is not None else f"{folder}: {KEY} of tokenizer_config.json"
    if not isinstance(values, dict):
        raise UserError("field-type", f"{where}: must be a JSON object, found {type(values).__name__}")
    if not values:
        return
    from transformers.utils.chat_template_utils import _get_template_variables

    ours = {"messages", *inspect.signature(type(tokenizer).apply_chat_template).parameters}
    known = sorted(_get_template_variables(tokenizer.get_chat_template()) - ours)
    for name in values:
        if name == NOW:
            raise UserError("template-variable", f"{where}: {NOW} is transformers' clock; set the day with {DATE_FLAG}")
        if name in ours:
            raise UserError("template-variable", f"{where}: {name} is set by every command itself; leave it out")
        if name not in known:
            raise UserError(
                "template-variable",
                f"{where}: the chat template has no variable {name}; it has {', '.join(known) or 'none to set'}",
            )
