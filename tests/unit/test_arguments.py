"""Every command takes options by their full names, each once, and JSON whose keys stand once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_models import preference_groups

from megatron_solopo.cli import COMMANDS, dispatch, run
from megatron_solopo.data.files.records import read_records
from megatron_solopo.data.text.tokenizer import read_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json

SHORTENED = {
    "run": (["--dry"], "--dry: unknown option; did you mean --dry-run?"),
    "train": (["--train-dat", "x"], "--train-dat: unknown option; did you mean --train-data?"),
    "prepare-data": (["--short-tok", "3"], "--short-tok: unknown option; did you mean --short-tokens?"),
    "sample-responses": (["--sam", "3"], "--sam: unknown option; did you mean --samples?"),
    "build-pairs": (["--pol=random"], "--pol: unknown option; did you mean --policy?"),
    "tokenize-data": (["--work", "2"], "--work: unknown option; did you mean --workers?"),
    "inspect-data": (["--rand"], "--rand: unknown option; did you mean --random?"),
    "evaluate": (["--context-doc", "8"], "--context-doc: unknown option; did you mean --context-documents?"),
    "report": (["--titl", "x"], "--titl: unknown option; did you mean --title?"),
    "ask": (["--quest", "x"], "--quest: unknown option; did you mean --question?"),
    "convert-checkpoint": (["--hf-pat", "x"], "--hf-pat: unknown option; did you mean --hf-path?"),
    "verify-parallelism": (["--layout", "cp2"], "--layout: unknown option"),
    "env": (["--jso"], "--jso: unknown option; did you mean --json?"),
}

NEEDED = {
    "run": ["--seed", "1", "recipe.yaml"],
    "prepare-data": ["--data", "a", "--tokenizer", "m", "--output", "o"],
    "sample-responses": ["--contexts", "c", "--model", "m", "--output", "o"],
    "build-pairs": ["--contexts", "c", "--responses", "r", "--output", "o"],
    "tokenize-data": ["--data", "t", "--tokenizer", "m", "--output", "o"],
    "inspect-data": ["--data", "d", "--tokenizer", "m"],
    "evaluate": ["--model", "m", "--data", "d", "--output", "o.json", "--context-documents", "8"],
    "report": ["--runs", "r", "--output", "o.md"],
    "ask": ["--model", "m", "--document", "d", "--question", "q"],
    "convert-checkpoint": ["verify", "--hf-path", "m"],
    "verify-parallelism": ["--layouts", "cp2"],
    "train": ["--hf-path", "m"],
}


def answer(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert run(dispatch, argv) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"launch"}))  # whose options are torchrun's
def test_the_beginning_of_a_name_is_no_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, expected = SHORTENED[command]
    argv = [command, *NEEDED.get(command, []), *given]
    if command == "verify-parallelism":  # which --layouts would take as its value's end
        argv = [command, "--layouts", "cp2", *given]
    told = answer(capsys, argv)
    assert told.startswith(f"error: {expected}") and told.count("\n") == 1


@pytest.mark.parametrize("command", NEEDED)
def test_an_option_given_twice_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = NEEDED[command]
    name = next(text for text in needed if text.startswith("--"))
    assert answer(capsys, [command, *needed, name, "again"]).startswith(f"error: {name}: given twice; give ")
    assert answer(capsys, [command, *needed, f"{name}=again"]).startswith(f"error: {name}: given twice; give ")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["ask", "--mod", "m", "--document", "d", "--question", "q"], "--mod: unknown option; did you mean --model?"),
        (["convert-checkpoint", "verify", "--hf-pth=m"], "--hf-pth: unknown option; did you mean --hf-path?"),
        (["inspect-data", "--seq-length", "9"], "the following arguments are required: --data, --tokenizer"),
    ],
)
def test_a_misspelt_name_is_not_called_missing(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, argv) == f"error: {line}\n"


def test_an_option_of_several_values_says_how_to_give_them(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, ["prepare-data", *NEEDED["prepare-data"], "--data", "b"])
    assert told == "error: --data: given twice; give all its values behind one --data\n"


def test_what_is_missing_or_no_value_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample-responses", "--contexts", "c"]
    assert answer(capsys, argv) == "error: the following arguments are required: --output, --model\n"
    argv = ["sample-responses", *NEEDED["sample-responses"], "--samples", "many"]
    assert answer(capsys, argv) == "error: --samples: invalid int value: 'many'\n"


TWICE = '{"id": "q", "chosen": "a", "chosen": "b"}'


@pytest.mark.parametrize(
    ("name", "text", "where"), [("a.jsonl", f"\n{TWICE}\n", "a.jsonl:2"), ("a.json", f"[\n{TWICE}]", "a.json:2")]
)
def test_a_record_whose_key_stands_twice_is_refused(name: str, text: str, where: str, tmp_path: Path) -> None:
    from megatron_solopo.data.files.inputs import read_records as read_inputs

    (tmp_path / name).write_text(text)
    read = read_records if name.endswith("l") else lambda path: read_inputs([str(path)])
    with pytest.raises(UserError, match=f'{where}: cannot be read .the key "chosen" is given twice, with two values'):
        list(read(tmp_path / name))


def test_a_key_that_stands_twice_with_one_value_is_read(tmp_path: Path) -> None:
    (group,) = preference_groups(1)
    line = json.dumps(group)
    (tmp_path / "a.jsonl").write_text(line[:-1] + f', "id": {json.dumps(group["id"])}}}')
    assert [record for _, record in read_records(tmp_path / "a.jsonl")] == [json.loads(line)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"rms_norm_eps": 1e-5, "rms_norm_eps": 1e-6}', 'the key "rms_norm_eps" is given twice, with two values'),
        ('{"a": {"theta": 1, "theta": 2}}', 'the key "theta" is given twice'),
        ('{"a": {"theta": NaN}}', "theta is NaN"),
    ],
)
def test_a_model_folder_with_such_a_file_is_refused(text: str, told: str, tmp_path: Path) -> None:
    from megatron_solopo.conversion.companions import generation_config
    from megatron_solopo.conversion.hf_folder import TensorReader
    from megatron_solopo.model.hf_config import read_hf_config

    readers = {
        "config.json": read_hf_config,
        "tokenizer_config.json": read_tokenizer,
        "generation_config.json": generation_config,
        "model.safetensors.index.json": TensorReader,
    }
    for name, read in readers.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"^{tmp_path / name}: {told}"):
            read(tmp_path)


def test_other_numbers_and_broken_files_are_left_to_their_readers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"time_step_limit": [0.0, math.inf], "theta": math.inf}))
    (tmp_path / "b.json").write_text("{")
    check_json(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "absent.json")
