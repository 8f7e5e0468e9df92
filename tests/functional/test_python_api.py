"""The package from Python: `Config`, `train` and `evaluate`, with the examples of examples/api as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from refusals import refused
from tiny_models import SHAPE, byte_tokenizer, preference_groups, write_lines, write_model
from training_home import ENVIRONMENT, ROOT, Home, as_a_user, furnish
from transformers import LlamaConfig

import megatron_solopo
from megatron_solopo import Config, Evaluation, PreferenceGroup, PreferenceLoss, TrainResult, api, config

from megatron_solopo import evaluate, train  # isort: skip
from megatron_solopo.evaluation import evaluate as evaluation
from megatron_solopo.losses import Pairs, Responses, option, registry
from megatron_solopo.training.log import RunLog
from megatron_solopo.training.run import main

QUOTES = [("README.md", "train.py"), ("docs/python.md", "train.py"), ("docs/python.md", "user_loss.py")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("api"))


@pytest.fixture(autouse=True)
def here(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the user's folder; losses that a test registers are forgotten afterwards."""
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(api, "_platforms", set())
    known, options = dict(registry.LOSSES), dict(config.OWNER)
    yield
    for live, before in ((registry.LOSSES, known), (config.OWNER, options)):
        live.clear()
        live.update(before)


def options(folder: str, **more: Any) -> dict[str, Any]:
    """Those of `Home.argv`, as Python has them."""
    return {
        **dict(hf_path="hf", train_data="groups.jsonl", save=folder, device="cpu", seq_length=128, train_iters=2),
        **dict(global_batch_size=4, micro_batch_size=2, lr=1e-3, preference_loss="orpo"),
    } | more


def losses(home: Home, save: str) -> list[float]:
    return [line["loss"] for line in home.metrics(save)]


# ------------------------------------------------------------------------------------------------------- the examples


def run_example(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/api" / name), *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(home: Home) -> str:
    """A model of 2,048 positions that reads English, byte by byte."""
    shape = SHAPE | {"vocab_size": 384, "max_position_embeddings": 2048}
    folder = write_model(home.folder / "bytes-hf", LlamaConfig(**shape))
    settings = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "eos_token": "<|end|>"}
    byte_tokenizer(home.folder / "bytes", tokenizer_class="PreTrainedTokenizerFast", **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home.folder / "bytes" / name).replace(folder / name)
    return folder.name


