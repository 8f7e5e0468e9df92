"""A YAML file of options for every command, under the command line; and the names that options had before."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import check_refusal, refused
from test_arguments import NEEDED, answer

from megatron_solopo import arguments
from megatron_solopo.arguments import RENAMED, Parser
from megatron_solopo.cli import COMMANDS
from megatron_solopo.config_load import build_parser as training_parser
from megatron_solopo.config_load import load
from megatron_solopo.pipeline import OUTPUTS

WITH_FILE = ("prepare-data", "sample-responses", "build-pairs", "tokenize-data", "evaluate", "report", "ask")
"""Commands whose file is a flat list of their options; that of training has sections."""


def parser_of(command: str) -> Parser:
    return importlib.import_module(COMMANDS[command][0]).build_parser()


def document(argv: list[str]) -> dict[str, Any]:
    """A command line as a file has it."""
    pairs = zip(argv[::2], argv[1::2], strict=True)
    several = ("--data", "--pool", "--runs")
    return {flag[2:].replace("-", "_"): [value] if flag in several else value for flag, value in pairs}


def written(folder: Path, content: Any) -> list[str]:
    (folder / "o.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(folder / "o.yaml")]


@pytest.fixture(autouse=True)
def _warnings_again() -> None:
    arguments._warn.cache_clear()


@pytest.mark.parametrize("command", WITH_FILE)
def test_a_file_means_the_same_as_a_command_line(command: str, tmp_path: Path) -> None:
    argv = NEEDED[command]
    names = document(argv)
    if command == "ask":
        names["model"] = ["m"]
    if command == "tokenize-data":
        names["data"] = "t"
    assert parser_of(command).parse_args(written(tmp_path, names)) == parser_of(command).parse_args(argv)


def test_a_file_of_a_commands_command(tmp_path: Path) -> None:
    convert = parser_of("convert-checkpoint")
    argv = ["hf-to-megatron", "--hf-path", "m", "--save", "s", "--overwrite"]
    file = written(tmp_path, {"hf_path": "m", "save": "s", "overwrite": True})
    assert convert.parse_args([argv[0], *file]) == convert.parse_args(argv)


def test_values_of_every_kind(tmp_path: Path) -> None:
    text = """
        data: [a.jsonl, 'b c.jsonl']
        tokenizer: m
        output: o
        short_tokens: 10      # a number
        gold_depth: 0         # and a text that is one
        drop_gold_fraction: 1e-1
        limit:                # the default
        system_prompt: --data
        chat_template_kwargs: {enable_thinking: false, style: "é"}
    """
    parsed = parser_of("prepare-data").parse_args(written(tmp_path, text))
    assert (parsed.data, parsed.short_tokens, parsed.gold_depth) == (["a.jsonl", "b c.jsonl"], 10, "0")
    assert (parsed.drop_gold_fraction, parsed.limit, parsed.system_prompt) == (0.1, None, "--data")
    assert parsed.chat_template_kwargs == '{"enable_thinking": false, "style": "é"}'
    assert not hasattr(parsed, "config")
    switch = {"contexts": "c", "responses": "r", "output": "o", "keep_unfinished": False}
    assert not parser_of("build-pairs").parse_args(written(tmp_path, switch)).keep_unfinished
    assert parser_of("build-pairs").parse_args(written(tmp_path, switch | {"keep_unfinished": True})).keep_unfinished


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, {"contexts": "c", "model": "m", "output": "o", "samples": 4, "seed": 1})
    parser = parser_of("sample-responses")
    parsed = parser.parse_args([*file, "--samples", "8", "--output=p"])
    assert (parsed.samples, parsed.output, parsed.seed, parsed.contexts) == (8, "p", 1, "c")
    assert {"samples", "output", "seed"} < parser.explicit and "temperature" not in parser.explicit


WRONG = {
    "unknown": ("short_tok: 3", "option-unknown", "1: ", "'short_tok'", "mean short_tokens?"),
    "dashes": ("\nshort-tokens: 3", "option-unknown", "2: ", "'short-tokens'", "mean short_tokens?"),
    "another file": ("config: b.yaml", "option-unknown", "1: config: "),
    "help": ("help: true", "option-unknown", "1: ", "'help'"),
    "no number": ("seed: 1\nlimit: many", "option-value", "2: limit: ", "int", "'many'"),
    "choice": ("evidence: guess", "option-value", "1: evidence: ", "'guess' (choose from 'labels', 'bm25', "),
    "switch for a value": ("limit: true", "option-value", "1: limit: ", "int", "True"),
    "list for a value": ("output: [a, b]", "option-value", "1: output: ", "str", "[a, b]"),
    "mapping for a value": ("output: {a: b}", "option-value", "1: output: ", "str", "{'a': 'b'}"),
    "null": ("seed:", "option-value", "1: seed: ", "(random seed"),
    "null where it is needed": ("output:", "option-value", "1: output: ", "(contexts, JSONL)"),
    "twice": ("seed: 1\nseed: 1", "not-yaml", "2: ", "'seed'"),
    "both names": ("data: a\ninput: b", "option-twice", "2: input: ", "is data", "o.yaml:1: data"),
    "no mapping": ("- a", "yaml-structure", " ", "'name: value'"),
    "no YAML": ("a: [", "not-yaml", "1: ", "expected the node content, but found '<stream end>'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, code, place, *named = WRONG[case]
    file = written(tmp_path, text)
    stderr = answer(capsys, ["prepare-data", *file])
    assert check_refusal(stderr, code, *named).startswith(f"{file[1]}:{place}")
    warned = f"warning: {file[1]}:2: input: is now data" in stderr
    assert stderr.count("\n") == 1 + warned and warned == (case == "both names")


def test_a_mistake_on_the_command_line_does_not_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, {"limit": 3})
    stderr = answer(capsys, ["prepare-data", *NEEDED["prepare-data"], *file, "--limit", "many"])
    assert check_refusal(stderr, "option-value", "int", "'many'").startswith("--limit: ")
    check_refusal(answer(capsys, ["report", "--config", "absent.yaml"]), "file-missing", "--config absent.yaml: ")
    check_refusal(answer(capsys, ["report", "--config"]), "option-value", "--config: ", "one argument")


PAIRS = ["--contexts", "c", "--responses", "r", "--output", "o"]
OLD = {
    "--input is now --data": ("prepare-data", ["--input", "a", "--tokenizer", "m", "--output", "o"]),
    "--num-samples-context is now --sample-on": (
        "sample-responses",
        ["--contexts", "c", "--model", "m", "--output", "o", "--num-samples-context", "long"],
    ),
    "--right-above is now --correct-threshold": ("build-pairs", [*PAIRS, "--right-above", "0.6"]),
    "--wrong-below is now --incorrect-threshold": ("build-pairs", [*PAIRS, "--wrong-below=0.4"]),
    "--train-data is now --data": ("tokenize-data", ["--train-data=a", "--tokenizer", "m", "--output", "o"]),
    "--html is now --output": ("inspect-data", ["--data", "d", "--tokenizer", "m", "--html", "p"]),
    "--force is now --overwrite": (
        "convert-checkpoint",
        ["hf-to-megatron", "--hf-path", "m", "--save", "s", "--force"],
    ),
}
"""Warning -> (command, a command line with the old name)."""


@pytest.mark.parametrize("warning", OLD)
def test_an_old_name_is_accepted_with_a_warning(warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, argv = OLD[warning]
    old, new = warning.split(" is now ")
    assert parser_of(command).parse_args(argv) == parser_of(command).parse_args(
        [text.replace(old, new, 1) if text.startswith(old) else text for text in argv]
    )
    assert capsys.readouterr().err == f"warning: {warning}; the next version drops the old name\n"
    name, value = next((text, argv[i + 1 : i + 2]) for i, text in enumerate(argv) if text.startswith(old))
    if "force" not in name:  # a switch may occur twice
        with refused("option-twice", f"{new}: "):
            parser_of(command).parse_args([*argv, new, *(value or ["x"])])


def test_the_old_name_in_a_runs_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {"model": {"hf_path": "m"}, "data": {"train_data": "t"}, "training": {"train_iters": 1}}
    file = written(tmp_path, sections | {"output": {"save": "run", "save_hf": "hf", "force": True}})
    config, _ = load(file)
    assert config.output.overwrite and "overwrite" in config.explicit
    assert "output.force: is now overwrite" in capsys.readouterr().err
    assert load([*file, "--no-force"])[0].output.overwrite is False


def test_every_renamed_option_is_there_under_its_new_name_only() -> None:
    parsers: dict[str, argparse.ArgumentParser] = {"pretrain_solopo.py": training_parser()}
    for command in (*WITH_FILE, "inspect-data"):
        parsers[command] = parser_of(command)
    convert = parser_of("convert-checkpoint")
    parsers |= next(a.choices for a in convert._actions if isinstance(a, argparse._SubParsersAction))
    for command, names in RENAMED.items():
        known = parsers[command]._option_string_actions
        assert names.keys().isdisjoint(known) and known.keys() >= set(names.values()), command


def test_the_outputs_of_a_recipes_stages_are_options() -> None:
    parsers = [training_parser(), *map(parser_of, WITH_FILE)]
    assert {action.dest for parser in parsers for action in parser._actions} >= set(OUTPUTS)
