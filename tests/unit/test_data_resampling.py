"""sample-responses where its output, or a part of it, is there already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from sampling_models import command, folder

from megatron_solopo import atomic
from megatron_solopo.data.sampling import sample_responses
from megatron_solopo.data.sampling.responses import Responses, SampledJobs, read_responses
from megatron_solopo.data.sampling.sample_responses import main

__all__ = ["folder"]  # a fixture


def test_a_partial_file_of_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    main(command(folder, output))
    partial = Path(f"{output}.partial")
    header, sampled = {"settings": {"temperature": 0.3}}, {"job": ["q", 0, 1], "responses": ["a"], "finished": [True]}
    partial.write_text(json.dumps(header) + "\n" + json.dumps(sampled) + "\n", encoding="utf-8")
    with refused("unfinished-other-settings", "a.jsonl.partial: ", " = ", ", now "):
        main(command(folder, output, "--overwrite"))


def test_another_tokenizer_is_refused_on_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same template, same stops, other words: ids of the first half would be another tokenizer's."""
    output, other = tmp_path / "a.jsonl", tmp_path / "other"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampledJobs, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            main(command(folder, output, "--limit", "1"))
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"w35"', '"v35"'), encoding="utf-8")
    with refused("unfinished-other-settings", "a.jsonl.partial: ", " tokenizer.tokenizer.json = "):
        main(command(folder, output, "--limit", "1", "--tokenizer", str(other)))


def test_a_complete_output_without_its_settings_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with refused("file-exists", "--output ", "a.jsonl: ", "a.jsonl.settings.json", "--overwrite"):
        main(command(folder, tmp_path / "a.jsonl"))
    assert (tmp_path / "a.jsonl").read_text() == "{}\n" and not (tmp_path / "a.jsonl.partial").exists()
    main(command(folder, tmp_path / "a.jsonl", "--overwrite"))
    assert len(list(read_responses(tmp_path / "a.jsonl"))) == 40


def test_a_complete_output_is_extended_and_never_cut(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(folder, tmp_path / "complete.jsonl", "--samples", "9"))
    output = tmp_path / "a.jsonl"
    main(command(folder, output, "--samples", "4", "--limit", "5"))
    settings = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert settings["settings"]["temperature"] == 0.85 and settings["bytes"] == output.stat().st_size
    capsys.readouterr()
    for samples, limit, new in (("4", "12", 28), ("9", "12", 60), ("2", "3", 0), ("9", "40", 252)):
        before = output.read_bytes()
        main(command(folder, output, "--samples", samples, "--limit", limit))
        printed = capsys.readouterr().out
        if new:
            assert f"sampled now: {new} responses" in printed
        else:
            assert "holds 2 responses to each of 3 questions already" in printed and output.read_bytes() == before
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.jsonl", "a.jsonl.settings.json"]
    with refused("output-other-settings", "--output ", "a.jsonl: ", "seed = 0, now 1", "--overwrite"):
        main(command(folder, output, "--seed", "1", "--samples", "10"))
    main(command(folder, output, "--seed", "1", "--overwrite", "--samples", "1"))
    assert [len(record.responses) for record in read_responses(output)] == [1] * 40


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, after: int, arguments: list[str]) -> None:
    """Runs the command until the call of a method of `SampledJobs` after so many."""
    calls, method = [0], getattr(SampledJobs, name)

    def stop(self: SampledJobs, *more: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return method(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(SampledJobs, name, stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)


@pytest.mark.parametrize(("first", "then"), [((8, 9), (5, 40)), ((5, 40), (8, 9)), ((8, 40), (5, 9))])
def test_an_unfinished_output_is_finished_with_more_or_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[int, int], then: tuple[int, int]
) -> None:
    """And what lies beyond a smaller request stays for a larger one."""
    main(command(folder, tmp_path / "complete.jsonl", "--samples", "8"))
    complete = [record.responses for record in read_responses(tmp_path / "complete.jsonl")]
    output = tmp_path / "a.jsonl"

    def asked(samples: int, limit: int) -> list[str]:
        return command(folder, output, "--samples", str(samples), "--limit", str(limit))

    interrupted(monkeypatch, "add", 6, asked(*first))
    main(asked(*then))
    samples, limit = then
    assert [record.responses for record in read_responses(output)] == [one[:samples] for one in complete[:limit]]
    main(asked(8, 40))
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.partial").exists()


@pytest.mark.parametrize(("name", "after"), [("add", 3), ("add", 12), ("finish", 0), ("extend", 0)])
def test_an_extension_that_is_killed_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    output = tmp_path / "a.jsonl"
    main(command(folder, tmp_path / "complete.jsonl", "--limit", "20"))
    main(command(folder, output, "--limit", "10"))
    before = output.read_bytes()
    interrupted(monkeypatch, name, after, command(folder, output, "--limit", "20"))
    assert output.read_bytes() == before
    main(command(folder, output, "--limit", "20"))
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()


def test_a_kill_before_the_output_takes_its_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings are there and name its size; the old output is not mistaken for it."""
    output, kept, rename = tmp_path / "a.jsonl", tmp_path / "kept", atomic.rename

    def stop(aside: Path, path: Path) -> None:
        if path == output:
            shutil.copy(aside, kept)
            raise KeyboardInterrupt
        rename(aside, path)

    main(command(folder, output, "--limit", "10"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "rename", stop)
        main(command(folder, output, "--limit", "20"))
    kept.rename(atomic.file_aside(output))  # a kill leaves it there
    main(command(folder, output, "--limit", "20"))
    assert "holds 6 responses to each of 20 questions already" in capsys.readouterr().out
    assert len(list(read_responses(output))) == 20


def test_overwrite_samples_anew_and_resumes_itself_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    arguments = command(folder, output, "--limit", "10")
    main(arguments)
    interrupted(
        monkeypatch, "add", 14, command(folder, output, "--limit", "20")
    )  # an extension, of which nothing stays
    interrupted(monkeypatch, "add", 4, [*arguments, "--overwrite"])
    capsys.readouterr()
    main([*arguments, "--overwrite"])
    printed = capsys.readouterr().out
    assert "resuming: 24 of 60 responses" in printed and "sampled now: 36 responses" in printed


def test_a_second_command_on_the_same_output_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_responses, "Prompts", lambda *_: pytest.fail("prompts are written before the lock"))
    with SampledJobs(tmp_path / "a.jsonl") as jobs:
        jobs.begin_sampling({"seed": 0})
        jobs.add_samples(Responses("q0", ["a"], [True]))
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with refused("output-in-use", "a.jsonl.partial: "):
            main(command(folder, tmp_path / "a.jsonl"))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
