"""Resuming from a checkpoint: what is refused, what a refusal leaves alone, and what counts as done."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal
from tiny_models import SHAPE, write_model
from training_home import TIMES, Home, furnish
from transformers import LlamaConfig

from megatron_solopo.cli import run
from megatron_solopo.conversion.manifest import LATEST
from megatron_solopo.training.run import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("home"))
    write_model(home.folder / "wide", LlamaConfig(**SHAPE | {"intermediate_size": 64}, tie_word_embeddings=False))
    return home


@pytest.fixture(scope="module")
def simpo(home: Home) -> Path:
    """A run of five steps, a loss without reference, with checkpoints of steps 2, 4 and 5."""
    assert run(main, home.argv("runs/simpo", "--preference-loss", "simpo", "--save-interval", 2)) == 0
    return home.folder / "runs/simpo"


def refuse(capfd: pytest.CaptureFixture[str], argv: list[str], code: str, *named: str) -> str:
    """The message of a command line that is refused."""
    capfd.readouterr()
    assert run(main, argv) == 2
    return check_refusal(capfd.readouterr().err, code, *named)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume_argv(home: Home, name: str, *flags: Any, **more: Any) -> list[str]:
    """The command line that resumes from step 2 of runs/NAME."""
    return home.argv(f"runs/{name}", "--load", home.folder / "runs" / name, "--ckpt-step", 2, *flags, **more)


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_run_folder_as_it_was(
    home: Home, simpo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The metrics of steps 3 to 5 above all, and the settings they had."""
    folder = Path(shutil.copytree(simpo, home.folder / "runs/kept"))
    before = contents(folder)
    events = home.folder / "events"
    flags = ["--preference-loss", "simpo", "--tensorboard-dir", events]
    refuse(
        capfd, resume_argv(home, "kept", *flags, hf="wide"), "checkpoint-other-model", "/kept/iter_0000002", "--hf-path"
    )
    assert contents(folder) == before and not events.exists()


@pytest.fixture(scope="module")
def dpo(home: Home) -> Path:
    """The same with a reference, exported."""
    assert run(main, home.argv("runs/dpo", "--save-interval", 2, "--save-hf", home.folder / "dpo-hf")) == 0
    return home.folder / "runs/dpo"


