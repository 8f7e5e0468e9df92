"""Token stores: the encoder's examples after any kill of the command, and one line for each mistake."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from option_lines import last_wins
from refusals import refused
from segment_names import scored
from tiny_models import TEMPLATE, WORDS, conversations, preference_groups, write_lines, write_model
from token_data import encoded, tokenize

from megatron_solopo.data.files import records
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import write_records
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.text_facts import AS_READ, text_facts
from megatron_solopo.data.tokenized import make_store, tokenize_data
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, DATA, PAIR, SHORT_PAIR, open_tokens
from megatron_solopo.data.tokenized.token_table import SCHEMAS, TokenTable, record_batch
from megatron_solopo.data.tokenized.tokens import CONVERSATION, Completion, Prompt, TokenDataset, TokenGroup
from megatron_solopo.pack import Context, Side

SHORT, SOLO = SHORT_PAIR, SHORT_PAIR | scored("long_chosen")
FILES = (DATA, "dataset_info.json", "manifest.json", "state.json")


def multi_turn(number: int) -> dict:
    draw = random.Random(number)
    turns = ("user", "assistant") * draw.randint(1, 3)
    return {
        "id": f"m{number}",
        "messages": [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))} for role in turns],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Files of groups, with and without a long context, and of conversations; and their folders, in small parts."""
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


def sha256(data) -> bytes:
    return hashlib.sha256(data).digest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("wanted", [SHORT, BOTH_PAIRS - SHORT, SOLO, BOTH_PAIRS])
def test_a_store_equals_the_encoders_examples(home, wanted):
    """Equal fingerprints too for a store in a cache: a reference cache serves both."""
    limit, path = 20 if wanted == SHORT else 60, home.folder / "groups.jsonl"
    expected, store = (
        encoded(path, home.tokenizer, wanted, limit),
        open_tokens(home.groups, home.facts, wanted, limit, "drop"),
    )
    assert list(store.groups) == expected and len(store.dropped) == 40 - len(expected) > 0
    cached = tokenize(path, home.tokenizer, wanted, limit, "drop")
    assert cached.fingerprint == store.fingerprint and cached.dropped == store.dropped
    assert store.chosen_rejected_lengths() == TokenDataset(expected, [], "").chosen_rejected_lengths()
    assert torch.equal(store.segment_counts(), TokenDataset(expected, [], "").segment_counts())
    assert [len(ids) for g in store.groups for ids in g.sequences()] == [
        len(i) for g in expected for i in g.sequences()
    ]
    for segments in (SHORT, SOLO, scored("long_chosen")):
        if kept := segments & wanted:
            assert list(store.only(kept).groups) == [group.only(kept) for group in expected]


def test_anybody_can_read_a_store(home):
    """`datasets` opens it by mmap, and its columns are plain."""
    rows = datasets.load_from_disk(str(home.groups))
    expected = encoded(home.folder / "groups.jsonl", home.tokenizer, BOTH_PAIRS)
    assert rows.cache_files == [{"filename": str(home.groups / DATA)}] and rows["id"][:] == [g.id for g in expected]
    for row, group in zip(rows, expected, strict=True):
        short, long = group.prompts
        assert (row["short_prompt"], row["long_prompt"]) == (list(short.ids), list(long.ids))
        assert [row["chosen"], row["rejected"]] == [[list(c.ids)] for c in short.completions]
        assert row["long_chosen"] is None and row["long_rejected"] is None  # as on the short context
        assert row["sha256"]["short_prompt"] == sha256(np.int32([len(short.ids), *short.ids]))
    assert set(contents(home.groups)) == set(FILES)


