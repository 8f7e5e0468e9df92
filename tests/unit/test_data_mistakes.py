"""Mistakes that every data command may meet: outputs over inputs, swapped files, odd bytes, broken templates."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refused
from word_tokenizer import save_word_tokenizer

from megatron_solopo.data.building import prepare_data
from megatron_solopo.data.building.contexts import read_contexts
from megatron_solopo.data.files.inputs import read_records
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.files.records import read_jsonl
from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.pairing import build_pairs
from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized import tokenize_data
from megatron_solopo.evaluation import evaluate, report

COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str], str, list[str]]] = {
    "prepare-data": (
        prepare_data.main,
        [*("--data", "questions.jsonl", "--pool", "pool.jsonl", "--exclude-ids", "ids.txt"), *("--tokenizer", "model")]
        + ["--short-documents", "2", "--long-documents", "3", "--output", "out.jsonl"],
        "--output",
        ["questions.jsonl", "pool.jsonl", "ids.txt"],
    ),
    "prepare-data, listed": (
        prepare_data.main,
        [
            *("--data", "questions.jsonl", "--tokenizer", "model", "--output", "out.jsonl"),
            "--skipped-output",
            "left.jsonl",
        ]
        + ["--short-documents", "2", "--long-documents", "3"],
        "--skipped-output",
        ["questions.jsonl"],
    ),
    "sample-responses": (
        sample_responses.main,
        ["--contexts", "contexts.jsonl", "--model", "model", "--output", "out.jsonl", "--overwrite"],
        "--output",
        ["contexts.jsonl"],
    ),
    "build-pairs": (
        build_pairs.main,
        ["--contexts", "contexts.jsonl", "--responses", "responses.jsonl", "--output", "out.jsonl"],
        "--output",
        ["contexts.jsonl", "responses.jsonl"],
    ),
    "inspect-data": (
        inspect_data.main,
        ["--data", "groups.jsonl", "--tokenizer", "model", "--output", "out.html"],
        "--output",
        ["groups.jsonl"],
    ),
    "evaluate": (
        evaluate.main,
        ["--model", "model", "--data", "questions.jsonl", "--context-documents", "2", "--output", "out.json"],
        "--output",
        ["questions.jsonl"],
    ),
}
"""Command -> (its function, a right call, the option of its output, the files it reads)."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of every kind, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_word_tokenizer(tmp_path / "model", ["a0", "a1", "a2", "b"])
    chat = [{"role": "user", "content": "word word"}]
    questions = [
        {
            "id": f"q{i}",
            "question": f"code of {i}",
            "answer": f"code{i}x",
            "paragraphs": [
                {"title": f"t{i}.{j}", "paragraph_text": f"w{i}{j} code{i}x" if j == 1 else f"w{i}{j}"}
                | {"is_supporting": j == 1}
                for j in range(4)
            ],
        }
        for i in range(3)
    ]
    contexts = [
        {"id": f"q{i}", "question": "?", "answers": [f"a{i}"], "short_messages": chat, "long_messages": chat}
        | {"short_tokens": 5, "long_tokens": 5}
        for i in range(3)
    ]
    groups = [
        {"id": f"q{i}", "short_messages": chat, "long_messages": chat, "chosen": f"a{i}", "rejected": "b"}
        for i in range(3)
    ]
    for name, records in (
        ("questions", questions),
        ("pool", [{"title": "p", "text": "pool"}]),
        ("contexts", contexts),
        ("responses", [{"id": f"q{i}", "responses": [f"a{i}", "b"]} for i in range(3)]),
        ("groups", groups),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("ids.txt").write_text("stranger\n")
    return tmp_path


def with_value(argv: list[str], flag: str, value: str) -> list[str]:
    place = argv.index(flag) + 1
    return [*argv[:place], value, *argv[place + 1 :]]


TEMPLATES = {
    "chat.jinja": ("--chat-template", "chat.jinja", "<assistant>{{ messages[-1].content }}<turn_end>"),
    "document.txt": ("--document-template", "@document.txt", "{text}"),
    "between.txt": ("--document-separator", "@between.txt", "--"),
    "prompt.txt": ("--prompt-template", "@prompt.txt", "{documents} {question}"),
    "system.txt": ("--system-prompt", "@system.txt", "Be brief."),
}
"""File -> (the option that names it, the option's value, what is in it)."""


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, file) for name in ("prepare-data", "prepare-data, listed", "evaluate") for file in TEMPLATES),
        *(("sample-responses", "chat.jinja"), ("inspect-data", "chat.jinja")),
    ],
)
def test_an_output_never_replaces_a_template(here: Path, name: str, file: str) -> None:
    main, argv, flag, _ = COMMANDS[name]
    option, value, text = TEMPLATES[file]
    Path(file).write_text(text)
    with refused("file-overlap", f"{flag} {file}: ", f"of {option} "):
        main([*with_value(argv, flag, file), option, value])
    assert Path(file).read_text() == text


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_never_replaces_another_file(here: Path, name: str) -> None:
    main, argv, flag, read = COMMANDS[name]
    before = {path: path.read_bytes() for path in here.glob("*.*")}
    for source in read:
        with refused("file-overlap", f"{flag} model/../{source}: ", "of --"):
            main(with_value(argv, flag, f"model/../{source}"))
        Path("link").unlink(missing_ok=True)
        Path("link").hardlink_to(source)
        with refused("file-overlap", f"{flag} link: ", "of --"):
            main(with_value(argv, flag, "link"))
        Path("link").unlink()
    with refused("not-a-file", f"{flag} model: "):
        main(with_value(argv, flag, "model"))
    with refused("not-a-folder", f"{flag} ids.txt/new/out: ", "ids.txt is a"):
        main(with_value(argv, flag, "ids.txt/new/out"))
    assert {path: path.read_bytes() for path in here.glob("*.*")} == before