def drop_progress(folder: Path, *names: str) -> None:
    """Checkpoints as earlier versions wrote them; a manifest is not among the files it names."""
    for path in folder.glob("iter_*/manifest.json"):
        document = json.loads(path.read_text())
        for name in names:
            del document["progress"][name]
        path.write_text(json.dumps(document))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_reference_of_other_weights_is_refused(
    home: Home, dpo: Path, simpo: Path, capfd: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    """The folder that --save-hf wrote, for one, which fits in every other way."""
    shutil.copytree(dpo, home.folder / "runs/other", dirs_exist_ok=True)
    shutil.copytree(simpo, home.folder / "runs/other-simpo", dirs_exist_ok=True)
    argv = resume_argv(home, "other", *dry, hf="dpo-hf")
    refuse(capfd, argv, "checkpoint-other-reference", f"--hf-path {home.folder}/dpo-hf: ", "reference of dpo;")
    assert (
        run(main, resume_argv(home, "other-simpo", "--preference-loss", "simpo", *dry, hf="dpo-hf")) == 0
    )  # no reference


def test_checkpoints_of_earlier_versions_are_resumed(home: Home, dpo: Path) -> None:
    folder = Path(shutil.copytree(dpo, home.folder / "runs/older"))
    drop_progress(folder, "reference_weights", "adam_beta1", "adam_beta2", "adam_eps")
    assert run(main, resume_argv(home, "older")) == 0
    assert [line["step"] for line in home.metrics("runs/older")] == [1, 2, 3, 4, 5]
    assert "reference_weights" in (folder / "iter_0000005/manifest.json").read_text()


@pytest.mark.parametrize(
    "changed",
    [
        ("--preference-loss", "orpo"),
        ("--simpo-gamma", 2),
        ("--alignment-weight", 2),
        ("--clip-grad", 0.5),
        ("--bf16",),
        ("--context-mode", "long"),
        ("--no-shuffle",),
        ("--make-vocab-size-divisible-by", 64),
    ],
    ids=lambda changed: changed[0],
)
def test_a_run_with_other_settings_is_refused_though_it_is_done(
    home: Home, simpo: Path, changed: tuple[Any, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """Finished or not, dry or not; only the same run reports that nothing is left."""
    flags = ["--preference-loss", "simpo", *changed]
    for argv in (
        home.argv("runs/simpo", "--auto-resume", *flags),
        home.argv("runs/simpo", "--auto-resume", "--dry-run", *flags),
        resume_argv(home, "simpo", *flags),
    ):
        name = changed[0].replace("--no-", "--")
        assert refuse(capfd, argv, "checkpoint-other-run", "--save").startswith(f"{name}: ")


def test_a_run_resumes_with_another_way_of_computing(home: Home, simpo: Path) -> None:
    shutil.copytree(simpo, home.folder / "runs/freely")
    flags = ["--preference-loss", "simpo", "--micro-batch-size", 1, "--no-share-prompts", "--log-interval", 1]
    flags += ["--recompute-granularity", "full", "--save-interval", 1, "--on-nonfinite", "skip", "--seq-length", 160]
    assert run(main, resume_argv(home, "freely", *flags, "--valid-data", home.folder / "valid.jsonl")) == 0
    assert [line["step"] for line in home.metrics("runs/freely")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("flag", ["--auto-resume", "--load"])
def test_a_finished_run_is_extended_with_the_override_only(
    home: Home, simpo: Path, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its learning rate is then that of a run of the new length, which it stays."""
    name = f"extended{flag}"
    folder = Path(shutil.copytree(simpo, home.folder / "runs" / name))
    start = [flag] if flag == "--auto-resume" else [flag, folder]
    flags = ["--preference-loss", "simpo", "--train-iters", 8, "--save-interval", 2]
    argv = home.argv(f"runs/{name}", *flags, *start)
    refuse(capfd, argv, "checkpoint-other-run", "--train-iters 8: ", "--override-opt-param-scheduler")
    override = [*flags, "--override-opt-param-scheduler", "--lr", 5e-4]
    assert run(main, home.argv(f"runs/{name}", *override, *start, "--dry-run")) == 0
    line = "--override-opt-param-scheduler: 5 -> 8 steps, --lr 0.001 -> 0.0005; the learning rate follows the new"
    assert line in capfd.readouterr().out
    assert run(main, home.argv(f"runs/{name}", *override, *start)) == 0
    assert line in capfd.readouterr().err
    whole = [*flags, "--lr", 5e-4]
    if not (home.folder / "runs/whole").exists():
        assert run(main, home.argv("runs/whole", *whole)) == 0
    lines = home.metrics(f"runs/{name}")
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert [line["lr"] for line in lines[5:]] == [line["lr"] for line in home.metrics("runs/whole")[5:]]
    assert lines[0]["loss"] == home.metrics("runs/simpo")[0]["loss"]
    capfd.readouterr()
    assert run(main, home.argv(f"runs/{name}", *whole, "--auto-resume")) == 0
    assert "all 8 steps are done" in capfd.readouterr().err
    shorter = ["--preference-loss", "simpo", "--lr", 5e-4, "--auto-resume"]
    refuse(capfd, home.argv(f"runs/{name}", *shorter), "checkpoint-other-run", "run has 8 steps, this one 5; ")


def test_a_dry_run_shows_where_a_run_resumes(home: Home, dpo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, resume_argv(home, "dpo", "--dry-run")) == 0
    assert f"resumes after step 2, from {dpo}/iter_0000002\n" in capsys.readouterr().out
    assert run(main, home.argv("runs/dpo", "--auto-resume", "--dry-run")) == 0
    assert f"all are done and saved in {dpo}; nothing is left\n" in capsys.readouterr().out


def exporting(home: Home, name: str, *flags: Any) -> list[str]:
    target = home.folder / f"{name}-hf"
    return home.argv(f"runs/{name}", "--preference-loss", "simpo", "--auto-resume", "--save-hf", target, *flags)


def killed(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before", "within", "behind"])
def test_a_run_killed_at_its_export_still_exports_over_an_older_model(
    home: Home, simpo: Path, moment: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, in, and right behind the export of the model; the same command then does what is left, once."""
    name = f"export-{moment}"
    older = Path(shutil.copytree(home.folder / "hf", home.folder / f"{name}-hf")) / "model.safetensors"
    first = older.read_bytes()
    place = {
        "before": "export.export_last_model",
        "within": "export.save_folder",
        "behind": "resume.export_is_complete",
    }
    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_solopo.training.{place[moment]}", killed)
        assert run(main, exporting(home, name, "--overwrite")) == 130
    assert (older.read_bytes() == first) == (moment != "behind")
    assert run(main, exporting(home, name, "--overwrite")) == 0
    exported = older.read_bytes()
    assert exported != first and "nothing is left" not in capfd.readouterr().err
    assert run(main, exporting(home, name, "--overwrite")) == 0
    assert "nothing is left" in capfd.readouterr().err and older.read_bytes() == exported


def test_a_model_that_the_run_did_not_export_is_never_mistaken_for_its_export(
    home: Home, simpo: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(simpo, home.folder / "runs/foreign")
    shutil.copytree(home.folder / "hf", home.folder / "foreign-hf")
    refuse(capfd, exporting(home, "foreign"), "folder-exists", "/foreign-hf: ", "export.json", "--overwrite")
    # The run's export, where it was killed between the export and the note of it, needs no --overwrite.
    with monkeypatch.context() as patch:
        patch.setattr("megatron_solopo.training.resume.export_is_complete", killed)
        assert run(main, exporting(home, "killed")) == 130
    assert (home.folder / "killed-hf/config.json").is_file()
    assert run(main, exporting(home, "killed")) == run(main, exporting(home, "killed")) == 0
    assert "nothing is left" in capfd.readouterr().err


def test_a_full_disk_at_the_note_of_an_export_keeps_the_model(
    home: Home, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_solopo.training.resume.write_text", full)
    named = ["export.json ", "(No space left on device)", "the model is in ", "/full-hf"]
    refuse(capfd, exporting(home, "full"), "export-failed", *named)
    assert (home.folder / "full-hf/config.json").is_file()


def test_after_resuming_from_an_earlier_checkpoint_the_model_is_exported_again(
    home: Home, simpo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(main, exporting(home, "back", "--save-interval", 2)) == 0
    weights = home.folder / "back-hf/model.safetensors"
    first = weights.read_bytes()
    flags = ["--save-interval", 2, "--lr", 2e-3, "--override-opt-param-scheduler", "--overwrite"]
    back = [flag for flag in exporting(home, "back", *flags) if flag != "--auto-resume"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_solopo.training.export.export_last_model", killed)
        assert run(main, [*back, "--load", str(home.folder / "runs/back"), "--ckpt-step", "2"]) == 130
    assert run(main, exporting(home, "back", *flags)) == 0
    assert weights.read_bytes() != first


def test_an_export_of_another_run_is_not_mistaken_for_this_runs(
    home: Home, simpo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from another's checkpoint, in the folder of an exported run whose checkpoints are lost."""
    assert run(main, exporting(home, "lost", "--beta", 4)) == 0
    weights = home.folder / "lost-hf/model.safetensors"
    first = weights.read_bytes()
    folder = home.folder / "runs/lost"
    shutil.rmtree(folder / "iter_0000005")
    (folder / LATEST).unlink()
    new = [flag for flag in exporting(home, "lost", "--overwrite") if flag != "--auto-resume"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_solopo.training.export.export_last_model", killed)
        assert run(main, [*new, "--load", str(simpo), "--ckpt-step", "2"]) == 130
    assert run(main, exporting(home, "lost", "--overwrite")) == 0
    assert weights.read_bytes() != first


def test_a_run_killed_before_its_first_checkpoint_finds_its_models_of_the_steps(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = exporting(home, "early", "--save-hf-interval", 1, "--save-interval", 3)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_solopo.training.checkpoint.Checkpoints.save", killed)
        assert run(main, command) == 130
    assert (home.folder / "early-hf/iter_0000001/config.json").is_file()
    assert run(main, command) == 0
    assert (home.folder / "early-hf/config.json").is_file()


def test_weights_alone_are_not_resumed(home: Home, simpo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The folder that convert-checkpoint writes is a checkpoint of no run."""
    folder = Path(shutil.copytree(simpo, home.folder / "runs/weights"))
    path = folder / "iter_0000002/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"progress": {}}))
    argv = resume_argv(home, "weights", "--preference-loss", "simpo")
    refuse(capfd, argv, "checkpoint-weights-only", "/iter_0000002: ", f"--hf-path {folder}")


def test_random_weights_are_the_reference_again(home: Home) -> None:
    """Drawn by name and seed, so that a resumed run is the unbroken one even where the cache is lost."""
    flags = ["--random-init", "--save-interval", 2, "--reference-cache", home.folder / "drawn"]
    assert run(main, home.argv("runs/drawn", *flags)) == 0
    unbroken = home.metrics("runs/drawn")
    shutil.rmtree(home.folder / "drawn")
    assert run(main, resume_argv(home, "drawn", *flags)) == 0
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in of]
        for of in (unbroken, home.metrics("runs/drawn"))
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 5


def test_random_weights_of_another_config_are_another_reference(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(home.folder / "hf", home.folder / "hf-drawn"))
    assert run(main, home.argv("runs/config", "--random-init", "--save-interval", 2, hf="hf-drawn")) == 0
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"initializer_range": 0.02', '"initializer_range": 0.2'))
    argv = resume_argv(home, "config", "--random-init", hf="hf-drawn")
    refuse(capfd, argv, "checkpoint-other-reference", "--hf-path ", "/hf-drawn: ")
