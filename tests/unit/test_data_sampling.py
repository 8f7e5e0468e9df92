"""What sample-responses writes, and a run killed with SIGKILL against one that was not."""

from __future__ import annotations

import json
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from sampling_models import END, command, folder

from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import Responses, SampledJobs, read_responses
from megatron_solopo.data.sampling.sample_responses import main
from megatron_solopo.data.sampling.sampled import Statistics, from_ids
from megatron_solopo.data.text.chat import load_tokenizer

__all__ = ["folder"]  # a fixture


def test_responses_do_not_depend_on_batch_size_or_limit(folder: Path, tmp_path: Path) -> None:
    assert main(command(folder, tmp_path / "a.jsonl")) == 0
    assert main(command(folder, tmp_path / "b.jsonl", "--batch-size", "4")) == 0  # fewer rows than samples
    assert main(command(folder, tmp_path / "c.jsonl", "--batch-size", "500", "--limit", "9")) == 0
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{index}" for index in range(40)]
    assert (tmp_path / "b.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines[:9]
    assert not list(tmp_path.glob("*.partial"))


def test_texts_and_marks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(folder, tmp_path / "a.jsonl", "--seed", "5"))
    records = list(read_responses(tmp_path / "a.jsonl"))
    assert all(len(record.responses) == len(record.finished) == 6 for record in records)
    assert not any("<end>" in text for record in records for text in record.responses)
    unfinished = sum(not end for record in records for end in record.finished)
    assert 0 < unfinished < 240
    assert all(
        len(text.split()) < 8
        for record in records
        for text, end in zip(record.responses, record.finished, strict=True)
        if end
    )
    assert f"unfinished after 8 tokens: {unfinished};" in capsys.readouterr().out
    main(command(folder, tmp_path / "b.jsonl", "--seed", "6"))
    assert (tmp_path / "a.jsonl").read_text() != (tmp_path / "b.jsonl").read_text()


def test_the_token_that_ended_a_response_is_not_in_its_text(folder: Path) -> None:
    """Also when it is a plain word that generation_config names, and only the last one."""
    counts = Statistics()
    tokenizer = load_tokenizer(folder)
    prompt = Prompt("q", [{"role": "user", "content": "w9"}], [2, 13, END, 3])
    sampled = [[4, 5, 20], [4, END], [20], [4, 5, 6]]
    responses = from_ids(tokenizer, prompt, sampled, [True, True, True, False], {END, 20}, counts)
    assert responses.responses == ["w0 w1", "w0", "", "w0 w1 w2"]
    assert responses.finished == [True, True, True, False]
    assert counts == Statistics(responses=4, tokens=9, unfinished=1, empty=1, mismatches=0)
    assert responses.token_ids is None
    responses = from_ids(tokenizer, prompt, [[4, END], [4, 2, 5, END]], [True, True], {END}, counts)
    assert responses.responses == ["w0", "w0 w1"]
    assert responses.token_ids == [None, [4, 2, 5]] and counts.mismatches == 1  # <user> is not in the text