def test_several_responses_of_a_side(tmp_path):
    def prompt(number: int, context: Context) -> Prompt:
        completions = [
            Completion(side, [number, r, 7, *[9] * (context and side)], None, r)
            for side in PAIR for r in range(1 + (number + side) % 3)
        ]  # fmt: skip
        return Prompt(context, list(range(number + 1, 2 * number + 3)), tuple(completions))

    groups = [TokenGroup(f"g{n}", tuple(prompt(n, context) for context in Context)) for n in range(7)]
    path = tmp_path / "data.arrow"
    batches = [record_batch(part, "preference").serialize().to_pybytes() for part in (groups[:3], groups[3:])]
    path.write_bytes(b"".join([SCHEMAS["preference"].serialize().to_pybytes(), *batches]))
    table = TokenTable(path, "preference")
    assert [table.group(row, BOTH_PAIRS) for row in range(7)] == groups
    for side in PAIR:
        of_short, of_long = (table.of_responses(context, side, table.counts) for context in Context)
        assert of_short.tolist() == of_long.tolist() == [1 + (n + side) % 3 for n in range(7)]
    assert table.of_responses(Context.LONG, Side.REJECTED, table.lengths).tolist() == [4] * 7
    assert table.of_responses(Context.LONG, Side.CHOSEN, table.lengths).tolist() == [3] * 7


def test_a_template_may_write_a_response_otherwise_on_the_long_context(home):
    template = home.folder / "by-length.jinja"
    long = "'<user> ' if messages[0].content | length > 100 else ''"  # a text cannot show it
    template.write_text(TEMPLATE.replace("'<assistant> ' + m", f"'<assistant> ' + ({long}) + m"), encoding="utf-8")
    folder = make(home, "groups.jsonl", "by-length", "--chat-template", template)
    tokenizer = load_tokenizer(home.folder / "hf", template)
    dataset = open_tokens(folder, text_facts(home.folder / "hf", tokenizer), BOTH_PAIRS, 400)
    assert list(dataset.groups) == encoded(home.folder / "groups.jsonl", tokenizer, BOTH_PAIRS)
    pairs = [
        (list(short.completions[0].ids), list(long.completions[0].ids))
        for short, long in (g.prompts for g in dataset.groups)
    ]
    assert any(short == long for short, long in pairs) and any(short == long[1:] for short, long in pairs)


def test_conversations_of_several_turns(home):
    store = open_tokens(home.folder / "chats", home.facts, CONVERSATION, 60, "drop")
    assert list(store.groups) == encoded(home.folder / "chats.jsonl", home.tokenizer, CONVERSATION, 60)
    masks = [c.loss_mask for g in store.groups for p in g.prompts for c in p.completions]
    assert any(mask and False in mask for mask in masks) and None in masks


def test_groups_without_a_long_context_serve_the_short_one(home):
    store = open_tokens(home.folder / "short", home.facts, SHORT, 128)
    assert list(store.groups) == encoded(home.folder / "short.jsonl", home.tokenizer, SHORT)
    with refused("long-context-missing", "group 'g1': ", "long_messages", "--context-mode short"):
        open_tokens(home.folder / "short", home.facts, SOLO, 128)


def test_nothing_but_lengths_is_read_before_a_group_is_accessed(home, monkeypatch):
    monkeypatch.setattr(
        "megatron_solopo.data.tokenized.token_table._Stored.__array__", lambda *_, **__: pytest.fail("read")
    )
    store = open_tokens(home.groups, home.facts, BOTH_PAIRS, 1000)
    assert sum(g.tokens(True) for g in store.groups) and max(g.longest for g in store.groups)
    assert store.largest_token[0] < 64 and store.only(SOLO).fingerprint


def test_ids_are_the_pages_of_the_file(home):
    """No copy: the array of a prompt lies in the memory that the file is mapped to."""
    store = open_tokens(home.groups, home.facts, BOTH_PAIRS, 1000)
    ids = np.asarray(store.groups[5].prompts[1].ids)
    mapped = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if DATA in line]
    assert any(int(first, 16) <= ids.ctypes.data < int(last, 16) for first, last in mapped)


