"""Which options a resumed run must keep, by one table for every option."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refused
from transformers import LlamaConfig

from megatron_solopo.config import OWNER, Config, flag
from megatron_solopo.data.tokenized.batches import make_schedule
from megatron_solopo.training import run_identity

SETS = {
    "identity": run_identity.identity(),
    "length": run_identity.LENGTH,
    "examples": run_identity.EXAMPLES,
    "start": run_identity.START,
    "free": run_identity.FREE,
}


def config_of(**changed: Any) -> Config:
    config = Config()
    for name, value in ({"train_iters": 5, "beta": 0.1, "alignment_weight": 3.0} | changed).items():
        config.assign(name, value)
    return config


def progress(config: Config, fingerprint: str = "tokens", **model: Any) -> dict[str, Any]:
    training = config.training
    length = training.train_iters, training.train_epochs
    schedule = make_schedule(10, training.global_batch_size, *length, training.seed, config.data.shuffle)
    train: Any = SimpleNamespace(fingerprint=fingerprint)
    return run_identity.progress_of(schedule, train, config, LlamaConfig(**model))


def another(name: str) -> Any:
    """A value that the option does not have in `config_of`."""
    spec = OWNER[name][1]
    if isinstance(spec.default, bool):
        return not spec.default
    others = [choice for choice in spec.metadata["choices"] or () if choice != spec.default]
    kinds = {"int": 77, "float": 0.125}
    return others[0] if others else next((value for kind, value in kinds.items() if kind in str(spec.type)), "text")


def refuse(before: Config, now: Config, *named: str, code: str = "checkpoint-other-run", tokens: str = "tokens") -> str:
    """The message; its first part of ``named`` is its beginning."""
    with refused(code, *named) as caught:
        run_identity.check_same_run(progress(before) | {"iteration": 2}, progress(now, tokens), now)
    assert caught.value.message.startswith(named[0])
    return caught.value.message


def test_every_option_is_in_one_set() -> None:
    assert set().union(*SETS.values()) == OWNER.keys()
    for one, other in itertools.combinations(SETS, 2):
        assert not SETS[one] & SETS[other], (one, other)


@pytest.mark.parametrize("name", sorted(run_identity.identity()))
def test_changed_options_of_a_run_are_refused_with_both_values(name: str) -> None:
    before, now = config_of(), config_of(**{name: another(name)})
    shown = [run_identity._shown(config.value(name)) for config in (before, now)]
    message = refuse(before, now, f"{flag(name)}: ", f"checkpoint's run has {shown[0]}, this one {shown[1]}; ")
    assert ("--override-opt-param-scheduler" in message) == (name in run_identity.SCHEDULE)
    refuse(now, before, f"{flag(name)}: ", f"checkpoint's run has {shown[1]}, this one {shown[0]}; ")


@pytest.mark.parametrize("name", sorted(run_identity.FREE | run_identity.EXAMPLES | run_identity.START))
def test_other_options_may_change(name: str) -> None:
    """Options that decide the examples too, where the examples stay."""
    before, now = config_of(), config_of(**{name: another(name)})
    run_identity.check_same_run(progress(before) | {"iteration": 2}, progress(now), now)


@pytest.mark.parametrize("name", sorted(run_identity.EXAMPLES))
def test_options_that_change_the_examples_are_named(name: str) -> None:
    now = config_of(**{name: another(name)})
    refuse(config_of(), now, f"{flag(name)}: ", code="checkpoint-other-data", tokens="other tokens")


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("rms_norm_eps", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}),
        ("num_attention_heads", {"num_attention_heads": 32}, {"num_attention_heads": 64}),
        ("rope_parameters.rope_theta", {"rope_theta": 1e4}, {"rope_theta": 5e5}),
        ("rope_parameters.rope_type", {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_a_config_json_with_other_mathematics_is_refused(
    field: str, before: dict[str, Any], now: dict[str, Any]
) -> None:
    config = config_of()
    stored = json.loads(json.dumps(progress(config, **before) | {"iteration": 2}))
    with refused("checkpoint-other-run", "--hf-path None: ", "config.json", f"{field} "):
        run_identity.check_same_run(stored, progress(config, **now), config)
    run_identity.check_same_run(stored, progress(config, max_position_embeddings=9, **before), config)
    run_identity.check_same_run(stored | {"mathematics": {}}, progress(config, **now), config)  # of an earlier version


def test_a_file_that_was_changed_in_place_is_refused() -> None:
    refuse(config_of(), config_of(), "--train-data: ", code="checkpoint-other-data", tokens="other tokens")


def test_another_length_is_refused_and_the_way_to_extend_named() -> None:
    override = "--override-opt-param-scheduler (the learning rate then follows the schedule of 9 steps)"
    refuse(config_of(), config_of(train_iters=9), "--train-iters 9: ", "run has 5 steps, this one 9; ", override)
    refuse(config_of(), config_of(train_iters=1234567), "--train-iters 1234567: ")
    before = config_of(train_iters=None, train_epochs=1.0, global_batch_size=4)  # 4 + 4 + 2 examples
    refuse(before, config_of(train_iters=3, global_batch_size=4), "--train-iters 3: ", " 10 examples, ", " 12; ")
    run_identity.check_same_run(progress(before) | {"iteration": 2}, progress(before), before)


@pytest.mark.parametrize("name", sorted(run_identity.SCHEDULE))
def test_the_override_changes_the_schedule_and_reports_it(name: str) -> None:
    before = progress(config_of()) | {"iteration": 5}
    config = config_of(override_opt_param_scheduler=True, train_iters=9, **{name: another(name)})
    run_identity.check_same_run(before, progress(config), config)
    line = run_identity.new_schedule(before, progress(config), config)
    assert line.startswith(f"--override-opt-param-scheduler: 5 -> 9 steps, {flag(name)} ")
    assert line.endswith("the learning rate follows the new schedule from step 6 on")


def test_the_override_changes_nothing_else_and_does_not_go_back() -> None:
    refuse(config_of(), config_of(override_opt_param_scheduler=True, clip_grad=2.0), "--clip-grad: ")
    shorter = config_of(override_opt_param_scheduler=True, train_iters=1)
    refuse(config_of(), shorter, "--train-iters 1: ", " 1 steps, ", " step 2; ", code="steps-already-done")
    config = config_of(override_opt_param_scheduler=True)
    assert run_identity.new_schedule(progress(config) | {"iteration": 2}, progress(config), config) is None


def test_examples_of_a_short_last_step_that_are_left_out_are_counted() -> None:
    before = progress(config_of(train_iters=None, train_epochs=1.0, global_batch_size=4)) | {"iteration": 3}
    config = config_of(train_iters=6, global_batch_size=4, override_opt_param_scheduler=True)
    assert "; 2 examples that the short last step left out" in run_identity.new_schedule(
        before, progress(config), config
    )


def test_what_an_earlier_version_did_not_record_is_not_compared() -> None:
    config = config_of(clip_grad=2.0, preference_loss="ipo")
    recorded = {"tokens": "tokens", "steps": 5, "seed": 1234, "lr": 1e-6, "iteration": 2}
    run_identity.check_same_run(recorded, progress(config), config)
    with refused("checkpoint-other-run", "--seed: ", "run has 7, this one 1234; "):
        run_identity.check_same_run(recorded | {"seed": 7}, progress(config), config)
