"""Every long command reports where stderr is no terminal: each of its phases, with a line after every step here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import write_lines
from training_home import Home, furnish

from megatron_solopo import progress
from megatron_solopo.cli import dispatch, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    questions = [
        {
            "id": f"q{number}",
            "question": f"w{number} w3",
            "answer": f"w{number}",
            "answer_aliases": [],
            "paragraphs": [
                {"idx": k, "title": f"w{k}", "paragraph_text": f"w{number + 7 * k} w{k}", "is_supporting": k == 0}
                for k in range(3)
            ],
        }
        for number in range(20, 26)
    ]
    write_lines(home.folder / "questions.jsonl", questions)
    (home.folder / "document.txt").write_text("w1 w2")
    return home


@pytest.fixture
def phases(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Runs a command; returns the names of the phases that reported."""
    monkeypatch.setattr(progress, "INTERVAL", -1.0)
    update, enter = progress.ProgressBar.update, progress.ProgressBar.__enter__

    def at_once(method: Any) -> Any:
        def wrapped(self: Any, *arguments: Any) -> Any:
            value = method(self, *arguments)
            progress._timer.tick()
            return value

        return wrapped

    monkeypatch.setattr(progress.ProgressBar, "update", at_once(update))
    monkeypatch.setattr(progress.ProgressBar, "__enter__", at_once(enter))

    def names(*arguments: object) -> set[str]:
        capfd.readouterr()
        assert run(dispatch, list(map(str, arguments))) == 0
        lines = capfd.readouterr().err.splitlines()
        assert not any("it/s" in line or "\r" in line for line in lines)
        return {match[1] for line in lines if (match := re.match(r"(.+?): .*elapsed \d\d:\d\d", line))}

    return names


def test_the_commands_of_data_and_evaluation(home: Home, phases: Callable[..., set[str]]) -> None:
    folder, hf = home.folder, home.folder / "hf"
    tokenizer, sizes = ["--tokenizer", hf], ["--short-documents", 1, "--long-documents", 3]
    contexts = folder / "contexts.jsonl"
    split = ["--validation-fraction", 0.5, "--validation-output", folder / "validation.jsonl"]
    prepare = ["prepare-data", "--data", folder / "questions.jsonl", *tokenizer]
    assert phases(*prepare, "--output", contexts, *sizes) >= {"reading", "contexts", "reading the inputs"}
    tokens = ["--short-tokens", 60, "--long-tokens", 100, "--pool", folder / "pool.jsonl", *split]
    write_lines(folder / "pool.jsonl", [{"title": f"w{n}", "text": f"w{n} w{n + 1}"} for n in range(40)])
    assert phases(*prepare, "--output", folder / "other.jsonl", *tokens) >= {
        "lengths",
        "reading the pool",
        "finding near-duplicates",
    }
    loading, sampling = f"loading {hf}", ["--samples", 2, "--max-new-tokens", 3]
    sample = ["sample-responses", "--contexts", contexts, "--output", folder / "responses.jsonl", "--model", hf]
    assert phases(*sample, *sampling) >= {"prompts", loading, "sampling"}
    answers = [{"id": f"q{n}", "responses": [f"w{n}", "w1"], "finished": [True, True]} for n in range(20, 26)]
    write_lines(folder / "answers.jsonl", answers)
    groups = folder / "groups.jsonl"
    paired = ["build-pairs", "--contexts", contexts, "--responses", folder / "answers.jsonl", "--output", groups]
    assert phases(*paired) >= {"pairing"}
    tokenized = ["tokenize-data", "--data", groups, *tokenizer, "--output", folder / "tokens", "--workers", 1]
    assert phases(*tokenized) >= {"reading the file", f"tokenizing {groups}"}
    assert phases("inspect-data", "--data", groups, *tokenizer, "--output", folder / "page.html") >= {"counting"}
    asked = ["--model", hf, "--max-new-tokens", 3]
    lengths = ["--context-documents", "2,3", "--data", folder / "questions.jsonl", "--output", folder / "results.json"]
    results = phases("evaluate", *asked, *lengths)
    assert results >= {"reading", "contexts", loading, "2 documents", "3 documents"}
    assert phases("ask", *asked, "--document", folder / "document.txt", "--question", "w3") >= {loading, "answering"}


def test_conversion_and_the_reference_pass(
    home: Home, phases: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hf = home.folder, home.folder / "hf"
    monkeypatch.setenv("SOLOPO_CACHE", str(folder / "cache"))  # where no other test has written the store
    trained = home.argv("runs/one", "--train-iters", 2, "--save-interval", 1, "--save-hf", folder / "exported")
    reading = {"reading the weights", f"tokenizing {folder / 'groups.jsonl'}", "reading weights"}
    assert phases("train", *trained) >= reading | {"reference log-probs", f"writing {folder / 'exported'}"}
    resumed = home.argv("runs/two", "--train-iters", 2, "--load", folder / "runs/one", "--ckpt-step", 1)
    assert phases("train", *resumed) >= {f"loading {folder}/runs/one/iter_0000001"}
    convert, megatron = "convert-checkpoint", folder / "megatron"
    assert phases(convert, "hf-to-megatron", "--hf-path", hf, "--save", megatron) >= {"writing weights"}
    assert phases(convert, "megatron-to-hf", "--load", megatron, "--save-hf", folder / "back") >= {
        f"writing {folder / 'back'}"
    }
    verified = phases(convert, "verify", "--hf-path", hf, "--load", megatron)
    assert verified >= {"reading weights", f"loading {hf}", "comparing"}
