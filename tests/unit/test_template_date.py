"""A chat template that prints today's date: the day is fixed once, recorded, and printed again on any other day."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal, refused
from tiny_models import TEMPLATE, preference_groups, write_lines, write_model
from transformers import AutoTokenizer

from megatron_solopo import template_kwargs
from megatron_solopo.cli import dispatch, run
from megatron_solopo.config_load import load
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.data.building import second_pass
from megatron_solopo.data.files import records
from megatron_solopo.data.files.inputs import first_field
from megatron_solopo.data.sampling.responses import SampledJobs
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids, response_ids
from megatron_solopo.data.text.text_facts import TEXT_FACTS, text_differences, text_facts
from megatron_solopo.data.tokenized import make_store
from megatron_solopo.training.preflight import load_data

CHAT = [{"role": "user", "content": "w40"}]
# The day as a word: w31 on the 31st. Llama 3.2 prints it so too, unless date_string is set.
LLAMA = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "w{{ date_string[:2] | int }} "
)
SMOLLM3 = "{% set today = strftime_now('%d') %}w{{ today | int }} "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), template=LLAMA + TEMPLATE)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the day."""
    return lambda day: monkeypatch.setattr(template_kwargs, "today", lambda: day)


def printed(tokenizer: Any) -> str:
    return tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, CHAT))[0]


def test_the_clock_is_that_of_transformers_at_that_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers with its clock set to the day."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, zone: Any = None) -> datetime.datetime:
            return cls(2024, 2, 29)

    form = "{{ strftime_now('%d %b %Y, %A, %Y-%m-%d') }} "
    tokenizer = load_tokenizer(write_model(tmp_path, template=form + TEMPLATE), chat_template_date="2024-02-29")
    ours = tokenizer.apply_chat_template(CHAT, tokenize=False, **template_kwargs.rendering(tokenizer))
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert ours == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ours.startswith("29 Feb 2024, Thursday, 2024-02-29 ")


def test_the_day_is_that_of_the_option_the_unfinished_work_the_folder_the_data_or_today(
    folder: Path, tmp_path: Path, on: Callable[[str], None]
) -> None:
    on("2026-01-05")
    (tmp_path / "hf").mkdir()
    SidecarFiles(folder, "{}", chat_template_date="2026-01-04").write(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template_date"] == "2026-01-04"
    for place, day, dates in (
        (folder, "05", {}),
        (folder, "03", {"of_data": "2026-01-03"}),
        (tmp_path / "hf", "04", {"of_data": "2026-01-03"}),
        (tmp_path / "hf", "02", {"of_data": "2026-01-03", "of_resumed": "2026-01-02"}),
        (tmp_path / "hf", "01", {"of_resumed": "2026-01-02", "chat_template_date": "2026-01-01"}),
    ):
        tokenizer = load_tokenizer(place, **dates)
        assert (template_kwargs.date_of(tokenizer), printed(tokenizer)) == (f"2026-01-{day}", f"w{int(day)}")
        assert response_ids(tokenizer, CHAT, "w3") == tokenizer.convert_tokens_to_ids(["w3", "<end>"])


def test_a_template_without_a_date_is_as_it_was(tmp_path: Path, on: Callable[[str], None]) -> None:
    """Digests, settings and folders contain no date."""
    plain = write_model(tmp_path / "hf")
    facts = []
    for day in ("2026-01-01", "2026-01-02"):
        on(day)
        tokenizer = load_tokenizer(plain, of_resumed="2020-01-01", of_data="2020-01-01")
        assert template_kwargs.date_of(tokenizer) is None and template_kwargs.rendering(tokenizer) == {}
        facts.append(text_facts(plain, tokenizer))
    assert facts[0] == facts[1] and facts[0].keys() == set(TEXT_FACTS)


def test_facts_name_another_day_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    one, other = (text_facts(folder, load_tokenizer(folder, chat_template_date=f"2026-01-0{day}")) for day in (1, 2))
    assert text_differences(one, other) == ["--chat-template-date '2026-01-01' where the run has '2026-01-02'"]
    (tmp_path / "hf").mkdir()
    SidecarFiles(folder, "{}", chat_template_date="2026-01-01").write(tmp_path / "hf")
    assert text_differences(one, text_facts(tmp_path / "hf", load_tokenizer(tmp_path / "hf"))) == []


WRONG = [
    ("chat_template_date", "1.2.2026", "template-date", "--chat-template-date 1.2.2026: ", "YYYY-MM-DD"),
    ("chat_template_date", "20260201", "template-date", "--chat-template-date 20260201: ", "YYYY-MM-DD"),
    ("chat_template_date", "2026-02-30", "template-date", "--chat-template-date 2026-02-30: ", "YYYY-MM-DD"),
    ("chat_template_kwargs", '{"strftime_now": "w1"}', "template-variable", "strftime_now", "--chat-template-date"),
    ("chat_template_kwargs", '{"day": 1}', "template-variable", "no variable day; it has date_string"),
]


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[1])
def test_wrong_days_are_one_line(folder: Path, row: tuple[str, ...]) -> None:
    name, text, code, *named = row
    with refused(code, *named):
        load_tokenizer(folder, **{name: text})


