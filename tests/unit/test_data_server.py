"""Sampling from servers that follow the API, and from servers that deviate from it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from option_lines import last_wins_in
from refusals import refused
from scripted_server import Scripted, chat_choice, command, context, folder, serve, well

from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import read_responses
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids

__all__ = ["folder", "serve"]  # fixtures

main = last_wins_in(sample_responses.main)


END = 3  # and 2 in the folder's generation_config.json


def test_every_sample_is_requested_once_and_written_in_order(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any order of the answers: the earlier the question, the slower its answer."""

    def slow(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None:
            time.sleep(0.03 * (5 - int(body["messages"][-1]["content"].split()[0][1:])))
        return well(path, body)

    server = serve(slow)
    assert main(command(folder, server, tmp_path / "a.jsonl", "--samples-per-request", "4")) == 0
    records = list(read_responses(tmp_path / "a.jsonl"))
    assert [record.id for record in records] == [f"q{number}" for number in range(5)]
    assert all(record.responses == [f"w{number}"] * 6 for number, record in enumerate(records))
    assert all(record.finished == [True] * 6 and record.token_ids is None for record in records)
    names = [name for name, _ in server.asked]
    assert sorted(names) == sorted(f"q{number}/{first}" for number in range(5) for first in (0, 4))
    assert {body["n"] for _, body in server.asked} == {4, 2}
    assert len({body["seed"] for _, body in server.asked}) == len(names)
    printed = capsys.readouterr()
    assert "sampled now: 30 responses, 60 tokens" in printed.out and "other ids: 0" in printed.out


def test_a_server_that_ignores_n(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    server = serve(lambda path, body: well(path, body and {**body, "n": 1}))
    main(command(folder, server, tmp_path / "a.jsonl"))
    assert sorted(name for name, _ in server.asked) == sorted(f"q{n}/{first}" for n in range(5) for first in range(6))
    assert all(len(record.responses) == 6 for record in read_responses(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_sampled_ids_are_kept_where_the_text_loses_them(
    kind: str, api: str, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    """And the end of turn is in neither: once a server returned it as an id, once it stopped before it."""
    ids = [[4, 5, END], [4, 1, 5], [4, 5, 6, 7, 8, 9, 10, 11], [END]]
    reasons = ["stop", "stop", "length", "stop"]
    texts = ["w0 w1", "w0 w1", "w0 w1 w2 w3 w4 w5 w6 w7", ""]

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return 200, {"data": [{"id": "tiny", "owned_by": kind}]}
        content = (lambda text: {"message": {"content": text}}) if api == "chat" else (lambda text: {"text": text})
        choices = [
            {**content(text), "finish_reason": reason, "token_ids": one}
            for text, reason, one in zip(texts, reasons, ids, strict=True)
        ]
        return 200, {"choices": choices}

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--samples", "4", "--limit", "1", "--server-api", api))
    [record] = read_responses(tmp_path / "a.jsonl")
    assert record.responses == texts and record.finished == [True, True, False, True]
    assert record.token_ids == [None, [4, 1, 5], None, None]  # <user> is a special token, which texts lose
    [(_, body)] = server.asked
    assert body["return_token_ids"] and body["stop_token_ids"] == [2, END] and body["n"] == 4
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
    prompt = prompt_ids(load_tokenizer(folder), context(0)["short_messages"])
    assert (body["prompt"] == prompt) if api == "completions" else (body["messages"] == context(0)["short_messages"])


def test_texts_end_at_their_end_of_turn_and_mismatches_are_counted(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that leaves the end of turn in the text, and one whose response was 5 tokens and is 3 as text."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return well(path, body)
        marked = body["messages"][-1]["content"].startswith("w0")
        text = "w5 w6 <end> " if marked else "w5 w6"
        usage = {"prompt_tokens": 4, "completion_tokens": 3 if marked else 6}
        return 200, {"choices": [chat_choice(text, "length" if marked else "stop")], "usage": usage}

    main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples", "1", "--limit", "2"))
    first, second = read_responses(tmp_path / "a.jsonl")
    assert (first.responses, first.finished) == (["w5 w6 "], [True])
    assert (second.responses, second.finished) == (["w5 w6"], [True])
    printed = capsys.readouterr().out
    assert "sampled now: 2 responses, 9 tokens" in printed and "other ids: 1" in printed


@pytest.mark.parametrize(
    ("texts", "usage", "tokens", "changed"),
    [
        (["w5", "w6 w7 w8", "w9 w9"], 9, 9, 0),  # all choices
        (["w5", "w6 w7 w8", "w9 w9"], 2, 9, 0),  # the first choice only, as llama.cpp's server counts
        (["w5 w6 w7 w8", "", "w9"], 5, 8, 0),
        (["w5", "w6 w7 w8", "w9 w9"], 10, 10, 1),  # one more than the texts have
        (["w5", "w6 w7 w8", "w9 w9"], None, 9, 0),
        (["w5"], 4, 4, 1),
    ],
)
def test_tokens_are_counted_over_all_choices(
    texts: list[str],
    usage: int | None,
    tokens: int,
    changed: int,
    folder: Path,
    serve: Callable[..., Scripted],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return well(path, body)
        return 200, {"choices": [chat_choice(text) for text in texts], "usage": {"completion_tokens": usage}}

    more = ["--samples", str(len(texts)), "--limit", "1"]
    main(command(folder, serve(answer), tmp_path / "a.jsonl", *more))
    printed = capsys.readouterr().out
    assert f"sampled now: {len(texts)} responses, {tokens} tokens" in printed
    assert f"mean length {tokens / len(texts):.1f} tokens" in printed and f"other ids: {changed}" in printed


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "library", None])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_sampling_parameters_are_set_or_reported(
    owner: str | None,
    api: str,
    folder: Path,
    serve: Callable[..., Scripted],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server's top-k, min-p and penalties: switched off where its API can, warned about where not; recorded."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            listed = {"data": [{"id": "tiny", "owned_by": owner}], "total_slots": 8}
            return (200, listed) if path.endswith(("/models", "/props")) else (404, {})
        choices = [{"text": "w1", **chat_choice("w1")} for _ in range(body.get("n", 1))]
        return 200, {"choices": choices}

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1", "--server-api", api))
    recorded = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    [(_, body)] = server.asked
    sent = recorded["sampling"]["sent"]
    assert sent.items() <= body.items() and (body["temperature"], body["top_p"]) == (0.85, 1.0)
    err = capsys.readouterr().err
    if owner in ("vllm", "sglang", "llamacpp"):
        assert body["min_p"] == 0 and body["top_k"] == (0 if owner == "llamacpp" else -1) and not err
        assert body["repeat_penalty" if owner == "llamacpp" else "repetition_penalty"] == 1
        assert "left_to_the_server" not in recorded["sampling"]
        assert recorded["settings"]["server_kind"] == {"llamacpp": "llama.cpp"}.get(owner, owner)
    else:
        assert err.count("\n") == 1 and "top-k, min-p, typical-p and penalties have the server's defaults" in err
        assert not sent and "min-p" in recorded["sampling"]["left_to_the_server"]
    assert (body.get("samplers") == ["temperature", "top_p"]) is (owner == "llamacpp")


@pytest.mark.parametrize(("props", "most"), [((200, {"total_slots": 4}), 4), ((501, {}), 1), ((200, []), 1)])
def test_llama_cpp_gets_requests_for_as_many_choices_as_it_has_slots(
    props: tuple[int, Any], most: int, folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    """It refuses more, with status 400."""

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is None:
            return props if path == "/props" else (200, {"data": [{"id": "tiny", "owned_by": "llamacpp"}]})
        return well(path, body)

    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--limit", "1"))
    assert max(body.get("n", 1) for _, body in server.asked) == most


def test_only_missing_samples_of_a_complete_output_are_requested(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path
) -> None:
    server, output = serve(well), tmp_path / "a.jsonl"
    main(command(folder, server, output, "--samples", "3", "--limit", "2"))
    assert sorted(name for name, _ in server.asked) == ["q0/0", "q1/0"]
    server.asked.clear()
    main(command(folder, server, output, "--samples", "5", "--limit", "3"))
    assert sorted((name, body["n"]) for name, body in server.asked) == [("q0/3", 2), ("q1/3", 2), ("q2/0", 5)]
    server.asked.clear()
    main(command(folder, server, output, "--samples", "4", "--limit", "1"))
    assert not server.asked and [len(record.responses) for record in read_responses(output)] == [5] * 3


def test_prompts_that_are_not_the_trainers_are_warned_about_once(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        status, document = well(path, body)
        return status, document | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}} if body else document

    main(command(folder, serve(answer), tmp_path / "a.jsonl", "--samples-per-request", "1"))
    warned = capsys.readouterr().err
    assert warned.count("prompt tokens") == 1 and re.search("has 7 prompt tokens on the server and 4 here", warned)


def test_template_values_and_the_key_travel_with_the_request(
    folder: Path, serve: Callable[..., Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant> {% if not think %}<end> {% endif %}"
    )
    monkeypatch.setenv("SECRET", "abc")
    server = serve(well)
    more = ["--chat-template", str(template), "--chat-template-kwargs", '{"think": true}', "--api-key-env", "SECRET"]
    main(command(folder, server, tmp_path / "a.jsonl", *more))
    assert all(body["chat_template_kwargs"] == {"think": True} for _, body in server.asked)
    assert all(head["authorization"] == "Bearer abc" for head in server.heads)


def test_two_processes_never_write_one_output(folder: Path, serve: Callable[..., Scripted], tmp_path: Path) -> None:
    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None and len(server.asked) == 1:
            with refused("output-in-use", "a.jsonl.partial: "):
                main(command(folder, server, tmp_path / "a.jsonl"))
            tried.append(True)
        return well(path, body)

    tried: list[bool] = []
    server = serve(answer)
    main(command(folder, server, tmp_path / "a.jsonl", "--concurrency", "1"))
    assert tried == [True]
