"""Every command takes options by their full names, each once, and JSON without duplicate keys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from refusals import check_refusal, refused
from tiny_models import preference_groups

from megatron_solopo.cli import COMMANDS, dispatch, run
from megatron_solopo.config import OWNER, flag
from megatron_solopo.data.files.records import read_records
from megatron_solopo.data.text.tokenizer import read_tokenizer
from megatron_solopo.errors import OF_TRANSFORMERS, nearest
from megatron_solopo.json_text import check_json

SHORTENED = {
    "run": (["--dry"], "--dry-run"),
    "train": (["--train-dat", "x"], "--train-data"),
    "prepare-data": (["--short-tok", "3"], "--short-tokens"),
    "sample-responses": (["--sam", "3"], "--samples"),
    "build-pairs": (["--pol=random"], "--policy"),
    "tokenize-data": (["--work", "2"], "--workers"),
    "inspect-data": (["--rand"], "--random"),
    "evaluate": (["--context-doc", "8"], "--context-documents"),
    "report": (["--titl", "x"], "--title"),
    "ask": (["--quest", "x"], "--question"),
    "convert-checkpoint": (["--hf-pat", "x"], "--hf-path"),
    "verify-parallelism": (["--layout", "cp2"], None),
    "benchmark": (["--long-tok", "9"], "--long-tokens"),
    "env": (["--jso"], "--json"),
}
"""Command -> (an abbreviated option, the option that is meant and named)"""

NEEDED = {
    "run": ["--seed", "1", "recipe.yaml"],
    "prepare-data": ["--data", "a", "--tokenizer", "m", "--output", "o"],
    "sample-responses": ["--contexts", "c", "--model", "m", "--output", "o"],
    "build-pairs": ["--contexts", "c", "--responses", "r", "--output", "o"],
    "tokenize-data": ["--data", "t", "--tokenizer", "m", "--output", "o"],
    "inspect-data": ["--data", "d", "--tokenizer", "m"],
    "plan": ["--model", "m", "--gpus", "1", "--long-tokens", "1000"],
    "evaluate": ["--model", "m", "--data", "d", "--output", "o.json", "--context-documents", "8"],
    "report": ["--runs", "r", "--output", "o.md"],
    "ask": ["--model", "m", "--document", "d", "--question", "q"],
    "convert-checkpoint": ["verify", "--hf-path", "m"],
    "verify-parallelism": ["--layouts", "cp2"],
    "benchmark": ["--model", "d64-l2", "--output", "o"],
    "train": ["--hf-path", "m"],
}


def answer(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert run(dispatch, argv) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"launch"}))  # whose options are torchrun's
def test_abbreviated_options_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, meant = SHORTENED.get(command, (["--hel"], ""))  # argparse would print the help
    argv = [command, *NEEDED.get(command, []), *words]
    if command == "verify-parallelism":  # which --layouts would take as its value's end
        argv = [command, "--layouts", "cp2", *words]
    message = check_refusal(answer(capsys, argv), "option-unknown", *([f"mean {meant}?"] if meant else []))
    assert message.startswith(f"{words[0].partition('=')[0]}: ")


@pytest.mark.parametrize("command", NEEDED)
def test_an_option_that_occurs_twice_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = NEEDED[command]
    name = next(text for text in needed if text.startswith("--"))
    for again in ([name, "again"], [f"{name}=again"]):
        assert check_refusal(answer(capsys, [command, *needed, *again]), "option-twice").startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        (["ask", "--mod", "m", "--document", "d", "--question", "q"], "option-unknown", ["--mod:", "mean --model?"]),
        (["convert-checkpoint", "verify", "--hf-pth=m"], "option-unknown", ["--hf-pth:", "mean --hf-path?"]),
        (["inspect-data", "--seq-length", "9"], "option-missing", [": --data, --tokenizer"]),
    ],
)
def test_a_misspelt_name_is_not_called_missing(
    argv: list[str], code: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(answer(capsys, argv), code, *named)


def test_an_option_of_several_values_explains_its_form(capsys: pytest.CaptureFixture[str]) -> None:
    stderr = answer(capsys, ["prepare-data", *NEEDED["prepare-data"], "--data", "b"])
    check_refusal(stderr, "option-twice", "--data: ", "all its values behind one --data")


def test_a_missing_option_or_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample-responses", "--contexts", "c"]
    check_refusal(answer(capsys, argv), "option-missing", ": --output, --model")
    argv = ["sample-responses", *NEEDED["sample-responses"], "--samples", "many"]
    check_refusal(answer(capsys, argv), "option-value", "--samples: ", "int", "'many'")


TWICE = '{"id": "q", "chosen": "a", "chosen": "b"}'


@pytest.mark.parametrize(
    ("name", "text", "where"), [("a.jsonl", f"\n{TWICE}\n", "a.jsonl:2"), ("a.json", f"[\n{TWICE}]", "a.json:2")]
)
def test_a_record_with_a_key_twice_is_refused(name: str, text: str, where: str, tmp_path: Path) -> None:
    from megatron_solopo.data.files.inputs import read_records as read_inputs

    (tmp_path / name).write_text(text)
    read = read_records if name.endswith("l") else lambda path: read_inputs([str(path)])
    with refused("json-key-twice", f"{tmp_path / where}: ", '"chosen"'):
        list(read(tmp_path / name))


def test_a_key_twice_with_one_value_is_read(tmp_path: Path) -> None:
    (group,) = preference_groups(1)
    line = json.dumps(group)
    (tmp_path / "a.jsonl").write_text(line[:-1] + f', "id": {json.dumps(group["id"])}}}')
    assert [record for _, record in read_records(tmp_path / "a.jsonl")] == [json.loads(line)]


@pytest.mark.parametrize(
    ("text", "code", "key"),
    [
        ('{"rms_norm_eps": 1e-5, "rms_norm_eps": 1e-6}', "json-key-twice", '"rms_norm_eps"'),
        ('{"a": {"theta": 1, "theta": 2}}', "json-key-twice", '"theta"'),
        ('{"a": {"theta": NaN}}', "json-nan", "theta is NaN"),
    ],
)
def test_a_model_folder_with_such_a_file_is_refused(text: str, code: str, key: str, tmp_path: Path) -> None:
    from megatron_solopo.conversion.hf_folder import TensorReader
    from megatron_solopo.conversion.sidecar_files import generation_config
    from megatron_solopo.model.hf_config import read_hf_config

    readers = {
        "config.json": read_hf_config,
        "tokenizer_config.json": read_tokenizer,
        "generation_config.json": generation_config,
        "model.safetensors.index.json": TensorReader,
    }
    for name, read in readers.items():
        (tmp_path / name).write_text(text)
        with refused(code, f"{tmp_path / name}: ", key):
            read(tmp_path)


def test_other_numbers_and_broken_files_are_left_to_their_readers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"time_step_limit": [0.0, math.inf], "theta": math.inf}))
    (tmp_path / "b.json").write_text("{")
    check_json(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "absent.json")


def test_only_a_name_that_is_near_is_suggested() -> None:
    options = ["--main-grads-dtype", "--eval-generate", "--lr", "--seq-length", "--lora-rank"]
    assert nearest("--learning-pace", options) == ""  # the nearest shares little more than its dashes
    assert nearest("--seq-lenght", options) == "; did you mean --seq-length?"
    assert nearest("--lora-r", options) == "; did you mean --lora-rank?"


@pytest.mark.parametrize("theirs", OF_TRANSFORMERS)
def test_the_names_of_transformers_lead_to_those_here(theirs: str) -> None:
    name = OF_TRANSFORMERS[theirs].replace("-", "_")
    assert name in OWNER and theirs.replace("-", "_") not in OWNER
    assert nearest(f"--{theirs}", [f"--{OF_TRANSFORMERS[theirs]}", f"--{theirs}s"]).endswith(f"mean {flag(name)}?")
    assert nearest(theirs.replace("-", "_"), [name]).endswith(f"mean {name}?")
