"""Records on disk: what is accepted, and one line with file:line for what is not."""

import json
import re

import pandas
import pytest

from megatron_solopo.data.files.records import read_jsonl, write_jsonl
from megatron_solopo.data.schema import Conversation, PreferenceGroup, read_conversations, read_groups
from megatron_solopo.errors import UserError

CHAT = [{"role": "user", "content": "q"}]
GROUP = {"id": "g", "short_messages": CHAT, "long_messages": CHAT, "chosen": "a", "rejected": "b"}
TRL = {"prompt": "q", "chosen": "a", "rejected": "b"}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


WRONG_GROUPS = {
    "not JSON": ("{'id': 1}", r"not valid JSON \(.* at column 2\); each line must be one JSON object$"),
    "half a line": ('{"id": "g", "short_mess', r"not valid JSON"),
    "list": ([1], r"expected a JSON object, found list$"),
    "not UTF-8": (b'{"id": "\xff"}', r"not UTF-8 \(byte 9 of the line\); save the file as UTF-8$"),
    "half of a surrogate pair": (
        '{"id": "g", "chosen": "smile \\ud83d"}',
        r"the character after '.*smile ' is half of a surrogate pair; repair the text$",
    ),
    "no messages": (
        without(GROUP, "short_messages"),
        r"the field 'short_messages' is missing \(fields found: chosen, id, long_messages, rejected\)$",
    ),
    "no chosen": (without(GROUP, "chosen"), r"the field 'chosen' is missing"),
    "no rejected": (without(GROUP, "rejected"), r"the field 'rejected' is missing"),
    "text for messages": (GROUP | {"short_messages": "q"}, r"the field 'short_messages' must be a non-empty list"),
    "no message": (GROUP | {"short_messages": []}, r"the field 'short_messages' must be a non-empty list"),
    "no long message": (GROUP | {"long_messages": []}, r"the field 'long_messages' must be a non-empty list"),
    "text for long messages": (GROUP | {"long_messages": "q"}, r"the field 'long_messages' must be a non-empty list"),
    "text for a message": (
        GROUP | {"short_messages": ["q"]},
        r"short_messages\[0\] must be an object with a text 'content'$",
    ),
    "number for content": (
        GROUP | {"long_messages": [{"role": "user", "content": 1}]},
        r"long_messages\[0\] must be an object with a text 'content'$",
    ),
    "unknown role": (
        GROUP | {"short_messages": [*CHAT, {"role": "human", "content": "q"}]},
        r"short_messages\[1\] has role 'human'; use one of system, user",
    ),
    "no role": (GROUP | {"short_messages": [{"content": "q"}]}, r"short_messages\[0\] has role None"),
    "answered already": (
        GROUP | {"long_messages": [*CHAT, {"role": "assistant", "content": "a"}]},
        r"long_messages ends with an assistant message",
    ),
    "number for chosen": (GROUP | {"chosen": 3}, r"the field 'chosen' must be str, found int$"),
    "empty rejected": (GROUP | {"rejected": " \n"}, r"'rejected' is empty; a response needs at least one word$"),
    "equal responses": (GROUP | {"rejected": "a"}, r"chosen and rejected are the same text"),
    "text for answers": (GROUP | {"answers": "Paris"}, r"the field 'answers' must be list, found str$"),
    "list for scores": (GROUP | {"scores": [1.0]}, r"the field 'scores' must be dict, found list$"),
    "a span of two": (GROUP | {"short_spans": [[0, 1]]}, r"the field 'short_spans\[0\]\[2\]' is missing$"),
    "a number as a flag": (
        GROUP | {"long_spans": [[0, 1, 1]]},
        r"the field 'long_spans\[0\]\[2\]' must be bool, found",
    ),
    "a text as a number": (GROUP | {"chosen_ids": [1, "2"]}, r"the field 'chosen_ids\[1\]' must be int, found str$"),
    "no ids": (GROUP | {"chosen_ids": []}, r"the field 'chosen_ids' must be a non-empty list of token ids$"),
    "a list for an id": (GROUP | {"id": ["g"]}, r"the field 'id' must be str or int, found list$"),
    "TRL, number for prompt": (TRL | {"prompt": 1}, r"the field 'prompt' must be str or list, found int$"),
    "TRL, another question": (
        TRL | {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
        r"'chosen' must be one assistant message after 'prompt', or a conversation that repeats 'prompt'; found user, "
        r"assistant, with other texts$",
    ),
    "TRL, user as rejected": (TRL | {"rejected": CHAT}, r"'rejected' ends with a message of role 'user', not an ans"),
    "TRL, no rejected": (without(TRL, "rejected"), r"the field 'rejected' is missing"),
}

WRONG_CONVERSATIONS = {
    "no messages": ({"id": "c"}, r"the field 'messages' is missing \(fields found: id\)$"),
    "nothing": ({}, r"the field 'messages' is missing \(fields found: none\)$"),
    "nothing to learn": ({"messages": CHAT}, r"'messages' holds no assistant message"),
    "no prompt": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        r"'messages' starts with an assistant message",
    ),
    "null content": (
        {"messages": [*CHAT, {"role": "assistant", "content": None}]},
        r"messages\[1\] must be an object with a text 'content'$",
    ),
}


def write(path, record, good):
    """A good record, an empty line, then the wrong one: it stands in line 3."""
    line = record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    return path


def check(read, path, pattern):
    with pytest.raises(UserError) as caught:
        list(read(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    assert re.search(pattern, message), message


@pytest.mark.parametrize("case", WRONG_GROUPS)
def test_wrong_groups_are_named_by_line(case, tmp_path):
    record, pattern = WRONG_GROUPS[case]
    check(read_groups, write(tmp_path / "groups.jsonl", record, GROUP | {"id": "first"}), pattern)


@pytest.mark.parametrize("case", WRONG_CONVERSATIONS)
def test_wrong_conversations_are_named_by_line(case, tmp_path):
    record, pattern = WRONG_CONVERSATIONS[case]
    good = {"messages": [*CHAT, {"role": "assistant", "content": "a"}]}
    check(read_conversations, write(tmp_path / "chats.jsonl", record, good), pattern)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_pairs_that_teach_nothing_are_named_all_at_once(tmp_path, name):
    """Data sets of the hub hold some among tens of thousands; one line says where all of them are."""
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
    with pytest.raises(UserError) as error:
        next(groups)
    told = "chosen and rejected are the same text; such a pair teaches nothing, remove it"
    assert str(error.value) == f"{path}:{row}5: {told} (2 such pairs in all, the others at {row}8)"
    write_jsonl(tmp_path / "b.jsonl", [*rows[:9], *(each | {"chosen": "b"} for each in rows[9:])])
    with pytest.raises(
        UserError, match=r"b\.jsonl:5: .*e it \(53 such pairs in all, the others at 8, 10, .*, 28, \.\.\.\)$"
    ):
        list(read_groups(tmp_path / "b.jsonl"))


def test_an_id_used_twice_names_both_places(tmp_path):
    path = write(tmp_path / "groups.jsonl", GROUP, GROUP)
    check(read_groups, path, rf"the id 'g' was used before at {path}:1; ids must be unique$")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent.jsonl: no such file; give the path of a JSONL file$"):
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
