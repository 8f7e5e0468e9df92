"""Folders of token ids: the examples that memory holds, whatever kills the command, and one line for the rest."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from option_lines import last_wins
from segment_names import scored
from tiny_models import TEMPLATE, WORDS, conversations, preference_groups, write_lines, write_model

from megatron_solopo.data.files import records
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import write_records
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.text_facts import AS_READ, text_facts
from megatron_solopo.data.tokenized import tokenize_data
from megatron_solopo.data.tokenized.token_store import (
    BOTH_PAIRS,
    SHORT_PAIR,
    learnt_marks,
    learnt_stretches,
    open_tokens,
)
from megatron_solopo.data.tokenized.tokens import CONVERSATION, tokenize
from megatron_solopo.errors import UserError

SHORT, SOLO = SHORT_PAIR, SHORT_PAIR | scored("long_chosen")
FILES = ("digests.bin", "ids.jsonl", "manifest.json", "overlong.jsonl", "tokens.bin", "tokens.idx")


def multi_turn(number: int) -> dict:
    draw = random.Random(number)
    turns = ("user", "assistant") * draw.randint(1, 3)
    return {
        "id": f"m{number}",
        "messages": [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))} for role in turns],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Files of groups, some without a long context, and of conversations; and folders made from them in small parts."""
    folder = tmp_path_factory.mktemp("home")
    write_model(folder / "hf")
    write_lines(folder / "groups.jsonl", preference_groups(40))
    write_lines(folder / "chats.jsonl", [*conversations(5), *map(multi_turn, range(20))])
    short = [group | ({"long_messages": None} if n % 3 else {}) for n, group in enumerate(preference_groups(9))]
    write_lines(folder / "short.jsonl", short)
    tokenizer = load_tokenizer(folder / "hf")
    here = SimpleNamespace(
        folder=folder, tokenizer=tokenizer, facts=text_facts(folder / "hf", tokenizer), groups=folder / "groups"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PART_BYTES", 3000)
        for name, more in (("groups", ()), ("chats", ("--objective", "sft")), ("short", ())):
            make(here, f"{name}.jsonl", name, *more)
    return here


def make(home, data: str, output: str, *more: str) -> Path:
    argv = ["--data", home.folder / data, "--output", home.folder / output, "--tokenizer", home.folder / "hf"]
    assert tokenize_data.main([*map(str, argv), "--workers", "1", *map(str, more)]) == 0
    assert not (home.folder / f"{output}.partial").exists()
    return home.folder / output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("wanted", [SHORT, BOTH_PAIRS - SHORT, SOLO, BOTH_PAIRS])
def test_a_folder_holds_what_is_tokenised_in_memory(home, wanted):
    """Equal fingerprints too: a reference cache serves both."""
    limit = 20 if wanted == SHORT else 60
    memory = tokenize(home.folder / "groups.jsonl", home.tokenizer, wanted, limit, "drop")
    folder = open_tokens(home.groups, home.facts, wanted, limit, "drop")
    assert memory.dropped and folder.dropped == memory.dropped
    assert list(folder.groups) == memory.groups and folder.fingerprint == memory.fingerprint
    assert folder.chosen_rejected_lengths() == memory.chosen_rejected_lengths()
    assert [len(ids) for g in folder.groups for ids in g.sequences()] == [
        len(ids) for g in memory.groups for ids in g.sequences()
    ]
    for some in (SHORT, SOLO, scored("long_chosen")):
        if kept := some & wanted:
            assert folder.only(kept).fingerprint == memory.only(kept).fingerprint
            assert list(folder.only(kept).groups) == memory.only(kept).groups


def test_a_template_may_write_a_response_otherwise_on_the_long_context(home):
    template = home.folder / "by-length.jinja"
    long = "'<user> ' if messages[0].content | length > 100 else ''"  # a text cannot show it
    template.write_text(TEMPLATE.replace("'<assistant> ' + m", f"'<assistant> ' + ({long}) + m"), encoding="utf-8")
    folder = make(home, "groups.jsonl", "by-length", "--chat-template", template)
    tokenizer = load_tokenizer(home.folder / "hf", template)
    memory = tokenize(home.folder / "groups.jsonl", tokenizer, BOTH_PAIRS, 400)
    found = open_tokens(folder, text_facts(home.folder / "hf", tokenizer), BOTH_PAIRS, 400)
    assert list(found.groups) == memory.groups
    pairs = [
        (list(short.continuations[0].ids), list(long.continuations[0].ids))
        for short, long in (g.prompts for g in found.groups)
    ]
    assert any(short == long for short, long in pairs) and any(short == long[1:] for short, long in pairs)


def test_conversations_of_several_turns(home):
    memory = tokenize(home.folder / "chats.jsonl", home.tokenizer, CONVERSATION, 60, "drop")
    folder = open_tokens(home.folder / "chats", home.facts, CONVERSATION, 60, "drop")
    assert list(folder.groups) == memory.groups and folder.fingerprint == memory.fingerprint
    learnt = [c.learnt for g in folder.groups for p in g.prompts for c in p.continuations]
    assert any(marks and False in marks for marks in learnt) and None in learnt


def test_groups_without_a_long_context_serve_the_short_one(home):
    memory = tokenize(home.folder / "short.jsonl", home.tokenizer, SHORT, 128)
    folder = open_tokens(home.folder / "short", home.facts, SHORT, 128)
    assert list(folder.groups) == memory.groups and folder.fingerprint == memory.fingerprint
    with pytest.raises(UserError, match=r"group 'g1': no long_messages; .*--context-mode short$"):
        open_tokens(home.folder / "short", home.facts, SOLO, 128)


def test_megatrons_own_reader_sees_one_document_a_group(home):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = IndexedDataset(str(home.groups / "tokens"))
    documents = [
        np.concatenate([found[i] for i in range(first, last)]).tolist()
        for first, last in zip(found.document_indices[:-1], found.document_indices[1:], strict=True)
    ]
    memory = tokenize(home.folder / "groups.jsonl", home.tokenizer, BOTH_PAIRS, 1000)
    for document, group in zip(documents, memory.groups, strict=True):
        short, long = group.prompts
        # The long context's responses are the short one's, and stored once.
        answers = [i for c in short.continuations for i in c.ids]
        assert answers == [i for c in long.continuations for i in c.ids]
        assert document == [*short.ids, *answers, *long.ids]
    assert set(contents(home.groups)) == set(FILES)


def test_nothing_but_lengths_is_read_before_a_group_is_looked_at(home, monkeypatch):
    monkeypatch.setattr(
        "megatron_solopo.data.tokenized.token_store.StoredIds.ids", property(lambda ids: pytest.fail("read"))
    )
    folder = open_tokens(home.groups, home.facts, BOTH_PAIRS, 1000)
    assert sum(g.tokens(True) for g in folder.groups) and max(g.longest for g in folder.groups)
    assert folder.largest_token()[0] < 64 and folder.only(SOLO).fingerprint


def test_parquet_gives_the_same_tokens(home):
    write_records(home.folder / "groups.parquet", read_groups(home.folder / "groups.jsonl"))
    make(home, "groups.parquet", "from_parquet")
    for name in set(FILES) - {"manifest.json"}:
        assert (home.folder / "from_parquet" / name).read_bytes() == (home.groups / name).read_bytes()


def _replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


DAMAGED = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"a folder without manifest.json; give a JSONL or"),
    "half a manifest": (_replace("manifest.json", lambda d: d[:200]), r"manifest.json: not a manifest of solopo"),
    "a foreign manifest": (_manifest(lambda m: m.pop("text")), r"manifest.json: not a manifest of solopo"),
    "an earlier format": (_manifest(lambda m: m.update(format=1)), r"of format 1, this version reads 2; tokenise ag"),
    "a later format": (_manifest(lambda m: m.update(format=3)), r"of format 3, this version reads 2; tokenise again$"),
    "tokens cut": (_replace("tokens.bin", lambda d: d[:-8]), r"tokens.bin: has [\d,]+ bytes, [\d,]+ were written"),
    "index changed": (_replace("tokens.idx", _flip), r"tokens.idx: not what was written \(its sha256"),
    "digests cut": (_replace("digests.bin", lambda d: d[:-32]), r"digests.bin: has [\d,]+ bytes"),
    "ids gone": (lambda f: (f / "ids.jsonl").unlink(), r"ids.jsonl: is missing; copy it again"),
    "other tokenizer": (
        _manifest(lambda m: m["text"]["tokenizer"].update({AS_READ: "0", "tokenizer.json": "0"})),
        r"made with another tokenizer \(tokenizer.json differs\); train with what it was made with",
    ),
    "other files": (
        _manifest(lambda m: m["text"]["tokenizer"].update({AS_READ: "0", "vocab.json": "0"})),
        r"another tokenizer \(vocab.json differs \(only one of them has it\)\)",
    ),
    "other special tokens": (
        _manifest(lambda m: m["text"]["added_tokens"].update({"<think>": 64})),
        r"made with other --add-special-tokens \(<think>\); train with what it was made with",
    ),
    "other template": (_manifest(lambda m: m["text"].update(chat_template="0")), r"made with another chat template;"),
    "other template options": (
        _manifest(lambda m: m["text"].update(chat_template_kwargs={"enable_thinking": False})),
        r"made with --chat-template-kwargs \{'enable_thinking': False\} where the run has \{\}",
    ),
    "other end of turn": (
        _manifest(lambda m: m["text"].update(end_of_turn="</s>")),
        r"made with end of turn '</s>' where the run has '<end>'",
    ),
    "other objective": (
        _manifest(lambda m: m.update(objective="sft")),
        r"holds data of --objective sft, the run has preference$",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(home, case, tmp_path):
    damage, pattern = DAMAGED[case]
    folder = shutil.copytree(home.groups, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=pattern) as caught:
        open_tokens(folder, home.facts, SOLO, 128)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_token_is_found_when_its_group_is_looked_at(home, tmp_path):
    folder = shutil.copytree(home.groups, tmp_path / "copy")
    _replace("tokens.bin", _flip)(folder)  # of the last long prompt
    groups = open_tokens(folder, home.facts, SOLO, 128).groups
    assert list(groups[0].prompts[1].ids)
    with pytest.raises(UserError, match=r"long_prompt of group 'g39' is not what was written; .*tokens.bin"):
        list(groups[39].prompts[1].ids)


def test_limits_of_training_are_its_own(home):
    with pytest.raises(UserError, match=r"example '\w+' has \d+ tokens, above --seq-length 60; .*--overlong drop$"):
        open_tokens(home.groups, home.facts, SOLO, 60)
    with pytest.raises(UserError, match=r"tokenize-data --seq-length 60 --overlong cut$"):
        open_tokens(home.groups, home.facts, SOLO, 60, "cut")
    with pytest.raises(UserError, match=r"no usable example; all 40 are longer than --seq-length 2"):
        open_tokens(home.groups, home.facts, SOLO, 2, "drop")


def test_what_was_dropped_is_listed_in_the_folder_and_in_training(home):
    folder = make(home, "groups.jsonl", "dropped", "--seq-length", 60, "--overlong", "drop")
    memory = tokenize(home.folder / "groups.jsonl", home.tokenizer, BOTH_PAIRS, 60, "drop")
    assert open_tokens(folder, home.facts, SHORT, 60).dropped == memory.dropped
    listed = [json.loads(line) for line in (folder / "overlong.jsonl").read_text().splitlines()]
    assert [(record["id"], record["tokens"]) for record in listed] == [(d.id, d.tokens) for d in memory.dropped]


WRONG = {
    "no workers": (["--workers", "0"], r"--workers 0: give a number of at least 1$"),
    "limit of nothing": (["--seq-length", "1"], r"--seq-length 1: give a number of at least 2$"),
    "no limit": (["--overlong", "drop"], r"--overlong drop would have no effect: it needs --seq-length$"),
    "cut conversations": (
        ["--overlong", "cut", "--seq-length", "9", "--objective", "sft"],
        r"conversations have no documents to cut; take drop$",
    ),
    "no file": (["--data", "absent.jsonl"], r"absent.jsonl: no such file; give the path of a JSONL or Parquet"),
    "chats for groups": (["--objective", "sft"], r"groups.jsonl:1: the field 'messages' is missing"),
    "too long": (["--seq-length", "60"], r"groups.jsonl: example 'g\d+' has \d+ tokens, above --seq-length 60"),
    "all too long": (["--seq-length", "2", "--overlong", "drop"], r"no usable example; all 40 are longer"),
    "not a folder of ours": (["--output", "hf"], r"hf: a folder without manifest.json"),
    "another folder of ours": (
        ["--output", "groups", "--seq-length", "300"],
        r"is there already, made with another options.overlong, options.seq_length; give another name, or delete it$",
    ),
    "begun otherwise": (
        ["--output", "begun"],
        r"begun.partial: begun with source.sha256 = '0', now '\w{64}'; repeat the first",
    ),
    "not Parquet": (["--data", "text.parquet"], r"text.parquet: not a Parquet file"),
    "same id twice": (["--data", "twice.jsonl"], r"twice.jsonl:81: the id 'g0' was used before at .*:1; ids"),
    "same id twice, dropped": (
        ["--data", "twice.jsonl", "--seq-length", "2", "--overlong", "drop"],
        r"twice.jsonl:81: the id 'g0' was used before at .*:1; ids",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_line(home, case, monkeypatch):
    flags, pattern = WRONG[case]
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(records, "PART_BYTES", 3000)
    Path("text.parquet").write_text("id,chosen\n")
    lines = Path("groups.jsonl").read_text().splitlines()
    Path("twice.jsonl").write_text("\n\n".join([*lines, lines[0]]))
    settings = {"source": {"sha256": "0"}} | {
        key: value
        for key, value in json.loads(Path("groups/manifest.json").read_text()).items()
        if key in ("format", "version", "objective", "options", "text")
    }
    settings["source"]["bytes"] = Path("groups.jsonl").stat().st_size
    Path("begun.partial").mkdir(exist_ok=True)
    Path("begun.partial/jobs.jsonl").write_text(json.dumps({"settings": settings}) + '\n{"job": 0}\n')
    shutil.rmtree("wrong.partial", ignore_errors=True)
    argv = ["--data", "groups.jsonl", "--output", "wrong", "--tokenizer", "hf", "--workers", "1", *flags]
    with pytest.raises(UserError, match=pattern) as caught:
        tokenize_data.main(last_wins(argv))
    assert "\n" not in str(caught.value) and not Path("wrong").exists()


def test_two_commands_never_write_one_folder(home):
    with Jobs(home.folder / "two.partial", ()), pytest.raises(UserError, match=r"two.partial: another process is"):
        make(home, "groups.jsonl", "two")
    assert contents(make(home, "groups.jsonl", "two")).keys() == contents(home.groups).keys()


def test_parts_that_were_done_are_not_tokenized_again(home, monkeypatch, capsys):
    monkeypatch.setattr(records, "PART_BYTES", 3000)
    monkeypatch.setattr(tokenize_data, "_complete", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(home, "groups.jsonl", "done")
    monkeypatch.undo()
    monkeypatch.setattr(records, "PART_BYTES", 3000)
    monkeypatch.setattr(tokenize_data, "tokenize_part", lambda *_: pytest.fail("again"))
    assert contents(make(home, "groups.jsonl", "done")) == contents(home.groups)
    assert re.search(r"(\d+) of \1 parts were done before", capsys.readouterr().out)


@pytest.mark.parametrize("seed", range(20))
def test_marks_come_back_from_their_stretches(seed):
    draw = random.Random(seed)
    marks = [draw.random() < 0.7 for _ in range(draw.randint(1, 40))]
    stretches = learnt_stretches(marks)
    assert learnt_marks(stretches) == marks and 0 not in stretches[1:]


def test_added_special_tokens_are_part_of_the_folder(home):
    """A folder without them holds their letters where the run has one token."""
    flags, name = ["--add-special-tokens", "<think>"], "thinking"
    groups = [group | {"chosen": "<think> w1"} for group in preference_groups(3)]
    write_lines(home.folder / "think.jsonl", groups)
    make(home, "think.jsonl", name, *flags)
    tokenizer = load_tokenizer(home.folder / "hf", added_tokens="<think>")
    memory = tokenize(home.folder / "think.jsonl", tokenizer, SOLO, 128)
    found = open_tokens(home.folder / name, text_facts(home.folder / "hf", tokenizer), SOLO, 128)
    assert found.fingerprint == memory.fingerprint and found.largest_token()[0] == len(tokenizer) - 1
    with pytest.raises(UserError, match=r"other --add-special-tokens \(<think>\)"):
        open_tokens(home.folder / name, home.facts, SOLO, 128)


def test_the_manifest_tells_what_the_folder_was_made_from(home):
    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    manifest = json.loads((home.groups / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == sha256(home.folder / "groups.jsonl")
    assert manifest["files"]["tokens.bin"]["sha256"] == sha256(home.groups / "tokens.bin")
    assert manifest["text"] == home.facts and manifest["counts"]["groups"] == 40
    memory = tokenize(home.folder / "groups.jsonl", home.tokenizer, BOTH_PAIRS, 1000)
    assert manifest["largest_token"]["id"] == memory.largest_token()[0]