def test_a_full_disk_is_one_line_and_keeps_what_is_whole(tmp_path: Path) -> None:
    """The limit falls into a line, which goes at once; one that a kill cut goes at the next start."""
    output = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SampledJobs(output) as jobs:
        jobs.begin_sampling({"seed": 1})
        jobs.add_samples(Responses("q0", ["w1"] * 5, [True] * 5))
        size = jobs.place.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with refused("write-failed", "a.jsonl.partial: File too large"):
                jobs.add_samples(Responses("q1", ["w1"], [True]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "q1" not in jobs
        jobs.add_samples(Responses("q2", ["w2"], [True]))  # the answer to another request, which finds room
        more = jobs.place.stat().st_size
        with jobs.place.open("ab") as file:
            file.write(b'{"job": ["q3", 0, 1], "resp')
    assert more > size
    with SampledJobs(output) as jobs:
        jobs.begin_sampling({"seed": 1})
        assert jobs.place.stat().st_size == more
        assert [name for name in ("q0", "q1", "q2", "q3") if name in jobs] == ["q0", "q2"]


def test_responses_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    output, text = tmp_path / "a.jsonl", "w" * 50_000
    tracemalloc.start()
    try:
        with SampledJobs(output) as jobs:
            jobs.begin_sampling({})
            for number in range(200):
                jobs.add_samples(Responses(f"q{number}", [text], [True]))
        with SampledJobs(output) as jobs:
            jobs.begin_sampling({})
            jobs.finish([f"q{number}" for number in range(200)], 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output.stat().st_size > 200 * len(text) > 10 * peak


def test_prompts_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    def prompt(number: int) -> Prompt:
        return Prompt(f"q{number}", [{"role": "user", "content": "w" * 20_000}], np.arange(number, 4000).tolist())

    tracemalloc.start()
    try:
        prompts = Prompts(tmp_path / "new", map(prompt, range(200)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200 * 1000 and not list((tmp_path / "new").iterdir())
    assert len(prompts) == 200 and list(prompts.lengths) == list(range(4000, 3800, -1))
    read = prompts[7]
    assert (read.id, read.messages, list(read.ids)) == (prompt(7).id, prompt(7).messages, prompt(7).ids)
    assert [one.id for one in prompts] == prompts.names == [f"q{number}" for number in range(200)]


def test_parts_of_a_question_are_joined_in_order(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with SampledJobs(output) as jobs:
        jobs.begin_sampling({})
        jobs.add_samples(Responses("q", ["c"], [False]), 2)
        jobs.add_samples(Responses("q", ["a", "b"], [True, True], [None, [7]]), 0)
        assert jobs.missing("q", 5) == [3, 4] and jobs.missing("other", 2) == [0, 1]
    with SampledJobs(output) as jobs:
        jobs.begin_sampling({})
        assert jobs.missing("q", 5) == [3, 4]
        jobs.finish(["q"], 3)
    [record] = read_responses(output)
    assert record == Responses("q", ["a", "b", "c"], [True, True, False], [None, [7], None])


@pytest.mark.parametrize(
    ("field", "value", "code", "named"),
    [
        ("token_ids", [[1]], "field-value", ("'token_ids' ", "'responses' (2)")),
        ("token_ids", [[1], []], "field-value", ("'token_ids[1]' ",)),
        ("token_ids", [[1], [-1]], "field-value", ("'token_ids[1]' ",)),
        ("finished", [True, "false"], "field-type", ("'finished[1]' ", "bool", "str")),
        ("finished", [True], "field-value", ("'finished' ", "'responses' (2)")),
        ("responses", ["a", 1], "field-type", ("'responses[1]' ", "str", "int")),
    ],
)
def test_malformed_responses_are_named(
    tmp_path: Path, field: str, value: Any, code: str, named: tuple[str, ...]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "q", "responses": ["a", "b"], field: value}) + "\n")
    with refused(code, f"{path}:1: ", *named):
        list(read_responses(path))


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        ("--samples 0", "option-value", ("--samples 0: ",)),
        ("--temperature -1", "option-value", ("--temperature -1.0: ",)),
        ("--top-p 0", "option-value", ("--top-p 0.0: ",)),
        ("--max-new-tokens 125", "prompt-beyond-positions", ("--max-new-tokens 125", "max_position_embeddings 128")),
        ("--model nowhere --tokenizer FOLDER", "folder-missing", ("--model nowhere: ",)),
        ("--contexts nowhere", "file-missing", ("nowhere: ",)),
    ],
)
def test_wrong_input_is_one_line(folder: Path, tmp_path: Path, more: str, code: str, named: tuple[str, ...]) -> None:
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in more.split()]
    with refused(code, *named):
        main(command(folder, tmp_path / "a.jsonl", *arguments))
