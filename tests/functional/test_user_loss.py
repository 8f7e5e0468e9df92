"""A user's preference loss: one class in one file of the working directory, with an additional option."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from refusals import check_refusal, refused
from training_home import Home, as_a_user, furnish

from megatron_solopo import config
from megatron_solopo.cli import run
from megatron_solopo.config_load import load
from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.losses import registry
from megatron_solopo.training.run import main

HINGE = '''
from dataclasses import dataclass

from megatron_solopo.losses import Metric, Pairs, PreferenceLoss, Responses, option


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """max(0, margin - (r(x, y_w) - r(x, y_l)))."""

    reward_text = "beta * the mean log pi, hinged"
    defaults = {"beta": 0.7, "alignment_weight": 1.5}
    metrics = (Metric("inside", "pairs inside the margin", "share"),)

    hinge_margin: float = option(1.0, "margin beyond which a pair has no loss, in reward units", minimum=0)

    def __post_init__(self):
        if self.hinge_margin > 100:
            raise ValueError("--hinge-margin above 100 is no margin")

    def reward(self, responses: Responses):
        return self.beta * responses.log_probs / responses.lengths

    def loss(self, pairs: Pairs):
        return (self.hinge_margin - pairs.margin).clamp(min=0)

    def pair_metrics(self, pairs: Pairs):
        return {"inside": (pairs.margin < self.hinge_margin).to(pairs.margin.dtype)}
'''
ONE = ["--preference-loss", "my_losses:Hinge", "--global-batch-size", 1, "--micro-batch-size", 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = furnish(tmp_path_factory.mktemp("user-loss"))
    (home.folder / "my_losses.py").write_text(HINGE)
    return home


@pytest.fixture
def here(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """In the folder of the file; what is registered and imported is forgotten afterwards."""
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    known, options, modules = dict(registry.LOSSES), dict(config.OWNER), set(sys.modules)
    yield home
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(home.folder):
            del sys.modules[name]
    for live, before in ((registry.LOSSES, known), (config.OWNER, options)):
        live.clear()
        live.update(before)


def test_it_trains_with_its_option_and_its_run_starts_again(home: Home) -> None:
    """As a user starts it; the run folder's config.yaml names class and option."""
    done = as_a_user(home, home.argv("runs/hinge", *ONE, "--hinge-margin", 0.5, "--train-iters", 2))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = home.metrics("runs/hinge")
    for line in (first, second):
        assert line["po_loss"] == pytest.approx(max(0.0, 0.5 - line["margin"]), abs=1e-6)
        assert line["inside"] == (line["margin"] < 0.5)
        assert line["loss"] == pytest.approx(line["po_loss"] + 1.5 * line["alignment_loss"], rel=1e-5)
    assert first["loss"] != second["loss"]
    written = yaml.safe_load((home.folder / "runs/hinge/config.yaml").read_text())["method"]
    assert written["hinge_margin"] == 0.5 and written["beta"] == 0.7 and "simpo_gamma" not in written
    again = as_a_user(home, ["--config", "runs/hinge/config.yaml", "--save", "runs/again"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert [line["loss"] for line in home.metrics("runs/again")] == [first["loss"], second["loss"]]
    other = as_a_user(home, ["--config", "runs/hinge/config.yaml", "--hinge-margin", "0.6", "--load", "runs/hinge"])
    assert other.returncode == 2
    check_refusal(other.stderr, "checkpoint-other-run", "--hinge-margin: ", "run has 0.5, this one 0.6; ")


def test_every_command_with_options_accepts_it(here: Home, capsys: pytest.CaptureFixture[str]) -> None:
    argv = here.argv("runs/dry", *ONE, "--hinge-margin", 2)
    assert run(main, [*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "hinge_margin: 2.0" in out and "beta: 0.7" in out and "scored responses: short_chosen, " in out
    with pytest.raises(SystemExit):
        load(["--preference-loss", "my_losses:Hinge", "--help"])
    assert "--hinge-margin FLOAT" in capsys.readouterr().out
    inspected = ["--data", "groups.jsonl", "--tokenizer", "hf", "--preference-loss", "my_losses:Hinge"]
    assert inspect_data.main(inspected) == 0
    assert "reward: beta * the mean log pi, hinged" in capsys.readouterr().out
    (here.folder / "run.yaml").write_text("method: {hinge_margin: 3, preference_loss: 'my_losses:Hinge'}\n")
    assert load([*here.argv("x"), "--config", "run.yaml"])[0].method.loss_options == {"hinge_margin": 3.0}


WRONG = {
    "no such module": ("--preference-loss no_losses:Hinge", "loss-invalid", "--preference-loss: ", "module no_losses "),
    "no such class": ("--preference-loss my_losses:Hing", "loss-invalid", "/my_losses.py has no Hing; it has Hinge"),
    "no class": ("--preference-loss my_losses:dataclass", "loss-invalid", "my_losses:dataclass is no subclass of "),
    "its file is broken": ("--preference-loss broken:Hinge", "loss-invalid", "module broken ", "(SyntaxError: "),
    "no dataclass": ("--preference-loss partial:Bare", "loss-invalid", "partial:Bare is no dataclass; ", "@dataclass"),
    "no option": ("--preference-loss partial:Plain", "loss-invalid", "field size is no option; ", "option("),
    "a taken name": ("--preference-loss partial:Taken", "loss-invalid", "option lr has a name that is taken"),
    "a part is missing": ("--preference-loss partial:NoLoss", "loss-invalid", "partial:NoLoss ", "no method loss"),
    "no default alpha": ("--preference-loss partial:NoAlpha", "loss-invalid", "alignment_weight"),
    "a value of no type": ("--preference-loss my_losses:Hinge --hinge-margin x", "option-value", "--hinge-margin: "),
    "below its minimum": (
        "--preference-loss my_losses:Hinge --hinge-margin -1",
        "option-value",
        "--hinge-margin",
        "at least 0",
    ),
    "what the loss refuses": (
        "--preference-loss my_losses:Hinge --hinge-margin 101",
        "option-value",
        "--preference-loss my_losses:Hinge: --hinge-margin above 100 is no margin",
    ),
    "an option of another loss": (
        "--config hinge.yaml --preference-loss dpo",
        "option-unused",
        "--hinge-margin ",
        "--preference-loss my_losses:Hinge",
    ),
    "smoothing": (
        "--preference-loss my_losses:Hinge --label-smoothing 0.1",
        "option-unused",
        "--label-smoothing ",
        "--preference-loss dpo, dpo_norm, ld_dpo, simpo or wpo",
    ),
    "its option without it": ("--hinge-margin 1", "option-unknown", "--hinge-margin: "),
    "a file names none": (
        "--config none.yaml",
        "loss-invalid",
        "none.yaml:1: method.preference_loss: ",
        "module no_losses ",
    ),
}
"""Name -> (options, code, parts of the message)."""
PARTIAL = """
from dataclasses import dataclass
from my_losses import Hinge
from megatron_solopo.losses import PreferenceLoss, option
from megatron_solopo.losses.simpo import SimPO

class Bare(Hinge):
    more: float = option(1.0, "more")

@dataclass(frozen=True)
class Plain(Hinge):
    size: float = 1.0

@dataclass(frozen=True)
class Taken(Hinge):
    lr: float = option(1.0, "lr")

@dataclass(frozen=True)
class NoLoss(PreferenceLoss):
    defaults = {"alignment_weight": 1.0}

    def reward(self, responses):
        return responses.log_probs

@dataclass(frozen=True)
class Sharper(SimPO):
    sharpness: float = option(2.0, "sharpness")

@dataclass(frozen=True)
class NoAlpha(Hinge):
    defaults = {"beta": 1.0}
"""


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(here: Home, case: str) -> None:
    (here.folder / "broken.py").write_text("class Hinge(:\n")
    (here.folder / "partial.py").write_text(PARTIAL)
    (here.folder / "hinge.yaml").write_text("method: {hinge_margin: 3, preference_loss: 'my_losses:Hinge'}\n")
    (here.folder / "none.yaml").write_text("method: {preference_loss: 'no_losses:Hinge'}\n")
    argv, code, *named = WRONG[case]
    with refused(code, *named):
        load([*here.argv("runs/wrong"), *argv.split()])


TRIED = """
from dataclasses import dataclass
from my_losses import Hinge

@dataclass(frozen=True)
class Fails(Hinge):
    def loss(self, pairs):
        return pairs.nothing

@dataclass(frozen=True)
class NoReference(Hinge):
    def reward(self, responses):
        return responses.reference

@dataclass(frozen=True)
class Mean(Hinge):
    def loss(self, pairs):
        return super().loss(pairs).mean()

@dataclass(frozen=True)
class Largest(Hinge):
    def pair_metrics(self, pairs):
        return {"largest": pairs.margin.max().expand(len(pairs.margin))}

@dataclass(frozen=True)
class Step(Hinge):
    def pair_metrics(self, pairs):
        return {"step": pairs.margin}
"""
REFUSED = {
    "Fails": ("loss-raises", "with 2 groups: ", "/tried.py:8: AttributeError: ", "'nothing'"),
    "NoReference": ("loss-raises", "with 2 groups: ", "/tried.py:13: ValueError: ", "needs_reference"),
    "Mean": ("loss-raises", "with 2 groups: ValueError: loss has shape [] for 2 pairs"),
    "Largest": ("loss-raises", "with 0 groups: ", "/tried.py:23: ", "Error: "),
    "Step": ("loss-metric-name", "'step'", "metrics.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_is_tried_before_the_run(here: Home, name: str) -> None:
    (here.folder / "tried.py").write_text(TRIED)
    code, *named = REFUSED[name]
    with refused(code, f"--preference-loss tried:{name}: ", *named):
        main([*here.argv("runs/tried", "--preference-loss", f"tried:{name}"), "--dry-run"])


def test_a_loss_may_build_on_another(here: Home) -> None:
    """With its options too, which stay refused for a loss that has them not."""
    (here.folder / "partial.py").write_text(PARTIAL)
    flags = [
        "--preference-loss",
        "partial:Sharper",
        "--sharpness",
        "3",
        "--simpo-gamma",
        "0.4",
        "--label-smoothing",
        "0.1",
    ]
    method = load([*here.argv("x"), *flags])[0].method
    assert method.loss_options == {"sharpness": 3.0, "simpo_gamma": 0.4} and method.beta == 2.0
    with refused("option-unused", "--simpo-gamma ", "--preference-loss simpo or partial:Sharper"):
        load([*here.argv("x"), "--simpo-gamma", "0.4"])


def test_a_run_folder_can_be_read_without_the_file(here: Home) -> None:
    """`convert-checkpoint` and others want the model's options alone."""
    from megatron_solopo.config_load import read_model_options

    document = {"model": {"hf_path": "hf"}, "method": {"preference_loss": "no_losses:Hinge", "hinge_margin": 1}}
    (here.folder / "config.yaml").write_text(json.dumps(document))
    assert read_model_options(here.folder / "config.yaml") == {"hf_path": "hf"}