def test_a_day_that_nothing_prints_is_refused(folder: Path, tmp_path: Path) -> None:
    with refused("option-unused", "--chat-template-date 2026-01-01: "):
        load_tokenizer(write_model(tmp_path / "hf"), chat_template_date="2026-01-01")
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template_date": "soon"}))
    assert load_tokenizer(tmp_path / "hf")  # a folder's date is one where its template prints one
    with refused("template-date", "hf: chat_template_date of tokenizer_config.json, soon: ", "YYYY-MM-DD"):
        load_tokenizer(tmp_path / "hf", chat_template=write_template(tmp_path, SMOLLM3 + TEMPLATE))
    argv = ["--hf-path", "m", "--train-data", "d", "--save", "r", "--train-iters", "1"]
    with refused("template-date", "--chat-template-date soon: "):
        load([*argv, "--chat-template-date", "soon"])


def write_template(folder: Path, text: str) -> Path:
    path = folder / "template.jinja"
    path.write_text(text)
    return path


def test_a_server_prints_the_day_where_the_template_takes_it_and_is_refused_elsewhere(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is sent makes transformers, with its clock, print the day."""
    tokenizer = load_tokenizer(folder, chat_template_date="2026-01-09")
    sent = template_kwargs.for_server(tokenizer)
    assert sent == {"date_string": "09 Jan 2026"}
    there = AutoTokenizer.from_pretrained(folder)
    expected = there.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **sent)
    assert expected == prompt_ids(tokenizer, CHAT)
    for_seventh = load_tokenizer(
        folder, chat_template_kwargs='{"date_string": "07 Jul 2007"}', chat_template_date="2026-01-09"
    )
    assert template_kwargs.for_server(for_seventh) == {"date_string": "07 Jul 2007"} and printed(for_seventh) == "w7"
    other = load_tokenizer(folder, chat_template=write_template(tmp_path, SMOLLM3 + TEMPLATE))
    with refused("template-date-server", "--server-api chat: ", "--server-api completions"):
        template_kwargs.for_server(other)
    # Before the server is asked anything.
    contexts = {"id": "q", "question": "?", "answers": ["w1"], "short_messages": CHAT, "long_messages": CHAT}
    contexts |= {"short_tokens": 4, "long_tokens": 4}
    argv = ["sample-responses", "--server", "http://127.0.0.1:9/v1", "--model", "m", "--tokenizer", folder]
    argv += ["--contexts", write_lines(tmp_path / "contexts.jsonl", [contexts]), "--output", tmp_path / "r.jsonl"]
    assert run(dispatch, [*map(str, argv), "--chat-template", str(tmp_path / "template.jinja")]) == 2
    check_refusal(capfd.readouterr().err, "template-date-server", "--server-api chat: ")


# Every command started on one day, killed, and repeated on the next; then the chain from command to command.


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "questions.jsonl",
        [
            {
                "id": f"q{number}",
                "question": f"w{number} w53",
                "answer": f"w{number}",
                "answer_aliases": [],
                "paragraphs": [
                    {"idx": k, "title": f"w{k}", "paragraph_text": f"w{number + k}", "is_supporting": k == 0}
                    for k in range(3)
                ],
            }
            for number in range(40, 46)
        ],
    )


def killed_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, argv: list[str]) -> None:
    """Runs a command whose function works so many times; then it is as if killed."""
    real, count = getattr(owner, name), [0]

    def stop(*arguments: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert run(dispatch, argv) == 130


def test_each_data_command_resumes_the_next_day_and_passes_its_date_on(
    folder: Path, questions: Path, tmp_path: Path, on: Callable[[str], None], monkeypatch, capfd
) -> None:
    monkeypatch.setattr(second_pass, "_BATCH", 2)
    monkeypatch.setattr(records, "PART_BYTES", 400)
    hf, contexts, responses = str(folder), tmp_path / "contexts.jsonl", tmp_path / "responses.jsonl"
    groups, tokens = tmp_path / "groups.jsonl", tmp_path / "tokens"
    prepare = ["prepare-data", "--data", questions, "--tokenizer", hf, "--output", contexts]
    prepare += ["--short-documents", 1, "--long-documents", 3]
    sample = ["sample-responses", "--contexts", contexts, "--output", responses, "--model", hf]
    sample += ["--samples", 2, "--batch-size", 2, "--max-new-tokens", 4]
    tokenize = ["tokenize-data", "--data", groups, "--tokenizer", hf, "--output", tokens, "--workers", 1]
    prepare, sample, tokenize = (list(map(str, argv)) for argv in (prepare, sample, tokenize))

    on("2026-01-01")
    killed_after(monkeypatch, second_pass.Builder, "build", 1, prepare)
    on("2026-01-02")
    assert run(dispatch, prepare) == 0 and "resuming: 2 of 6" in capfd.readouterr().out
    contexts_read = [json.loads(line) for line in contexts.read_text().splitlines()]
    assert {record["chat_template_date"] for record in contexts_read} == {"2026-01-01"}

    on("2026-01-03")
    killed_after(monkeypatch, SampledJobs, "add_samples", 1, [*sample, "--chat-template-date", "2026-01-07"])
    on("2026-01-04")
    assert run(dispatch, sample) == 0 and "resuming: 2 of 12" in capfd.readouterr().out
    assert not (tmp_path / "responses.jsonl.partial").exists()
    on("2026-01-05")  # a complete output is extended, or recognized as complete, with its day
    more = [*sample]
    more[more.index("--samples") + 1] = "3"
    assert run(dispatch, more) == 0 and "sampled now: 6 responses" in capfd.readouterr().out
    assert run(dispatch, sample) == 0 and "2 responses to each of 6 questions already" in capfd.readouterr().out

    answers = [{"id": record["id"], "responses": [record["answers"][0], "w1"]} for record in contexts_read]
    write_lines(responses, answers)
    pair = ["build-pairs", "--contexts", contexts, "--responses", responses, "--output", groups]
    assert run(dispatch, list(map(str, pair))) == 0
    assert {json.loads(line)["chat_template_date"] for line in groups.read_text().splitlines()} == {"2026-01-01"}

    on("2026-01-05")
    killed_after(monkeypatch, make_store, "tokenize_part", 1, [*tokenize, "--chat-template-date", "2026-01-06"])
    on("2026-01-08")
    assert run(dispatch, tokenize) == 0 and "1 of " in capfd.readouterr().out
    assert json.loads((tokens / "manifest.json").read_text())["text"]["chat_template_date"] == "2026-01-06"
    on("2026-01-09")
    assert run(dispatch, tokenize) == 0 and "nothing is left to do" in capfd.readouterr().out
    # Training uses the day of a token folder, and that of groups.
    for data, day in ((tokens, "2026-01-06"), (groups, "2026-01-01")):
        argv = ["--hf-path", hf, "--train-data", data, "--save", tmp_path / "run", "--train-iters", 1]
        config, _ = load(list(map(str, argv)))
        prompt = load_data(config).train.groups[0].prompts[0]
        assert config.model.chat_template_date == day
        assert load_tokenizer(folder).convert_ids_to_tokens(prompt.ids[:1]) == [f"w{int(day[-2:])}"]


def test_groups_keep_their_day_in_every_form(tmp_path: Path) -> None:
    from megatron_solopo.data.files.records import write_records
    from megatron_solopo.data.schema import read_groups

    dated = [record | {"chat_template_date": "2026-01-01"} for record in preference_groups(2)]
    groups = list(read_groups(write_lines(tmp_path / "groups.jsonl", dated)))
    for name in ("again.jsonl", "again.parquet"):
        write_records(tmp_path / name, iter(groups))
        assert list(read_groups(tmp_path / name)) == groups
        assert first_field(tmp_path / name, "chat_template_date") == "2026-01-01"
    (tmp_path / "again.json").write_text(json.dumps(dated))
    (tmp_path / "set").mkdir()
    (tmp_path / "again.parquet").rename(tmp_path / "set" / "train.parquet")
    for name in (tmp_path / "again.json", f"hub:{tmp_path / 'set'}"):
        assert list(read_groups(name)) == groups
        assert first_field(name, "chat_template_date") == "2026-01-01"
    write_lines(tmp_path / "groups.jsonl", [dated[0] | {"chat_template_date": "yesterday"}])
    assert template_kwargs.recorded_date(first_field(tmp_path / "groups.jsonl", "chat_template_date")) is None
    with refused("template-date", "groups.jsonl:1: ", "'chat_template_date' yesterday: "):
        list(read_groups(tmp_path / "groups.jsonl"))


def test_evaluation_records_its_day(folder: Path, questions: Path, tmp_path: Path, on: Callable[[str], None]) -> None:
    on("2026-01-03")
    output = tmp_path / "results.json"
    argv = ["evaluate", "--model", folder, "--data", questions, "--context-documents", 2, "--output", output]
    assert run(dispatch, list(map(str, [*argv, "--max-new-tokens", 2]))) == 0
    assert json.loads(output.read_text())["settings"]["chat_template_date"] == "2026-01-03"
