"""Preference data and conversations as the hub ships them: each form is the same pair; what cannot be read is named.

TRL 1.16's extraction is the oracle for the forms that it reads.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import check_refusal, refused
from tiny_models import write_lines, write_model
from trl.data_utils import maybe_extract_prompt

from megatron_solopo.cli import dispatch, run
from megatron_solopo.config_load import load
from megatron_solopo.data.formats import as_conversation, as_group
from megatron_solopo.data.schema import read_conversations, read_groups
from megatron_solopo.training.preflight import load_data


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM = {"role": "system", "content": "s"}
ASK = [user("w1 w2")]
PAIR = {"chosen": "w3", "rejected": "w3 w4"}  # one answer is the start of the other: the prompt must not
TURNS = [user("w5"), reply("w6"), user("w1 w2")]


def whole(*before: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Conversations that repeat what comes before."""
    return {name: [*before, reply(text)] for name, text in PAIR.items()} | more


FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "texts": (PAIR | {"prompt": "w1 w2"}, ASK),
    "prompt of messages": (PAIR | {"prompt": ASK}, ASK),
    "answers of one message": (whole(prompt=ASK), ASK),
    "answers of one message after turns": (whole(prompt=[SYSTEM, *TURNS]), [SYSTEM, *TURNS]),
    "a prompt of one message": (PAIR | {"prompt": ASK[0]}, ASK),
    "a text and a message": (PAIR | {"prompt": "w1 w2", "chosen": [reply("w3")]}, ASK),
    "whole conversations": (whole(*ASK, prompt=ASK), ASK),
    "whole conversations with the system message": (whole(SYSTEM, *ASK, prompt=[SYSTEM, *ASK]), [SYSTEM, *ASK]),
    "whole conversations without the system message": (whole(*ASK, prompt=[SYSTEM, *ASK]), [SYSTEM, *ASK]),
    "a system message in the conversations only": (whole(SYSTEM, *ASK, prompt=ASK), [SYSTEM, *ASK]),
    "whole conversations of turns": (whole(*TURNS, prompt=TURNS), TURNS),
    "a prompt that is the beginning of the turns": (whole(*TURNS, prompt=TURNS[:1]), TURNS),
    "turns after the prompt": (whole(*TURNS[1:], prompt=TURNS[:1]), TURNS),
    "UltraFeedback": (
        whole(*ASK, prompt="w1 w2", prompt_id="f0", messages=[*ASK, reply("w3")], score_chosen=8.5, score_rejected=5.0),
        ASK,
    ),
    "a text for a prompt, the last turn's": (whole(*TURNS, prompt="w1 w2 "), TURNS),
    "a text for a prompt, the first turn's": (whole(*TURNS, prompt="w5"), TURNS),
    "implicit prompt": (whole(*ASK), ASK),
    "implicit prompt of turns": (whole(SYSTEM, *TURNS), [SYSTEM, *TURNS]),
    "implicit prompt beside one of the conversations": (whole(*ASK, messages=[*ASK, reply("w3")]), ASK),
    "implicit prompt and a null": (whole(*ASK, prompt=None, id=None), ASK),
    "parts": (whole(user(parts("w1 ", "w2"))), ASK),
    "parts as a table has them": (
        {
            name: [
                user([{"type": "text", "text": "w1 w2", "image": None}]),
                reply(parts(text)) | {"tool_calls": None},
            ]
            for name, text in PAIR.items()
        },
        ASK,
    ),
    "messages as JSON in a table's cell": (
        {name: json.dumps(chat) for name, chat in whole(*TURNS).items()},
        TURNS,
    ),
    "a text that is a JSON list": (PAIR | {"prompt": '[{"a": 1}]'}, [user('[{"a": 1}]')]),
    "parts in a prompt": (whole(prompt=[user(parts("w1 w2"))]), ASK),
    "Anthropic": (
        {name: f"\n\nHuman: w5\n\nAssistant: w6\n\nHuman: w1 w2\n\nAssistant: {text}" for name, text in PAIR.items()},
        TURNS,
    ),
    "Anthropic, prompt apart": (
        {name: f" {text}" for name, text in PAIR.items()} | {"prompt": "\n\nHuman: w1 w2\n\nAssistant:"},
        ASK,
    ),
    "Orca": (PAIR | {"system": "s", "question": "w1 w2"}, [SYSTEM, *ASK]),
    "a system field beside conversations": (whole(*ASK, system="s"), [SYSTEM, *ASK]),
    "Orca without a system prompt": (PAIR | {"system": "", "question": "w1 w2"}, ASK),
    "Orca, Argilla's": (
        PAIR | {"system": "s", "input": "w1 w2", "generations": ["w3"], "rating": [9.0], "status": "tie"},
        [SYSTEM, *ASK],
    ),
    "Alpaca": (PAIR | {"instruction": "w1", "input": "w2"}, [user("w1\nw2")]),
    "Alpaca without an input": (PAIR | {"instruction": "w1 w2", "input": ""}, ASK),
    "responses": ({"instruction": "w1 w2", "chosen_response": "w3", "rejected_response": "w3 w4"}, ASK),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "w1 w2"}],
            **{name: {"from": "gpt", "value": text} for name, text in PAIR.items()},
        },
        [SYSTEM, *ASK],
    ),
    "OpenAI": (
        {
            "input": {"messages": ASK, "tools": []},
            "preferred_output": [reply("w3")],
            "non_preferred_output": [reply("w3 w4")],
        },
        ASK,
    ),
    "a tool's answer in the prompt": (
        whole(*ASK, reply("w6"), {"role": "tool", "content": "w7"}),
        [*ASK, reply("w6"), {"role": "tool", "content": "w7"}],
    ),
    "fields of other meaning": (whole(*ASK, scores=[1.0, 2.0], answers="w3", question={"text": "?"}), ASK),
}
TRL_READS = [
    *("texts", "answers of one message", "answers of one message after turns", "UltraFeedback", "implicit prompt"),
    *("implicit prompt of turns", "a text for a prompt, the last turn's", "parts", "a tool's answer in the prompt"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_the_pair(form: str, tmp_path: Path) -> None:
    """In JSONL and in Parquet."""
    record, prompt = FORMS[form]
    files = [write_lines(tmp_path / "pairs.jsonl", [record | {"id": 7}])]
    with contextlib.suppress(pa.ArrowInvalid):  # a column has one type
        table = pa.Table.from_pylist([record | {"id": 7}])
        files.append(tmp_path / "pairs.parquet")
        pq.write_table(table, files[-1])
    for name in files:
        (group,) = read_groups(name)
        assert (group.short_messages, group.chosen, group.rejected) == (prompt, *PAIR.values()), name
        assert (group.id, group.long_messages, group.scores, group.answers) == ("7", None, {}, [])


@pytest.mark.parametrize("form", TRL_READS)
def test_trl_extracts_the_same(form: str) -> None:
    record, _ = FORMS[form]
    theirs, ours = maybe_extract_prompt(dict(record)), as_group(record, "here")
    if form == "texts":
        theirs |= {"prompt": [user(theirs["prompt"])]}
    chat = [message | {"content": text_of(message["content"])} for message in theirs["prompt"]]
    assert ours["short_messages"] == chat
    for name in PAIR:
        answer = theirs[name]
        assert ours[name] == text_of(answer if isinstance(answer, str) else answer[0]["content"])


def text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


WRONG: dict[str, tuple[Any, ...]] = {
    "answers without a prompt": (PAIR, "prompt-missing", "(fields found: chosen, rejected)", "'prompt'"),
    "messages without a prompt": (whole(), "prompt-missing", "answers alone", "'prompt'"),
    "a conversation and an answer": (
        whole(*ASK) | {"rejected": "w4"},
        "prompt-missing",
        "'chosen' is a whole conversation",
        "'prompt'",
    ),
    "other names": (
        {"history": "w1", "human_ref_A": "w3", "human_ref_B": "w4", "labels": 1},
        "field-missing",
        "history, human_ref_A, human_ref_B, labels)",
        "prompt, chosen and rejected",
    ),
    "one is the beginning of the other": (
        {"chosen": [*ASK, reply("w3")], "rejected": [*ASK, reply("w3"), user("w5"), reply("w4")]},
        "pair-prompts-differ",
        "'chosen' is the beginning of 'rejected'",
    ),
    "they part at a question": (
        {
            "chosen": [*ASK, reply("w3"), user("w5"), reply("w4")],
            "rejected": [*ASK, reply("w3"), user("w6"), reply("w4")],
        },
        "pair-prompts-differ",
        "message 3 ",
        "'user'",
        "(4 and 4 messages)",
    ),
    "they ask differently": (
        {"chosen": [user("w1"), reply("w3")], "rejected": [user("w2"), reply("w4")]},
        "pair-prompts-differ",
        "message 1 ",
        "(2 and 2 messages)",
    ),
    "no answer at the end": (whole(*ASK) | {"rejected": ASK}, "messages-order", "'rejected'", "role 'user'"),
    "another prompt": (whole(*ASK, prompt="w9"), "pair-prompts-differ", "'chosen'", "'prompt'"),
    "two system messages": (
        whole(SYSTEM, *ASK, prompt=[SYSTEM | {"content": "t"}, *ASK]),
        "system-message-conflict",
        "'prompt'",
        "'chosen'",
    ),
    "a system field and a system message": (
        PAIR | {"system": "t", "prompt": [SYSTEM, *ASK]},
        "system-message-conflict",
        "the field 'system'",
    ),
    "an image": (
        whole(user([*parts("w1"), {"type": "image_url", "image_url": {"url": "x"}}])),
        "message-unsupported",
        "chosen[0], content[1]",
        "'image_url'",
    ),
    "a text among parts": (whole(user(["w1"])), "message-unsupported", "chosen[0], content[0]", "'str'"),
    "a call of earlier versions": (
        whole(*ASK, reply("") | {"function_call": {"name": "f"}}),
        "message-unsupported",
        "chosen[1]",
        "'function_call'",
        "'tool_calls'",
    ),
    "a call without a name": (
        whole(*ASK, reply("") | {"tool_calls": [{"function": {"arguments": {}}}]}),
        "field-type",
        "chosen[1], tool_calls[0]",
        "'name'",
    ),
    "a user's call": (
        whole(*ASK, user("w") | {"tool_calls": [{"function": {"name": "f"}}]}),
        "message-role",
        "chosen[1]",
        "'user'",
    ),
    "ShareGPT, a function's call": (
        whole(prompt=[{"from": "human", "value": "w1"}, {"from": "function_call", "value": "{}"}]),
        "message-role",
        "prompt[1]",
        "'function_call'",
        "human, gpt, system, user, assistant",
    ),
    "messages as Python prints them": ({name: str(chat) for name, chat in whole(*ASK).items()}, "not-json", "'chosen'"),
    "KTO": (
        {"prompt": ASK, "completion": [reply("w3")], "label": True},
        "field-missing",
        "'short_messages'",
        "KTO's",
    ),
    "votes": ({"conversation_a": [], "conversation_b": [], "winner": "a"}, "field-missing", "votes between conv"),
    "ratings": ({"instruction": "w1", "completions": [{}]}, "field-missing", "several rated answers"),
    "conversations": ({"messages": [*ASK, reply("w3")]}, "field-missing", "conversations for --objective sft"),
    "one answer": ({"prompt": "w1", "completion": "w3"}, "field-missing", "one answer each", "--objective sft"),
    "texts alone": ({"text": "w1"}, "field-missing", "plain texts"),
    "one answer missing": (whole(*ASK) | {"rejected": None}, "field-missing", "'rejected'"),
    "texts and messages": (
        PAIR | {"prompt": "w1", "chosen": ["w3"], "rejected": [reply("w4")]},
        "field-type",
        "'rejected'",
        "'chosen'",
    ),
    "several without a prompt": (PAIR | {"chosen": ["w3"]}, "prompt-missing", "'chosen'", "'prompt'"),
    "a number": (PAIR | {"prompt": "w1", "chosen": 3}, "field-type", "'chosen'", "str or list", "found int"),
}


@pytest.mark.parametrize("form", WRONG)
def test_what_cannot_be_read_is_named_with_its_form(form: str, tmp_path: Path) -> None:
    record, code, *named = WRONG[form]
    path = write_lines(tmp_path / "pairs.jsonl", [FORMS["texts"][0], record])
    with refused(code, f"{path}:2: ", *named):
        list(read_groups(path))


CHAT = [*ASK, reply("w3")]
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": CHAT}, CHAT),
    "messages of parts": ({"messages": [user(parts("w1", " w2")), reply(parts("w3"))]}, CHAT),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3", "weight": None}]},
        CHAT,
    ),
    "ShareGPT with a system field": (
        {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}], "system": "s"},
        [SYSTEM, *CHAT],
    ),
    "chats under ShareGPT's name": ({"conversations": CHAT}, CHAT),
    "prompt and completion": ({"prompt": "w1 w2", "completion": "w3"}, CHAT),
    "prompt and completion of messages": ({"prompt": ASK, "completion": [reply("w3")]}, CHAT),
    "Alpaca": ({"instruction": "w1 w2", "input": "", "output": "w3", "text": "Below is"}, CHAT),
    "OpenOrca": ({"id": "f", "system_prompt": "s", "question": "w1 w2", "response": "w3"}, [SYSTEM, *CHAT]),
    "question and answer": ({"question": "w1 w2", "answer": "w3"}, CHAT),
    "messages as JSON in a table's cell": ({"messages": json.dumps(CHAT)}, CHAT),
    "UltraFeedback's messages": (FORMS["UltraFeedback"][0], CHAT),
}
WRONG_CONVERSATIONS: dict[str, tuple[Any, ...]] = {
    "a pair": (PAIR | {"prompt": "w1"}, "(fields found: chosen, prompt, rejected)", "--objective preference"),
    "KTO": ({"prompt": "w1", "completion": "w3", "label": False}, "KTO's"),
    "a question about documents": (
        {"question": "w1", "answer": "w3", "paragraphs": []},
        "'messages'",
        "questions of --source musique",
    ),
    "a question about a context": ({"question": "w1", "answer": "w3", "context": "w4"}, "'messages'"),
    "texts": ({"text": "w1"}, "plain texts"),
    "ends with the question": ({"prompt": "w1"}, "'messages'", "(fields found: prompt)"),
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_is_read_as_the_conversation(form: str, tmp_path: Path) -> None:
    record, expected = CONVERSATIONS[form]
    (conversation,) = read_conversations(write_lines(tmp_path / "chats.jsonl", [record]))
    assert [{name: m[name] for name in ("role", "content")} for m in conversation.messages] == expected


@pytest.mark.parametrize("form", WRONG_CONVERSATIONS)
def test_what_is_no_conversation_is_named_with_its_form(form: str) -> None:
    record, *named = WRONG_CONVERSATIONS[form]
    with refused("field-missing", "chats.jsonl:2: ", *named):
        as_conversation(record, "chats.jsonl:2")


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_tool_calls_are_read_as_templates_write_them() -> None:
    """Without content; arguments as an object, also where a table or OpenAI's form has them otherwise."""
    wanted = [*ASK, call({"x": 1}) | {"content": ""}, {"role": "tool", "content": "w7"}, reply("w3")]
    for arguments in ({"x": 1}, {"x": 1, "y": None}, '{"x": 1}'):
        record = {"messages": [*ASK, call(arguments), {"role": "tool", "content": "w7", "name": None}, reply("w3")]}
        assert as_conversation(record, "chats.jsonl:2") == wanted


def test_answers_of_several_turns_and_several_answers() -> None:
    """An answer starts at the first message that differs."""
    result, other = {"role": "tool", "content": "w7"}, reply("w8")
    ours = as_group({"chosen": [*ASK, call({}), result, reply("w3")], "rejected": [*ASK, other]}, "p.jsonl:1")
    assert ours["short_messages"] == ASK and ours["rejected"] == "w8"
    assert ours["chosen"] == [call({}) | {"content": ""}, result, reply("w3")]
    ours = as_group({"prompt": "w1 w2", "chosen": ["w3", "w4"], "rejected": "w5", "system": "s"}, "p.jsonl:1")
    assert ours["short_messages"] == [SYSTEM, *ASK]
    assert (ours["chosen"], ours["rejected"]) == (["w3", "w4"], "w5")


# The commands: a data set of the hub is read like a file.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same pairs as a folder that `datasets` loads by name, JSON arrays and a JSONL file."""
    folder = tmp_path_factory.mktemp("home")
    write_model(folder / "hf")
    records = [
        {name: [user(f"w{n} w2"), reply(f"{text} w{n}")] for name, text in PAIR.items()} | {"prompt": f"w{n} w2"}
        for n in range(8)
    ]
    (folder / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(records), folder / "set" / "train-00000.parquet")
    (folder / "pairs.json").write_text(json.dumps(records, indent=1))
    (folder / "line.json").write_text(json.dumps(records))
    write_lines(folder / "pairs.jsonl", records)
    return folder


def test_training_tokenize_data_and_inspect_data_read_the_hub_as_a_file(home: Path, tmp_path: Path, capfd) -> None:
    seen = {}
    for name, source in (
        ("file", home / "pairs.jsonl"),
        ("array", home / "pairs.json"),
        ("line", home / "line.json"),
        ("hub", f"hub:{home / 'set'}"),
        ("table", home / "set" / "train-00000.parquet"),
    ):
        base = ["--hf-path", home / "hf", "--save", tmp_path / "run", "--train-iters", 1, "--context-mode", "short"]
        config, _ = load(list(map(str, [*base, "--train-data", source])))
        data = load_data(config)
        tokens = tmp_path / name
        command = ["tokenize-data", "--data", source, "--tokenizer", home / "hf", "--output", tokens, "--workers", 2]
        assert run(dispatch, list(map(str, command))) == 0, capfd.readouterr().err
        assert run(dispatch, list(map(str, command))) == 0 and "nothing is left to do" in capfd.readouterr().out
        stored, _ = load(list(map(str, [*base, "--train-data", tokens])))
        folder = load_data(stored)
        assert folder.train.fingerprint == data.train.fingerprint
        assert [group.id for group in folder.train.groups] == [group.id for group in data.train.groups]
        assert json.loads((tokens / "manifest.json").read_text())["file"] == str(source)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(name)) == [name]
        look = ["inspect-data", "--data", source, "--tokenizer", home / "hf", "--context-mode", "short", "--index", 3]
        assert run(dispatch, list(map(str, look))) == 0
        assert "w3 w2" in capfd.readouterr().out
        seen[name] = data.train.fingerprint
    assert len(set(seen.values())) == 1


def test_an_error_in_what_is_no_file_names_the_source(tmp_path: Path, home: Path, capfd) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([FORMS["texts"][0], PAIR]))
    command = ["tokenize-data", "--data", tmp_path / "pairs.json", "--tokenizer", home / "hf"]
    command += ["--output", tmp_path / "t"]
    assert run(dispatch, list(map(str, command))) == 2
    check_refusal(capfd.readouterr().err, "prompt-missing", f"{tmp_path / 'pairs.json'}, record 2: ")
    assert not (tmp_path / "t.partial.jsonl").exists()
