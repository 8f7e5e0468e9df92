"""Records on disk: what is accepted, and one line with file:line for what is not."""

import json

import pandas
import pytest
from refusals import refused

from megatron_solopo.data.files.records import read_jsonl, write_jsonl
from megatron_solopo.data.schema import Conversation, PreferenceGroup, read_conversations, read_groups

CHAT = [{"role": "user", "content": "q"}]
GROUP = {"id": "g", "short_messages": CHAT, "long_messages": CHAT, "chosen": "a", "rejected": "b"}
TRL = {"prompt": "q", "chosen": "a", "rejected": "b"}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


WRONG_LINES = {
    "not JSON": ("{'id': 1}", "not-json", "column 2"),
    "half a line": ('{"id": "g", "short_mess', "not-json", "(Invalid control character at column 24)"),
    "list": ([1], "field-type", "one JSON object a line, found list"),
    "not UTF-8": (b'{"id": "\xff"}', "not-utf8", "byte 9"),
    "half of a surrogate pair": ('{"id": "g", "chosen": "smile \\ud83d"}', "surrogate-half", "smile '"),
}
"""What no record can be read of."""

WRONG_GROUPS = {
    "no messages": (
        without(GROUP, "short_messages"),
        "field-missing",
        "'short_messages'",
        "chosen, id, long_messages, rejected",
    ),
    "no chosen": (without(GROUP, "chosen"), "field-missing", "'chosen'"),
    "no rejected": (without(GROUP, "rejected"), "field-missing", "'rejected'"),
    "text for messages": (GROUP | {"short_messages": "q"}, "field-type", "'short_messages'", "list"),
    "no message": (GROUP | {"short_messages": []}, "field-type", "'short_messages'", "non-empty list"),
    "no long message": (GROUP | {"long_messages": []}, "field-type", "'long_messages'", "non-empty list"),
    "text for long messages": (GROUP | {"long_messages": "q"}, "field-type", "'long_messages'", "list"),
    "text for a message": (GROUP | {"short_messages": ["q"]}, "field-type", "short_messages[0]", "'content'"),
    "number for content": (
        GROUP | {"long_messages": [{"role": "user", "content": 1}]},
        "field-type",
        "long_messages[0]",
        "'content'",
    ),
    "unknown role": (
        GROUP | {"short_messages": [*CHAT, {"role": "human", "content": "q"}]},
        "message-role",
        "short_messages[1]",
        "'human'",
        "system, user",
    ),
    "no role": (GROUP | {"short_messages": [{"content": "q"}]}, "message-role", "short_messages[0]", "None"),
    "answered already": (
        GROUP | {"long_messages": [*CHAT, {"role": "assistant", "content": "a"}]},
        "messages-order",
        "long_messages ends",
    ),
    "number for chosen": (GROUP | {"chosen": 3}, "field-type", "'chosen'", "str", "found int"),
    "empty rejected": (GROUP | {"rejected": " \n"}, "pair-without-preference", "'rejected' is empty"),
    "equal responses": (GROUP | {"rejected": "a"}, "pair-without-preference", "chosen and rejected are the same"),
    "text for answers": (GROUP | {"answers": "Paris"}, "field-type", "'answers'", "list", "found str"),
    "list for scores": (GROUP | {"scores": [1.0]}, "field-type", "'scores'", "dict", "found list"),
    "a span of two": (GROUP | {"short_spans": [[0, 1]]}, "field-missing", "'short_spans[0][2]'"),
    "a span beyond the text": (
        GROUP | {"short_spans": [[0, 2, True]]},
        "field-value",
        "short_spans[0] is 0 to 2",
        "1 ",
    ),
    "a number as a flag": (
        GROUP | {"long_spans": [[0, 1, 1]]},
        "field-type",
        "'long_spans[0][2]'",
        "bool",
        "found int",
    ),
    "a text as a number": (GROUP | {"chosen_ids": [1, "2"]}, "field-type", "'chosen_ids[1]'", "int", "found str"),
    "no ids": (GROUP | {"chosen_ids": []}, "field-value", "'chosen_ids'", "non-empty list of token ids"),
    "a list for an id": (GROUP | {"id": ["g"]}, "field-type", "'id'", "str or int", "found list"),
    "TRL, number for prompt": (TRL | {"prompt": 1}, "field-type", "'prompt'", "str or list", "found int"),
    "TRL, another question": (
        TRL | {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
        "pair-prompts-differ",
        "'chosen'",
        "'prompt'",
        "user, assistant",
    ),
    "TRL, user as rejected": (TRL | {"rejected": CHAT}, "messages-order", "'rejected'", "role 'user'"),
    "TRL, no rejected": (without(TRL, "rejected"), "field-missing", "'rejected'"),
}

WRONG_CONVERSATIONS = {
    "no messages": ({"id": "c"}, "field-missing", "'messages'", "(fields found: id)"),
    "nothing": ({}, "field-missing", "'messages'", "(fields found: none)"),
    "no answer": ({"messages": CHAT}, "messages-without-answer", "'messages'"),
    "no prompt": ({"messages": [{"role": "assistant", "content": "a"}]}, "messages-order", "'messages' starts"),
    "null content": (
        {"messages": [*CHAT, {"role": "assistant", "content": None}]},
        "field-type",
        "messages[1]",
        "'content'",
    ),
}


def write(path, record, good):
    """A good record, an empty line, then the wrong one, in line 3."""
    line = record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    return path


@pytest.mark.parametrize("case", WRONG_LINES)
def test_wrong_lines_are_named(case, tmp_path):
    line, code, *named = WRONG_LINES[case]
    path = write(tmp_path / "groups.jsonl", line, GROUP | {"id": "first"})
    with refused(code, f"{path}:3: ", *named):
        list(read_groups(path))


@pytest.mark.parametrize("case", WRONG_GROUPS)
def test_wrong_groups_are_named_by_line(case, tmp_path):
    record, code, *named = WRONG_GROUPS[case]
    path = write(tmp_path / "groups.jsonl", record, GROUP | {"id": "first"})
    with refused(code, f"{path}:3: ", *named):
        list(read_groups(path))


@pytest.mark.parametrize("case", WRONG_CONVERSATIONS)
def test_wrong_conversations_are_named_by_line(case, tmp_path):
    record, code, *named = WRONG_CONVERSATIONS[case]
    good = {"messages": [*CHAT, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "chats.jsonl", record, good)
    with refused(code, f"{path}:3: ", *named):
        list(read_conversations(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_pairs_without_a_preference_are_named_all_at_once(tmp_path, name):
    """Data sets of the hub contain them among tens of thousands; one line names the places of all."""
    rows = [{"prompt": "q", "chosen": f"a{n}", "rejected": "b"} for n in range(60)]
    rows[4] |= {"chosen": "b"}
    rows[7] |= {"rejected": " "}
    path, row = tmp_path / name, "row " if name == "a.parquet" else ""
    if name == "a.parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif name == "a.json":
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        write_jsonl(path, rows)
    groups = read_groups(path)
    assert [next(groups).chosen for _ in range(4)] == ["a0", "a1", "a2", "a3"]
    with refused("pair-without-preference", f"{path}:{row}5: ", "2 such pairs", f"others at {row}8)"):
        next(groups)
    write_jsonl(tmp_path / "b.jsonl", [*rows[:9], *(each | {"chosen": "b"} for each in rows[9:])])
    with refused("pair-without-preference", "b.jsonl:5: ", "53 such pairs", "at 8, 10, ", ", 28, ...)"):
        list(read_groups(tmp_path / "b.jsonl"))


def test_an_id_used_twice_names_both_places(tmp_path):
    path = write(tmp_path / "groups.jsonl", GROUP, GROUP)
    with refused("id-twice", f"{path}:3: ", "'g'", f"{path}:1;"):
        list(read_groups(path))


def test_a_missing_file_is_named(tmp_path):
    with refused("file-missing", "absent.jsonl: "):
        list(read_jsonl(tmp_path / "absent.jsonl"))


def test_groups_come_back_as_they_were_written(tmp_path):
    groups = [
        PreferenceGroup("1", CHAT, CHAT, "東京 a", "b\nc", ["a"], {"chosen": 1.0}, "musique"),
        PreferenceGroup("2", CHAT, None, "x", "y"),
    ]
    assert write_jsonl(tmp_path / "deep" / "groups.jsonl", groups) == 2
    assert list(read_groups(tmp_path / "deep" / "groups.jsonl")) == groups
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["groups.jsonl"]  # nothing left aside
    chats = [Conversation("c", [*CHAT, {"role": "assistant", "content": "a"}])]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    assert list(read_conversations(tmp_path / "chats.jsonl")) == chats


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "groups.jsonl"
    write_jsonl(path, [GROUP])
    with pytest.raises(TypeError):
        write_jsonl(path, [GROUP | {"id": "new"}, {"id": object()}])
    assert [record for _, record in read_jsonl(path)] == [GROUP]


def test_trl_preference_data_is_accepted(tmp_path):
    def answer(text):
        return [{"role": "assistant", "content": text}]

    write_jsonl(tmp_path / "trl.jsonl", [TRL, {"prompt": CHAT, "chosen": answer("a"), "rejected": answer("b")}])
    groups = list(read_groups(tmp_path / "trl.jsonl"))
    assert [(g.short_messages, g.long_messages, g.chosen, g.rejected) for g in groups] == [(CHAT, None, "a", "b")] * 2


def test_a_null_is_an_absent_field(tmp_path):
    names = ("answers", "scores", "source", "question", "short_spans", "long_spans", "chosen_ids", "rejected_ids")
    write_jsonl(tmp_path / "nulls.jsonl", [GROUP | dict.fromkeys(names)])
    write_jsonl(tmp_path / "absent.jsonl", [GROUP])
    assert list(read_groups(tmp_path / "nulls.jsonl")) == list(read_groups(tmp_path / "absent.jsonl"))


def test_records_without_id_are_named_by_their_place(tmp_path):
    path = tmp_path / "groups.jsonl"
    write_jsonl(path, [without(GROUP, "id"), GROUP | {"id": None}, GROUP | {"id": 0}])
    assert [group.id for group in read_groups(path)] == [f"{path}:1", f"{path}:2", "0"]
    assert all(group.answers == [] and group.scores == {} for group in read_groups(path))