def test_parquet_has_the_same_tokens(home):
    write_records(home.folder / "groups.parquet", read_groups(home.folder / "groups.jsonl"))
    make(home, "groups.parquet", "from_parquet")
    tables = [TokenTable(folder / DATA, "preference") for folder in (home.groups, home.folder / "from_parquet")]
    assert tables[0].rows.equals(tables[1].rows) and tables[0].index_sha256() == tables[1].index_sha256()


def _replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def _change_sha256(folder: Path) -> None:
    (digest,) = datasets.load_from_disk(str(folder))["sha256"][39:]
    _replace(DATA, lambda data: data.replace(digest["chosen"], bytes(32)))(folder)


def _earlier(folder: Path) -> None:
    """As an earlier version wrote it, before its manifest."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name in ("tokens.bin", "ids.jsonl"):
        (folder / name).touch()


def _other_token(folder: Path) -> None:
    """One id of the last long prompt is another."""
    ids = np.int32(datasets.load_from_disk(str(folder))["long_prompt"][39])
    changed = np.append(ids[:-1], ids[-1] ^ 1)
    _replace(DATA, lambda data: data.replace(ids.tobytes(), changed.tobytes()))(folder)


DAMAGED = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not-a-token-store", "manifest.json", "JSONL"),
    "half a manifest": (_replace("manifest.json", lambda d: d[:200]), "file-damaged", "manifest.json: "),
    "a foreign manifest": (_manifest(lambda m: m.pop("text")), "file-damaged", "manifest.json: "),
    "an earlier format": (
        _manifest(lambda m: m.update(format=2)),
        "token-store-format",
        "manifest.json: ",
        "format 2",
        "reads 5",
    ),
    "a later format": (
        _manifest(lambda m: m.update(format=6)),
        "token-store-format",
        "manifest.json: ",
        "format 6",
        "reads 5",
    ),
    "IndexedDataset": (_earlier, "not-a-token-store", "manifest.json"),
    "ids cut": (_replace(DATA, lambda d: d[:-8]), "file-damaged", "arrow: has ", " bytes, "),
    "data gone": (lambda f: (f / DATA).unlink(), "file-damaged", "arrow: is missing"),
    "schema changed": (
        _replace(DATA, lambda d: d.replace(b"rejected", b"rejecter", 1)),
        "file-damaged",
        "arrow: ",
        "manifest.json",
    ),
    "name changed": (_replace(DATA, lambda d: d.replace(b"g39", b"g93")), "file-damaged", "arrow: ", "index"),
    "digest changed": (_change_sha256, "file-damaged", "arrow: ", "index", "manifest.json"),
    "other tokenizer": (
        _manifest(lambda m: m["text"]["tokenizer"].update({AS_READ: "0", "tokenizer.json": "0"})),
        "token-store-mismatch",
        "another tokenizer (tokenizer.json differs);",
    ),
    "other files": (
        _manifest(lambda m: m["text"]["tokenizer"].update({AS_READ: "0", "vocab.json": "0"})),
        "token-store-mismatch",
        "another tokenizer (vocab.json differs (only one of them has it))",
    ),
    "other special tokens": (
        _manifest(lambda m: m["text"]["added_tokens"].update({"<think>": 64})),
        "token-store-mismatch",
        "--add-special-tokens (<think>);",
    ),
    "other template": (
        _manifest(lambda m: m["text"].update(chat_template="0")),
        "token-store-mismatch",
        "another chat template;",
    ),
    "other template options": (
        _manifest(lambda m: m["text"].update(chat_template_kwargs={"enable_thinking": False})),
        "token-store-mismatch",
        "--chat-template-kwargs {'enable_thinking': False} where the run has {}",
    ),
    "other end of turn": (
        _manifest(lambda m: m["text"].update(end_of_turn="</s>")),
        "token-store-mismatch",
        "end of turn '</s>' where the run has '<end>'",
    ),
    "other objective": (
        _manifest(lambda m: m.update(objective="sft")),
        "token-store-mismatch",
        "--objective sft, the run has preference",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(home, case, tmp_path):
    damage, code, *named = DAMAGED[case]
    folder = shutil.copytree(home.groups, tmp_path / "copy")
    damage(folder)
    with refused(code, str(folder), *named):
        open_tokens(folder, home.facts, SOLO, 128)


def test_a_changed_token_is_detected_when_its_group_is_read(home, tmp_path):
    folder = shutil.copytree(home.groups, tmp_path / "copy")
    _other_token(folder)
    groups = open_tokens(folder, home.facts, SOLO, 128).groups
    assert list(groups[0].prompts[1].ids) and list(groups[39].prompts[0].ids)
    with refused("file-damaged", "arrow: long_prompt of example 'g39' "):
        build_pack([groups[39]], [39])


def test_the_fingerprint_changes_with_what_is_scored_and_nothing_else(home, tmp_path):
    group = preference_groups(1)[0]
    whole = {name: tokenize(write_lines(tmp_path / "a.jsonl", [group]), home.tokenizer, scores, 128).fingerprint
             for name, scores in (("short", SHORT), ("solo", SOLO), ("both", BOTH_PAIRS))}  # fmt: skip
    other = [{"role": "user", "content": "w7 w8"}]
    changes = {
        "short_messages": (other, {"short", "solo", "both"}),
        "long_messages": (other, {"solo", "both"}),
        "chosen": ("w9", {"short", "solo", "both"}),
        "rejected": ("w9", {"short", "solo", "both"}),
        "id": ("another", set()),
    }
    for field, (value, expected) in changes.items():
        path = write_lines(tmp_path / f"{field}.jsonl", [group | {field: value}])
        now = {name: tokenize(path, home.tokenizer, scores, 128).fingerprint
               for name, scores in (("short", SHORT), ("solo", SOLO), ("both", BOTH_PAIRS))}  # fmt: skip
        assert {name for name in now if now[name] != whole[name]} == expected, field


def test_training_applies_its_limits_to_a_store(home):
    with refused("example-too-long", "--seq-length 60; ", "--overlong drop") as caught:
        open_tokens(home.groups, home.facts, SOLO, 60)
    assert re.search(r"example '\w+' has \d+ tokens", caught.value.message) and "cut" not in caught.value.message
    with refused("example-too-long", "tokenize-data --seq-length 60 --overlong cut"):
        open_tokens(home.groups, home.facts, SOLO, 60, "cut")
    with refused("data-empty", "all 40 ", "--seq-length 2"):
        open_tokens(home.groups, home.facts, SOLO, 2, "drop")


def test_what_was_dropped_is_reported_in_the_folder_and_in_training(home):
    folder = make(home, "groups.jsonl", "dropped", "--seq-length", 60, "--overlong", "drop")
    left_out = open_tokens(home.groups, home.facts, BOTH_PAIRS, 60, "drop").dropped
    assert open_tokens(folder, home.facts, SHORT, 60).dropped == left_out
    listed = json.loads((folder / "manifest.json").read_text())["report"]["dropped"]
    assert [(name, tokens) for name, tokens, _ in listed] == [(d.id, d.tokens) for d in left_out]


WRONG = {
    "no workers": (["--workers", "0"], "option-value", "--workers 0: ", "1"),
    "limit of nothing": (["--seq-length", "1"], "option-value", "--seq-length 1: ", "2"),
    "no limit": (["--overlong", "drop"], "option-unused", "--overlong drop ", "--seq-length"),
    "cut conversations": (
        ["--overlong", "cut", "--seq-length", "9", "--objective", "sft"],
        "option-conflict",
        "--overlong cut with --objective sft: ",
        "drop",
    ),
    "no file": (["--data", "absent.jsonl"], "file-missing", "absent.jsonl: "),
    "chats for groups": (["--objective", "sft"], "field-missing", "groups.jsonl:1: ", "'messages'"),
    "too long": (["--seq-length", "60"], "example-too-long", "groups.jsonl: example 'g", "--seq-length 60"),
    "all too long": (
        ["--seq-length", "2", "--overlong", "drop"],
        "data-empty",
        "groups.jsonl: ",
        "all 40 ",
        "--seq-length 2",
    ),
    "not a folder of ours": (["--output", "hf"], "not-a-token-store", "hf: ", "manifest.json"),
    "another folder of ours": (
        ["--output", "groups", "--seq-length", "300"],
        "output-other-settings",
        "--output groups: ",
        "another options.overlong, options.seq_length;",
    ),
    "started otherwise": (
        ["--output", "started"],
        "unfinished-other-settings",
        "started.partial: ",
        "source.sha256 = '0', now '",
    ),
    "not Parquet": (["--data", "text.parquet"], "not-parquet", "text.parquet: "),
    "same id twice": (["--data", "twice.jsonl"], "id-twice", "twice.jsonl:81: ", "'g0'", "twice.jsonl:1;"),
    "same id twice, dropped": (
        ["--data", "twice.jsonl", "--seq-length", "2", "--overlong", "drop"],
        "id-twice",
        "twice.jsonl:81: ",
        "'g0'",
        "twice.jsonl:1;",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_line(home, case, monkeypatch):
    flags, code, *named = WRONG[case]
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
    Path("started.partial").mkdir(exist_ok=True)
    Path("started.partial/jobs.jsonl").write_text(json.dumps({"settings": settings}) + '\n{"job": 0}\n')
    shutil.rmtree("wrong.partial", ignore_errors=True)
    argv = ["--data", "groups.jsonl", "--output", "wrong", "--tokenizer", "hf", "--workers", "1", *flags]
    with refused(code, *named):
        tokenize_data.main(last_wins(argv))
    assert not Path("wrong").exists()


def test_two_commands_never_write_one_folder(home):
    with Jobs(home.folder / "two.partial", ()), refused("output-in-use", "two.partial: "):
        make(home, "groups.jsonl", "two")
    assert contents(make(home, "groups.jsonl", "two")).keys() == contents(home.groups).keys()


def test_parts_that_were_done_are_not_tokenized_again(home, monkeypatch, capsys):
    monkeypatch.setattr(records, "PART_BYTES", 3000)
    monkeypatch.setattr(make_store, "_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(home, "groups.jsonl", "done")
    monkeypatch.undo()
    monkeypatch.setattr(records, "PART_BYTES", 3000)
    monkeypatch.setattr(make_store, "tokenize_part", lambda *_: pytest.fail("again"))
    assert contents(make(home, "groups.jsonl", "done")) == contents(home.groups)
    assert re.search(r"(\d+) of \1 parts were done before", capsys.readouterr().out)


def test_added_special_tokens_are_part_of_the_folder(home):
    """A folder without them holds their letters where the run has one token."""
    flags, name = ["--add-special-tokens", "<think>"], "thinking"
    groups = [group | {"chosen": "<think> w1"} for group in preference_groups(3)]
    write_lines(home.folder / "think.jsonl", groups)
    make(home, "think.jsonl", name, *flags)
    tokenizer = load_tokenizer(home.folder / "hf", added_tokens="<think>")
    dataset = open_tokens(home.folder / name, text_facts(home.folder / "hf", tokenizer), SOLO, 128)
    assert list(dataset.groups) == encoded(home.folder / "think.jsonl", tokenizer, SOLO)
    assert dataset.largest_token[0] == len(tokenizer) - 1
    with refused("token-store-mismatch", "--add-special-tokens (<think>)"):
        open_tokens(home.folder / name, home.facts, SOLO, 128)


def test_the_manifest_records_the_source_of_the_folder(home):
    manifest, source = json.loads((home.groups / "manifest.json").read_text()), home.folder / "groups.jsonl"
    assert manifest["source"] == {"bytes": source.stat().st_size, "sha256": sha256(source.read_bytes()).hex()}
    assert manifest["text"] == home.facts and manifest["counts"]["examples"] == 40
    sequences = [ids for group in encoded(source, home.tokenizer, BOTH_PAIRS) for ids in group.sequences()]
    assert manifest["largest_token"]["id"] == max(map(max, sequences))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stores(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_a_store_in_the_cache_is_written_once_for_all_methods_and_lengths(home, cache, monkeypatch):
    path = home.folder / "groups.jsonl"
    whole = tokenize(path, home.tokenizer, BOTH_PAIRS, 1000)
    (name,) = stores(cache)
    assert name.startswith("groups-")
    monkeypatch.setattr(make_store, "tokenize_part", lambda *_: pytest.fail("again"))
    assert tokenize(path, home.tokenizer, SHORT, 500).fingerprint == whole.only(SHORT).fingerprint
    with refused(
        "example-too-long", "groups.jsonl: example 'g", "--seq-length 60", "--overlong drop", "--overlong cut"
    ):
        tokenize(path, home.tokenizer, SOLO, 60)
    monkeypatch.undo()


def test_another_source_or_tokenizer_or_a_cut_is_another_store(home, cache):
    path = home.folder / "again.jsonl"
    datasets = []
    for count, tokenizer, *limit in (
        (3, home.tokenizer),
        (4, home.tokenizer),
        (4, load_tokenizer(home.folder / "hf", eos_token="<user>")),
        (4, home.tokenizer, "cut"),
    ):
        write_lines(path, preference_groups(count))
        datasets.append(tokenize(path, tokenizer, SOLO, 100, *limit))
        assert len(stores(cache)) == len(datasets)
    assert [len(tokens.groups) for tokens in datasets] == [3, 4, 4, 4]
    assert len({tokens.fingerprint for tokens in datasets}) == 3  # nothing had to be cut


def test_a_damaged_store_in_the_cache_is_written_again(home, cache):
    path = home.folder / "groups.jsonl"
    whole = tokenize(path, home.tokenizer, BOTH_PAIRS, 1000)
    (name,) = stores(cache)
    (cache / name / "manifest.json").write_text("{")
    assert tokenize(path, home.tokenizer, BOTH_PAIRS, 1000).fingerprint == whole.fingerprint


def test_a_store_of_one_method_is_refused_by_another(home, cache):
    tokenize(home.folder / "groups.jsonl", home.tokenizer, SOLO, 100, "cut")
    (name,) = stores(cache)
    with refused("token-store-mismatch", "short_chosen, short_rejected, long_chosen alone", "long_rejected"):
        open_tokens(cache / name, home.facts, BOTH_PAIRS, 100)


def test_a_cache_that_cannot_be_written_is_named(home, monkeypatch):
    monkeypatch.setenv("SOLOPO_CACHE", str(home.folder / "groups.jsonl" / "below"))
    with refused("write-failed", "--data-cache ", "below: ", "(Not a directory)"):
        tokenize(home.folder / "chats.jsonl", home.tokenizer, CONVERSATION, 100)


@pytest.mark.parametrize(
    ("option", "variables", "expected"),
    [
        ("d", {"SOLOPO_CACHE": "s"}, "d"),
        (None, {"SOLOPO_CACHE": "s", "XDG_CACHE_HOME": "x"}, "s"),
        (None, {"XDG_CACHE_HOME": "x"}, "x/megatron_solopo"),
        (None, {"HOME": "/h"}, "/h/.cache/megatron_solopo"),
    ],
)
def test_where_the_cache_is(option, variables, expected, monkeypatch):
    for name in ("SOLOPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(make_store.cache_folder(option)) == expected
