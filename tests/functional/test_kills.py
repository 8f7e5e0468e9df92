"""Every resumable command, killed at changes of its files all over its life: the same bytes as of an unbroken run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import command_killed_at
from tiny_models import preference_groups, write_lines, write_model

KILLS = 5
"""How many moments of a run, evenly over it, its first and last change among them."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions, contexts and preference groups."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "hf")
    groups = preference_groups(12)
    write_lines(folder / "groups.jsonl", groups)
    questions, contexts = [], []
    for number, group in enumerate(groups):
        texts = [f"w{number} w{number + 12} w{place + 24}" for place in range(3)]
        documents = [{"text": text, "is_supporting": place == 0} for place, text in enumerate(texts)]
        questions.append({"id": f"q{number}", "question": texts[0] + " w9", "answer": texts[0], "documents": documents})
        chats = {name: group[name] for name in ("short_messages", "long_messages")}
        lengths = {"short_tokens": 5, "long_tokens": 9}
        contexts.append({"id": f"q{number}", "question": "w1", "answers": ["w1"], "source": "", **chats, **lengths})
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "contexts.jsonl", contexts)
    write_lines(folder / "responses.jsonl", [{"id": f"q{n}", "responses": ["w1 w2", f"w{n}"]} for n in range(12)])
    return folder


def commands(inputs: Path, output: Path) -> dict[str, tuple[str, list[str]]]:
    """Module and command line of each resumable command."""
    hf, to_output = str(inputs / "hf"), ["--output", str(output)]
    questions = str(inputs / "questions.jsonl")
    build = ["--source", "jsonl", "--data", questions, "--tokenizer", hf, "--short-documents", "1"]
    build += ["--long-documents", "2", "--skipped-output", f"{output}.left", "--validation-fraction", "0.3"]
    build += ["--validation-output", f"{output}.valid"]
    sample = ["--contexts", str(inputs / "contexts.jsonl"), "--model", hf, "--samples", "2", "--max-new-tokens", "3"]
    tokenize = ["--train-data", str(inputs / "groups.jsonl"), "--tokenizer", hf, "--workers", "1"]
    ask = ["--model", hf, "--data", questions, "--source", "jsonl", "--context-documents", "1,2"]
    ask += ["--max-new-tokens", "3", "--batch-tokens", "40", "--device", "cpu"]
    pair = ["--contexts", str(inputs / "contexts.jsonl"), "--responses", str(inputs / "responses.jsonl")]
    return {
        "build-pairs": ("megatron_solopo.data.pairing.build_pairs", [*pair, *to_output, "--scorer", "own_judge:judge"]),
        "prepare-data": ("megatron_solopo.data.building.prepare_data", [*build, *to_output]),
        "prepare-data --workers 2": (
            "megatron_solopo.data.building.prepare_data",
            [*build, *to_output, "--workers", "2"],
        ),
        "sample-responses": (
            "megatron_solopo.data.sampling.sample_responses",
            [*sample, *to_output, "--device", "cpu"],
        ),
        "tokenize-data": ("megatron_solopo.data.tokenized.tokenize_data", [*tokenize, *to_output]),
        "evaluate": ("megatron_solopo.evaluation.evaluate", [*ask, *to_output]),
    }


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def finished(folder: Path) -> set[str]:
    """The lines of finished jobs on disk, but one that a kill cut."""
    logs = [path for path in folder.rglob("*") if path.name == "jobs.jsonl" or path.name == "target.partial"]
    lines = [line for log in logs if log.is_file() for line in log.read_text().split("\n")[1:-1]]
    return {json.dumps(json.loads(line)["job"]) for line in lines}


@pytest.mark.parametrize("name", commands(Path(), Path()))
def test_a_killed_command_resumes_to_the_same_bytes(inputs: Path, tmp_path: Path, name: str) -> None:
    folder, report = tmp_path / "out", tmp_path / "report"
    module, argv = commands(inputs, folder / "target")[name]
    folder.mkdir()
    assert command_killed_at(0, folder, module, argv, report) == 0, report.read_text()
    changes = int(re.search(r"changes: (\d+)", report.read_text())[1])
    whole = dict(files(folder))
    assert changes > 2 * KILLS
    most = 0
    for number in range(KILLS):
        moment = 1 + (changes - 1) * number // (KILLS - 1)
        shutil.rmtree(folder)
        folder.mkdir()
        assert command_killed_at(moment, folder, module, argv, report) == -9
        kept = finished(folder)
        most = max(most, len(kept))
        if number == KILLS // 2:  # killed again soon after: what was finished stays finished
            assert command_killed_at(4, folder, module, argv, report) == -9
            assert kept <= finished(folder)
        assert command_killed_at(0, folder, module, argv, report) == 0, (moment, report.read_text())
        assert dict(files(folder)) == whole, moment
    assert most > 3
