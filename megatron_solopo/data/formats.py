"""Preference data and conversations as the hub ships them -> prompt, chosen and rejected; or messages.

Forms that are read, by their fields (a null is an absent field):

    prompt, chosen, rejected    texts or messages; the answers alone, or whole conversations that repeat the prompt
    chosen, rejected            whole conversations: the prompt is what they have in common; also Anthropic's texts of
                                "\\n\\nHuman: ...\\n\\nAssistant: ..." turns
    question, instruction (input), conversations
                                in the place of a prompt (Orca, Alpaca, ShareGPT)
    system, system_prompt       before any of these
    messages, conversations     a conversation; so are a prompt, question or instruction with its completion, output,
                                response or answer

    tools                       beside any of these: definitions of the tools that the chat may call

The answers of two conversations start at the first message that differs, an assistant's, and may have several turns.
Prompts end between messages, never inside one, however much two answers have in common. With a prompt of its own a side
may be a list of texts: several responses.
"""

from __future__ import annotations

import json
import re

from megatron_solopo.data.files.records import Record
from megatron_solopo.data.validation import (
    TOOL_CALLS,
    TOOLS,
    Message,
    check_messages,
    check_tools,
    missing,
    wrong_kind,
)
from megatron_solopo.errors import UserError

CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output")
CHATS = ("conversations", "conversation", "messages")
QUESTIONS = ("question", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("completion", "output", "response", "answer")
OTHERWISE = {"paragraphs", "documents", "context", "label", "chosen", "rejected"}
"""Fields beside a question and its answer that would be lost in a conversation: what the question is about, or that
the answer is a bad one."""

OURS = {"answers": list, "scores": dict, "question": str}
"""Fields of a preference group that other data sets have for something else."""

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def as_group(record: Record, where: str) -> Record:
    """Converts a record of any form of pair to ``short_messages``, ``chosen`` and ``rejected`` (texts).

    Raises:
        UserError: naming ``where``, the form it looks like, and what to do.
    """
    if {"short_messages", "long_messages"} & record.keys():
        return record
    present = _present(record)
    chosen, rejected = _first(present, CHOSEN), _first(present, REJECTED)
    if chosen is None or rejected is None:
        # Of a file that holds no pairs the first field is missed that all groups have.
        key = "short_messages" if chosen is rejected else "chosen" if chosen is None else "rejected"
        named = "name the fields of pairs of another data set prompt, chosen and rejected"
        raise UserError("field-missing", missing(present, key, where, named))
    if several := [name for name in (chosen, rejected) if _texts(present[name])]:
        return _of_several(present, chosen, rejected, several[0], where)
    answers = {"chosen": _answer(present, chosen, where), "rejected": _answer(present, rejected, where)}
    wholes = [name for name, answer in answers.items() if not isinstance(answer, str) and _is_whole(answer)]
    both = len(wholes) == 2
    prompt, key = _prompt(present, ("prompt",) if both else ("prompt", *CHATS, *QUESTIONS), where)
    if prompt is None and len(wholes) == 1:
        raise UserError(
            "prompt-missing",
            f"{where}: '{wholes[0]}' is a whole conversation and the other an answer alone, and no field holds their "
            "prompt; add it as 'prompt', or write two whole conversations",
        )
    if prompt is None and not both:
        raise UserError(
            "prompt-missing",
            f"{where}: 'chosen' and 'rejected' are answers alone, and no field holds their prompt (fields found: "
            f"{', '.join(sorted(present))}); add it as 'prompt', or write whole conversations",
        )
    text = present.get(key)
    if isinstance(text, str) and _turns(text):  # whose answers start with a space
        answers = {name: answer.strip() if isinstance(answer, str) else answer for name, answer in answers.items()}
    chats = {
        name: _with_system(present, _conversation(prompt, key, answer, name, where), where)
        for name, answer in answers.items()
    }
    start = _start_of_answers(chats["chosen"], chats["rejected"], where)
    return _kept(present) | {
        "short_messages": chats["chosen"][:start],
        "chosen": _response(chats["chosen"][start:]),
        "rejected": _response(chats["rejected"][start:]),
    }


def _kept(present: Record) -> Record:
    """Returns the fields that mean the same in a group."""
    return {name: value for name, value in present.items() if isinstance(value, OURS.get(name, object))}


def _response(turns: list[Message]) -> str | list[Message]:
    """Returns an answer alone as its text, more turns and tool calls as messages."""
    return turns if len(turns) > 1 or TOOL_CALLS in turns[0] else turns[0]["content"]


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _of_several(record: Record, chosen: str, rejected: str, several: str, where: str) -> Record:
    """Returns a group with several texts on a side, whose prompt is a field of its own."""
    prompt, key = _prompt(record, ("prompt", *CHATS, *QUESTIONS), where)
    if prompt is None:
        raise UserError(
            "prompt-missing",
            f"{where}: '{several}' holds several answers, and no field holds their prompt; add it as 'prompt'",
        )
    sides = {"chosen": record[chosen], "rejected": record[rejected]}
    if wrong := [name for name, value in sides.items() if not isinstance(value, str) and not _texts(value)]:
        raise UserError(
            "field-type", f"{where}: the field '{wrong[0]}' must be a text or a list of texts, as '{several}' is"
        )
    return _kept(record) | {"short_messages": _with_system(record, prompt, where)} | sides


def as_conversation(record: Record, where: str) -> list[Message]:
    """Returns the messages of a record of any form of conversation.

    Raises:
        UserError: naming ``where``, the form it looks like, and what to do.
    """
    present = _present(record)
    if key := _first(present, ("messages", *CHATS)):
        return _with_system(present, check_messages(_unpacked(present[key], key, where), key, where), where)
    if {"chosen", "rejected"} <= present.keys() and "short_messages" not in present:
        fields = ", ".join(sorted(present))
        raise UserError(
            "field-missing",
            f"{where}: no conversation (fields found: {fields}); these are pairs for --objective preference",
        )
    answer, (prompt, key) = _first(present, ANSWERS), _prompt(present, ("prompt", *QUESTIONS), where)
    if answer is None or prompt is None or OTHERWISE & present.keys():
        raise UserError("field-missing", missing(present, "messages", where))
    chat = _conversation(prompt, key, _answer(present, answer, where), answer, where)
    return _with_system(present, chat, where)


def with_tools(record: Record, where: str) -> Record:
    """Returns a record of ours with its tools in the first message of each of its chats, which is rendered with them.

    Raises:
        UserError: see `check_tools`.
    """
    if not (tools := record.get(TOOLS)):
        return record
    tools = check_tools(tools, where)
    chats = {name: record.get(name) for name in ("short_messages", "long_messages", "messages")}
    return record | {
        name: [{**chat[0], TOOLS: tools}, *chat[1:]]
        for name, chat in chats.items()
        if tools and isinstance(chat, list) and chat and isinstance(chat[0], dict)
    }


def _present(record: Record) -> Record:
    return {name: value for name, value in record.items() if value is not None}


def _first(record: Record, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _prompt(record: Record, names: tuple[str, ...], where: str) -> tuple[list[Message] | None, str]:
    """Returns the messages before an answer, and the field among ``names`` that they come from; None where there is
    none."""
    key = _first(record, names)
    if key is None:
        return None, ""
    value = _unpacked(record[key], key, where)
    if isinstance(value, dict) and {"messages", "role", "from"} & value.keys():  # OpenAI's files; one message
        value = value.get("messages", [value])
    if isinstance(value, list):
        messages = check_messages(value, key, where)
    elif not isinstance(value, str):
        raise UserError("field-type", wrong_kind(value, key, where, "str or list"))
    elif (turns := _turns(value)) is not None:
        messages = turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    else:
        if key == "instruction" and isinstance(more := record.get("input"), str) and more:
            value = f"{value}\n{more}"  # as LLaMA-Factory joins them
        messages = [{"role": "user", "content": value}]
    return messages, key


def _with_system(record: Record, messages: list[Message], where: str) -> list[Message]:
    """Returns the messages behind the system message that another field holds; an empty text is none."""
    key = _first(record, SYSTEMS)
    text = record[key] if key else ""
    if not isinstance(text, str):
        raise UserError("field-type", wrong_kind(text, str(key), where, "str"))
    if not text:
        return messages
    system = {"role": "system", "content": text}
    if messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            raise UserError(
                "system-message-conflict",
                f"{where}: the field '{key}' and the system message are different texts; keep one of them",
            )
        return messages
    return [system, *messages]


def _answer(record: Record, key: str, where: str) -> str | list[Message]:
    """Returns an answer's text, or its messages: one, or a whole conversation."""
    value = _unpacked(record[key], key, where)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        return _turns(value) or value
    if not isinstance(value, list):
        raise UserError("field-type", wrong_kind(value, key, where, "str or list"))
    return check_messages(value, key, where)


def _unpacked(value: object, key: str, where: str) -> object:
    """Returns the messages of a table's cell that holds them as JSON; anything else as it is.

    Raises:
        UserError: the cell holds them as Python prints them.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        messages = json.loads(value)
    except ValueError:
        if re.match(r"\s*\[\{'(role|content|from|value)'", value):
            raise UserError(
                "not-json", f"{where}: '{key}' holds messages as Python prints them; write them as JSON"
            ) from None
        return value
    named = all(isinstance(message, dict) and {"role", "from"} & message.keys() for message in messages)
    return messages if named else value


def _is_whole(messages: list[Message]) -> bool:
    """Whether messages are a conversation, and not an answer alone."""
    return len(messages) > 1 or messages[0]["role"] != "assistant"


def _turns(text: str) -> list[Message] | None:
    """Returns the messages of a text of Anthropic's form, None for any other text."""
    text = "\n\n" + text.lstrip("\n")
    if not text.startswith("\n\nHuman:") or "\n\nAssistant:" not in text:
        return None
    parts = _TURN.split(text)[1:]
    return [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _conversation(
    prompt: list[Message] | None, key: str, answer: str | list[Message], name: str, where: str
) -> list[Message]:
    """Prompt and answer, where the answer may repeat the prompt, with its system message or without."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if prompt is None:
        return answer
    if answer[0]["role"] == "assistant":
        return [*prompt, *answer]
    system, asked = _without_system(prompt)
    answer_system, turns = _without_system(answer)
    if system and answer_system and system != answer_system:
        raise UserError(
            "system-message-conflict", f"{where}: the system messages of '{key}' and of '{name}' are different texts"
        )
    # A prompt that is one text may be any turn's of a longer conversation: data sets of several turns differ there.
    repeats = turns[: len(asked)] == asked or (
        len(asked) == 1 and any(turn["content"].strip() == asked[0]["content"].strip() for turn in turns[:-1])
    )
    if not repeats:
        roles = ", ".join(message["role"] for message in answer)
        raise UserError(
            "pair-prompts-differ",
            f"{where}: '{name}' must be one assistant message after '{key}', or a conversation that repeats '{key}'; "
            f"found {roles}, with other texts",
        )
    return [*(answer_system or system), *turns]


def _without_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    return (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)


def _start_of_answers(chosen: list[Message], rejected: list[Message], where: str) -> int:
    """Returns the number of the first message that differs, where both conversations' answers start.

    Raises:
        UserError: it is no answer, or there is none.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(
                "messages-order",
                f"{where}: '{name}' ends with a message of role {messages[-1]['role']!r}, not an answer",
            )
    same = next((i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), None)
    if same is None and len(chosen) != len(rejected):
        short, long = ("chosen", "rejected") if len(chosen) < len(rejected) else ("rejected", "chosen")
        raise UserError(
            "pair-prompts-differ",
            f"{where}: '{short}' is the beginning of '{long}'; both must end with the answers that are compared",
        )
    start = len(chosen) - 1 if same is None else same
    roles = [chat[start]["role"] for chat in (chosen, rejected)]
    if roles != ["assistant", "assistant"]:
        raise UserError(
            "pair-prompts-differ",
            f"{where}: 'chosen' and 'rejected' differ from message {start + 1} on, which is of role "
            f"{' and '.join(map(repr, dict.fromkeys(roles)))} ({len(chosen)} and {len(rejected)} messages); both must "
            "be the same up to an answer",
        )
    if start < 1:
        raise UserError("prompt-missing", f"{where}: 'chosen' and 'rejected' hold no prompt before their answers")
    return start