def test_the_example_trains_and_evaluates(home: Home, model: str) -> None:
    printed = run_example("train.py", home.folder, model)
    (line,) = (home.folder / "runs/api/train_data.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "louvre" and len(json.loads(line)["long_messages"][0]["content"]) > 600
    last = home.metrics("runs/api")[-1]
    assert (
        last["step"] == 10 and f"runs/api/iter_0000010: loss {last['loss']:.3f}, margin {last['margin']:.3f}" in printed
    )
    assert printed.splitlines()[-1].startswith("{'1 documents': ") and "/tmp" not in printed
    again = as_a_user(home, ["--config", "runs/api/config.yaml", "--save", "x", "--dry-run", "--overwrite"])
    assert again.returncode == 0, again.stderr


def test_the_example_of_a_user_loss_trains(home: Home, model: str) -> None:
    printed = run_example("user_loss.py", home.folder, model, "groups.jsonl")
    assert printed == f"loss of the pairs: {home.metrics('runs/hinge')[-1]['po_loss']:.3f}\n"
    method = yaml.safe_load((home.folder / "runs/hinge/config.yaml").read_text())["method"]
    assert method["preference_loss"] == "__main__:Hinge" and method["hinge_margin"] == 0.5


@pytest.mark.parametrize(("page", "example"), QUOTES)
def test_a_page_quotes_the_example_as_it_is(page: str, example: str) -> None:
    text = (ROOT / "examples/api" / example).read_text()
    assert f"```python\n{text}```\n" in (ROOT / page).read_text()


# --------------------------------------------------------------------------------------------------------- the package


def test_importing_the_package_is_light() -> None:
    code = "import sys, megatron_solopo; print(sorted({'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)))"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "[]\n"


def test_public_names_are_there_and_no_others() -> None:
    for name in megatron_solopo.__all__:
        assert name in dir(megatron_solopo) and getattr(megatron_solopo, name) is not None
    assert sorted(megatron_solopo.__all__, key=str.lower) == sorted(
        ["__version__", *(name for names in megatron_solopo._HOMES.values() for name in names)], key=str.lower
    )
    with pytest.raises(AttributeError, match="module 'megatron_solopo' has no attribute 'trian'"):
        megatron_solopo.trian  # noqa: B018


# -------------------------------------------------------------------------------------------------------------- Config


def test_a_config_equals_that_of_the_command_line(home: Home) -> None:
    (home.folder / "run.yaml").write_text(
        "model: {hf_path: hf}\ndata: {train_data: groups.jsonl}\noutput: {save: runs/x}\ntraining: {lr: 1e-5}\n"
    )
    rest = ["--train-epochs=1", "--lr=3e-6", "--no-shuffle"]
    loaded = Config.load("run.yaml", overrides=rest)
    assert loaded.training.lr == 3e-6 and loaded.data.shuffle is False and loaded.method.alignment_weight == 3.0
    config = Config.from_options(config=Path("run.yaml"), train_epochs=1, lr=3e-6, shuffle=False, valid_data=None)
    assert config.as_dict() == loaded.as_dict() and config.explicit == loaded.explicit
    kwargs = {"enable_thinking": False}
    assert Config.from_options(**options("x", chat_template_kwargs=kwargs)).model.chat_template_kwargs == (
        '{"enable_thinking": false}'
    )


@dataclass(frozen=True)
class NoLoss:
    margin: float = 1.0


WRONG = {
    "unknown": (dict(lrr=1e-3), "option-unknown", "Config.from_options: ", "'lrr'; did you mean lr?"),
    "wrong type": (dict(lr="much"), "option-value", "--lr: ", "float", "'much'"),
    "wrong switch": (dict(bf16="yes"), "option-value", "Config.from_options: bf16: ", "'yes'"),
    "a list": (dict(hf_path=["hf"]), "option-value", "Config.from_options: hf_path: ", "str", "[hf]"),
    "nothing": (dict(lr=None), "option-value", "Config.from_options: lr: ", "peak learning rate"),
    "missing": (dict(save=None), "option-missing", "--save "),
    "unused": (dict(beta=0.1), "option-unused", "--beta ", "--preference-loss"),
    "no such file": (dict(config="none.yaml"), "file-missing", "--config none.yaml: "),
    "a command's": (dict(dry_run=True), "option-unknown", "Config.from_options: ", "'dry_run'"),
    "help": (dict(help=True), "option-unknown", "Config.from_options: ", "'help'"),
    "no loss": (
        dict(preference_loss=NoLoss),
        "loss-invalid",
        "--preference-loss: ",
        ":NoLoss ",
    ),
    "no loss's option": (dict(hinge_margin=1), "option-unknown", "Config.from_options: ", "'hinge_margin'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_line(case: str) -> None:
    more, code, start, *named = WRONG[case]
    with refused(code, *named) as caught:
        Config.from_options(**options("runs/wrong", **more))
    assert caught.value.message.startswith(start)


@pytest.mark.parametrize(
    ("word", "code"),
    [("--help", "option-unknown"), ("-h", "argument-unexpected"), ("--dry-run", "option-unknown")],
)
def test_overrides_do_not_end_the_process(home: Home, word: str, code: str) -> None:
    (home.folder / "all.yaml").write_text("output: {save: runs/x}\n")
    with refused(code, word):
        Config.load("all.yaml", [word])


def hinge(default: float) -> type[PreferenceLoss]:
    """A class as a notebook's cell defines it, each time that it runs."""

    @dataclass(frozen=True)
    class Hinge(PreferenceLoss):
        reward_text = "the mean log pi"
        defaults = {"alignment_weight": 0.0}
        hinge_margin: float = option(default, "margin", minimum=0)

        def reward(self, responses: Responses):
            return responses.log_probs / responses.lengths

        def loss(self, pairs: Pairs):
            return (self.hinge_margin - pairs.margin).clamp(min=0)

    return Hinge


def test_a_loss_that_is_defined_again_takes_the_place_of_the_earlier(home: Home) -> None:
    for number, default in enumerate((0.5, 2.0)):
        reloaded = Config.from_options(**options(f"runs/again-{number}", preference_loss=hinge(default)))
        assert reloaded.method.preference_loss == f"{__name__}:hinge.<locals>.Hinge"
        assert reloaded.as_dict()["method"]["hinge_margin"] == default, "what config.yaml will have"
        line = train(reloaded).metrics
        assert line["po_loss"] == pytest.approx(max(0.0, default - line["margin"]), abs=1e-6)
    built_in = registry.LOSSES["simpo"]
    assert Config.from_options(**options("x", preference_loss=built_in)).method.preference_loss == "simpo"
    assert list(config.names_of("method")).index("simpo_gamma") < list(config.names_of("method")).index("hinge_margin")


# --------------------------------------------------------------------------------------------------------------- train


def test_training_from_python_is_training_by_the_command(home: Home) -> None:
    """Twice in one process, with groups in memory and as a path; bit for bit what the command computes."""
    main(home.argv("runs/command", "--preference-loss", "orpo", "--train-iters", 2, "--valid-data", "valid.jsonl"))
    config = Config.from_options(**options("runs/path", valid_data="valid.jsonl", save_hf="path-hf"))
    config.method.alignment_weight = None  # which `train` fills in its copy
    before = config.as_dict()
    result = train(config)
    assert config.as_dict() == before, "the caller's config is changed"
    records = preference_groups(10)
    groups = [PreferenceGroup(**record) for record in records]
    in_memory = train(
        Config.from_options(**options("runs/memory", train_data=groups, valid_data=preference_groups(3, 4)))
    )
    assert losses(home, "runs/path") == losses(home, "runs/memory") == losses(home, "runs/command")
    folder = Path("runs/path/iter_0000002")
    lines = (home.metrics("runs/path")[-1], home.metrics("runs/path", "valid")[-1])
    assert result == TrainResult(Path("runs/path"), 2, True, folder, Path("path-hf"), *lines)
    assert in_memory.hf_folder is None and in_memory.valid_metrics["loss"] == result.valid_metrics["loss"]
    assert not dist.is_initialized() and folder.is_dir() and (home.folder / "path-hf/config.json").is_file()


def test_a_run_that_was_stopped_resumes_with_the_same_groups_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = preference_groups(10)
    arguments = options("runs/stopped", train_data=groups, auto_resume=True, train_iters=4)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", lambda self, values, warnings=None: signal.raise_signal(signal.SIGTERM))
        stopped = train(Config.from_options(**arguments, exit_signal_handler=True))
    assert 0 < stopped.step < 4 and not stopped.finished and stopped.hf_folder is None
    assert stopped.checkpoint == Path(f"runs/stopped/iter_{stopped.step:07d}")
    first = train(Config.from_options(**arguments))
    assert first.finished and first.step == 4
    written = (home.folder / "runs/stopped/train_data.jsonl").read_bytes()
    with refused("checkpoint-other-data", "--train-data: ", "runs/stopped", "--save"):
        train(Config.from_options(**arguments | dict(train_data=groups[1:])))
    assert (home.folder / "runs/stopped/train_data.jsonl").read_bytes() == written
    assert not list((home.folder / "runs/stopped").glob("*.new"))
    assert train(Config.from_options(**arguments)) == first, "nothing is left, and the result is the same"


def test_what_train_refuses_is_a_user_error_and_the_next_run_works(home: Home) -> None:
    short = Config.from_options(**options("runs/refused", seq_length=8))
    with refused("example-too-long", "--seq-length 8"):
        train(short)
    assert not dist.is_initialized()
    with refused("loss-not-finite", "step 2: "):
        train(Config.from_options(**options("runs/diverged", lr=1e30, clip_grad=0, train_iters=5)))
    with refused("not-json", "broken.jsonl:1: "):
        (home.folder / "broken.jsonl").write_text("{\n")
        train(Config.from_options(**options("runs/broken", train_data="broken.jsonl")))
    with refused("field-missing", "train_data.jsonl:2: "):
        train(Config.from_options(**options("runs/records", train_data=[*preference_groups(1), {"prompt": "w1"}])))
    with refused("not-json", "--train-data: ", "(Object of type set "):
        train(Config.from_options(**options("runs/records", train_data=[{"prompt": {"w1"}}])))
    short.training.lr = -1.0
    with refused("option-value", "--lr "):
        train(short)
    assert train(Config.from_options(**options("runs/works"))).finished


def test_a_process_that_uses_torch_distributed_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_options(**options("runs/distributed"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with refused("distributed-started", "train: torch.distributed "):
        train(config)


def test_one_process_trains_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_platforms", {"cuda"})
    for _ in range(2):
        with refused("device-changed", "--device cpu: ", "cuda before"):
            train(Config.from_options(**options("runs/cpu")))


# ------------------------------------------------------------------------------------------------------------ evaluate

DOCUMENTS = [{"text": f"w{number}0 w{number}1", "is_supporting": number == 3} for number in range(12)]
QUESTIONS = [{"id": str(n), "question": f"w{n} w7", "answer": f"w{n}", "documents": DOCUMENTS} for n in range(4)]


def test_evaluating_from_python_is_evaluating_by_the_command(home: Home) -> None:
    write_lines(home.folder / "questions.jsonl", QUESTIONS)
    shared = ["--source", "jsonl", "--max-new-tokens", "3", "--limit", "3"]
    argv = ["--model", "hf", "--data", "questions.jsonl", "--context-documents", "2,8", "--output", "c.json", *shared]
    assert evaluation.main(argv) == 0
    command = json.loads((home.folder / "c.json").read_text())
    more: dict[str, Any] = dict(source="jsonl", context_documents=[2, 8], max_new_tokens=3, limit=3)
    before = sorted(home.folder.iterdir())
    in_memory = evaluate("hf", QUESTIONS, **more)
    assert sorted(home.folder.iterdir()) == before
    assert isinstance(in_memory, Evaluation) and in_memory.metrics == command["metrics"]
    assert [line["id"] for line in in_memory.predictions] == ["0", "1", "2"] * 2
    written = evaluate("hf", ["questions.jsonl"], output="python.json", **more)
    assert json.loads((home.folder / "python.json").read_text())["settings"] == written.settings == command["settings"]


WRONG_EVALUATIONS = {
    "unknown": (dict(limits=3), "option-unknown", "evaluate: ", "'limits'; did you mean limit?"),
    "no length": (
        dict(context_documents=None),
        "option-missing",
        "--context-documents",
        "--context-tokens",
    ),
    "no file": (dict(questions="none.jsonl"), "file-missing", "none.jsonl: "),
    "no model": (dict(model="none"), "folder-missing", "none: "),
}


@pytest.mark.parametrize("case", WRONG_EVALUATIONS)
def test_what_evaluate_refuses_is_one_line(case: str) -> None:
    more, code, *named = WRONG_EVALUATIONS[case]
    arguments = dict(model="hf", questions=QUESTIONS, source="jsonl", context_documents=[2]) | more
    with refused(code, *named):
        evaluate(**arguments)