def test_an_output_inside_a_folder_that_is_read_is_refused(here: Path) -> None:
    for folder in (".", "hub:.", "hub:.::train"):
        with refused("folder-overlap", "--output out.jsonl: ", "--data ., "):
            prepare_data.main(with_value(COMMANDS["prepare-data, listed"][1], "--data", folder))
        with refused("folder-overlap", "--output out.jsonl: ", "--pool ., "):
            prepare_data.main(with_value(COMMANDS["prepare-data"][1], "--pool", folder))
        with refused("folder-overlap", "--output out.json: ", "--pool ., "):
            evaluate.main([*COMMANDS["evaluate"][1], "--pool", folder])


def test_a_token_folder_never_replaces_a_file(here: Path) -> None:
    with refused("not-a-folder", "--output groups.jsonl: "):
        tokenize_data.main(["--data", "groups.jsonl", "--tokenizer", "model", "--output", "groups.jsonl"])


FOLDERS = {
    "prepare-data": "--tokenizer",
    "sample-responses": "--model",
    "build-pairs": "--tokenizer",
    "inspect-data": "--tokenizer",
    "evaluate": "--model",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_output_in_a_models_folder_is_refused(here: Path, name: str) -> None:
    """One of its files, a new one, one that a link leads to, and in the folder that the command runs in."""
    main, call, output, _ = COMMANDS[name]
    option = FOLDERS[name]
    if option not in call:
        call = [*call, option, "model"]
    for file in ("model/config.json", "model/new.json"):
        with refused("folder-overlap", f"{output} {file}: ", f"{option} model,"):
            main(with_value(call, output, file))
    stored = (here / "model/tokenizer.json").rename(here / "blob")
    (here / "model/tokenizer.json").symlink_to(stored)  # as in the hub's cache
    with refused("file-overlap", f"{output} blob: ", f"{option} model "):
        main(with_value(call, output, "blob"))
    for file in (here / "model").iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    with refused("folder-overlap", f"{output} ", f"{option} .,"):
        main(with_value(call, option, "."))


@pytest.mark.parametrize("output", [".", "..", "", "/", "model/.."])
def test_an_output_needs_a_name(here: Path, output: str) -> None:
    argv = ["--data", "groups.jsonl", "--tokenizer", "model", "--output", output]
    with refused("option-value", f"--output {output}: "):
        tokenize_data.main(argv)
    for main, argv, flag, _ in COMMANDS.values():
        with refused("not-a-file", f"{flag} {output}: "):
            main(with_value(argv, flag, output))
    with refused("not-a-file", f"--output {output}: "):
        report.main(["--output", output, "--evaluations", "out.json"])


@pytest.mark.parametrize(("side", "share"), [("validation", "0.3"), ("training", "0.6")])
def test_a_side_without_questions_is_refused(here: Path, side: str, share: str) -> None:
    """Evidence beyond the short size is detected after the questions were divided."""
    argv = [*COMMANDS["prepare-data"][1], "--validation-output", "valid.jsonl", "--validation-fraction", share]
    assert prepare_data.main(argv) == 0
    lost = {pair.id for pair in read_contexts("valid.jsonl" if side == "validation" else "out.jsonl")}
    Path("out.jsonl").unlink()
    Path("valid.jsonl").unlink()
    records = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
    for record in records:
        for paragraph in record["paragraphs"]:
            paragraph["is_supporting"] |= record["id"] in lost
    Path("questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with refused(
        "validation-split-empty", f"--validation-fraction {share}: ", f"for {side} ", f"({len(lost)} x more gold"
    ):
        prepare_data.main(argv)
    assert not list(here.glob("out*")) and not Path("valid.jsonl").exists()


@pytest.mark.parametrize("change", [lambda data: codecs.BOM_UTF8 + data, lambda data: data.replace(b"\n", b"\r\n")])
def test_byte_order_marks_and_line_ends_change_nothing(here: Path, change: Callable[[bytes], bytes]) -> None:
    plain = {}
    for name in ("prepare-data", "build-pairs"):
        main, argv, flag, _ = COMMANDS[name]
        assert main(with_value(argv, flag, "plain.jsonl")) == 0
        plain[name] = Path("plain.jsonl").read_bytes()
    for path in here.glob("*.*"):
        path.write_bytes(change(path.read_bytes()))
    for name, expected in plain.items():
        main, argv, flag, _ = COMMANDS[name]
        assert main(with_value(argv, flag, "other.jsonl")) == 0
        assert Path("other.jsonl").read_bytes() == expected
    Path("array.json").write_bytes(
        codecs.BOM_UTF8 + f"[{','.join(Path('questions.jsonl').read_text('utf-8-sig').splitlines())}]".encode()
    )
    argv = with_value(with_value(COMMANDS["prepare-data"][1], "--data", "array.json"), "--output", "array.jsonl")
    assert prepare_data.main(argv) == 0 and Path("array.jsonl").read_bytes() == plain["prepare-data"]


@pytest.mark.parametrize(
    ("line", "reason"), [("[" * 100_000, "recursion"), (f'{{"id": {"9" * 5000}}}', "4300 digits")], ids=["deep", "big"]
)
def test_json_that_python_does_not_read(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{{}}\n{line}\n")
    with refused("not-json", f"{path}:2: ", reason):
        list(read_jsonl(path))
    array = tmp_path / "a.json"
    array.write_text(f"[{{}},\n{line}]")
    with refused("not-json", f"{array}:2: ", reason):
        list(read_records([array]))


@pytest.mark.parametrize(
    ("name", "flag", "value", "code", "named"),
    [
        ("build-pairs", "--contexts", "groups.jsonl", "field-missing", "these are preference groups"),
        ("build-pairs", "--contexts", "responses.jsonl", "field-missing", "these are responses"),
        ("build-pairs", "--responses", "contexts.jsonl", "field-missing", "these are contexts"),
        ("build-pairs", "--contexts", "questions.jsonl", "field-missing", "these are questions of --source musique"),
        ("prepare-data", "--data", "contexts.jsonl", "field-missing", "these are contexts"),
        ("prepare-data", "--pool", "questions.jsonl", "field-missing", "these are questions of --source musique"),
        ("build-pairs", "--contexts", "model", "file-missing", "model: is a folder"),
        ("build-pairs", "--contexts", "empty", "data-empty", "--contexts empty: "),
        ("prepare-data", "--data", "empty", "data-empty", "empty: holds no record"),
        ("prepare-data", "--pool", "empty", "data-empty", "empty: holds no record"),
        ("build-pairs", "--correct-threshold", "nan", "option-value", "--correct-threshold nan: "),
        ("build-pairs", "--scorer", "sys:path", "function-missing", "--scorer sys:path: path "),
        ("prepare-data", "--exclude-ids", "utf16", "not-utf8", "--exclude-ids utf16: not UTF-8 (byte 1)"),
        ("prepare-data", "--document-template", "@utf16", "not-utf8", "--document-template utf16: not UTF-8 (byte 1)"),
        ("prepare-data", "--chat-template", "utf16", "not-utf8", "--chat-template utf16: not UTF-8 (byte 1)"),
        ("prepare-data", "--chat-template", "ids.txt", "chat-template-invalid", "--chat-template ids.txt: "),
        ("prepare-data", "--chat-template", "broken", "chat-template-invalid", "--chat-template broken: line 2: "),
    ],
)
def test_a_file_of_another_kind_is_named(here: Path, name: str, flag: str, value: str, code: str, named: str) -> None:
    Path("empty").touch()
    Path("utf16").write_bytes("text".encode("utf-16"))
    Path("broken").write_text("\n{% for x in %}")
    main, argv, _, _ = COMMANDS[name]
    with refused(code, named):
        main(with_value(argv, flag, value) if flag in argv else [*argv, flag, value])
    assert not Path("out.jsonl").exists() and not list(here.glob("out*"))


def test_a_broken_template_with_values_for_its_variables(here: Path) -> None:
    Path("broken").write_text("{% for x in %}")
    with refused("chat-template-invalid", "broken: line 1: "):
        load_tokenizer("model", "broken", chat_template_kwargs='{"a": 1}')


@pytest.mark.parametrize(
    ("field", "value", "code", "named"),
    [
        ("short_gold", 5, "field-type", "'short_gold' must be list, found int"),
        ("long_gold", ["1"], "field-type", "'long_gold[0]' must be int, found str"),
        ("short_documents", "many", "field-type", "'short_documents' must be int, found str"),
        ("answers", [" "], "field-empty", "'answers'"),
    ],
)
def test_fields_of_contexts_are_checked(here: Path, field: str, value: object, code: str, named: str) -> None:
    record = json.loads(Path("contexts.jsonl").read_text().splitlines()[0])
    Path("wrong.jsonl").write_text(json.dumps(record | {field: value}))
    with refused(code, "wrong.jsonl:1: ", named):
        list(read_contexts("wrong.jsonl"))


def test_a_mistake_before_any_work_leaves_no_settings(here: Path) -> None:
    """The corrected command runs at once, without a folder or a file to delete."""
    argv = ["--data", "contexts.jsonl", "--tokenizer", "model", "--output", "tokens", "--workers", "1"]
    with refused("field-missing", "these are contexts"):
        tokenize_data.main(argv)
    assert not Path("tokens.partial").exists()
    assert tokenize_data.main(with_value(argv, "--data", "groups.jsonl")) == 0
    assert Path("tokens/manifest.json").is_file() and not Path("tokens.partial").exists()


@pytest.mark.parametrize("left", ["", "\0" * 9, '{"settings": {', "no stream"])
def test_work_that_a_power_failure_emptied_is_done_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    main, argv, _, _ = COMMANDS["prepare-data"]
    assert main(argv) == 0
    whole = Path("out.jsonl").read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Jobs, "put", stop)
        main(argv)
    lost = Path("out.jsonl.work", "contexts.jsonl" if left == "no stream" else "jobs.jsonl")
    assert lost.read_bytes()
    lost.write_text("" if left == "no stream" else left)
    Path("out.jsonl").unlink()
    capsys.readouterr()
    assert main(argv) == 0 and Path("out.jsonl").read_bytes() == whole
    assert "resuming" not in capsys.readouterr().out


def test_a_write_that_fails_leaves_nothing_behind(here: Path) -> None:
    for name in ("out.jsonl", "out.parquet"):
        Path("responses.jsonl").write_text(json.dumps({"id": "q0", "responses": ["a0", "a0"]}) + "\n")
        with refused("pairs-none"):
            build_pairs.main(with_value(COMMANDS["build-pairs"][1], "--output", name))
        assert not list(here.glob("out*"))
