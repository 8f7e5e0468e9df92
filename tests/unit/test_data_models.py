"""Data commands that load a model: other weights in its folder, and questions beyond its positions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizer import SPECIAL, save_word_tokenizer

from megatron_solopo.data.building import prepare_data, second_pass
from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import SampledJobs

WORDS = [f"w{index}" for index in range(30)]


def save_model(folder: Path, seed: int = 0, heads: int = 4, time: int | None = None) -> None:
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=heads)
    size = len(SPECIAL) + len(WORDS)
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=size, max_position_embeddings=256)).save_pretrained(folder)
    if time is not None:
        os.utime(folder / "model.safetensors", ns=(time, time))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_word_tokenizer(tmp_path / "model", WORDS)
    save_model(folder)
    return folder


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def sampling(tmp_path: Path, model: Path) -> list[str]:
    chat = [{"role": "user", "content": "w1 w2"}]
    contexts = [
        {"id": f"q{i}", "question": "?", "answers": ["w1"], "short_messages": chat, "long_messages": chat}
        | {"short_tokens": 5, "long_tokens": 5}
        for i in range(3)
    ]
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in contexts))
    return [
        *("--contexts", str(tmp_path / "contexts.jsonl"), "--model", str(model), "--output", str(tmp_path / "r.jsonl")),
        *("--samples", "2", "--max-new-tokens", "4", "--device", "cpu"),
    ]


def building(tmp_path: Path, model: Path) -> list[str]:
    with (tmp_path / "q.jsonl").open("w") as out:
        for i in range(40):
            documents = [{"title": f"t{i}.{j}", "text": f"w{i % 7} w{j}" + " w29" * (j == 1)} for j in range(3)]
            record = {"id": f"q{i}", "question": f"w{i % 9} ?", "answer": "w29x w29", "documents": documents}
            record["documents"][1]["text"] += " w29x w29"
            out.write(json.dumps(record) + "\n")
    return [
        *("--source", "jsonl", "--data", str(tmp_path / "q.jsonl"), "--tokenizer", str(model)),
        *("--short-documents", "2", "--long-documents", "3", "--output", str(tmp_path / "c.jsonl")),
        *("--evidence", "log-prob", "--evidence-model", str(model), "--evidence-documents", "1", "--device", "cpu"),
    ]


@pytest.mark.parametrize("command", ["sample-responses", "prepare-data"])
def test_other_weights_are_refused(command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "sample-responses":
        main, argv, name, killed = sample_responses.main, sampling(tmp_path, model), "weights", (SampledJobs, "finish")
    else:
        main, argv, name = prepare_data.main, building(tmp_path, model), "evidence_weights"
        killed = (second_pass.Builder, "build")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if command == "prepare-data":
            build, calls = second_pass.Builder.build, []

            def build_or_stop(*arguments: object) -> object:
                calls.append(arguments)
                return build(*arguments) if len(calls) == 1 else stopped()

            patch.setattr(*killed, build_or_stop)
        else:
            patch.setattr(*killed, stopped)
        main(argv)
    saved = model.with_name("saved")
    shutil.copytree(model, saved)  # times are kept
    time = (model / "model.safetensors").stat().st_mtime_ns
    save_model(model, seed=1, time=time + 10**9)
    with refused("unfinished-other-settings", f" {name}.model.safetensors.changed = "):
        main(argv)
    save_model(model, heads=2, time=time)
    with refused("unfinished-other-settings", f" {name}.config.json = "):
        main(argv)
    shutil.rmtree(model)
    saved.rename(model)
    assert main(argv) == 0


def test_a_question_beyond_the_models_positions_is_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = building(tmp_path, model)
    questions = tmp_path / "q.jsonl"
    first, second = map(json.loads, questions.read_text().splitlines()[:2])
    first["documents"][0]["text"] = "w1 " * 300
    questions.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    reason = "all its documents go beyond the 256 positions of --evidence-model"
    assert prepare_data.main([*argv, "--skipped-output", str(tmp_path / "left.jsonl")]) == 0
    assert f"questions kept: 1, left out: 1\n  1 left out: {reason}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "left.jsonl").read_text()) == {"id": "q0", "reason": reason}
