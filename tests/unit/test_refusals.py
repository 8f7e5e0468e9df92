"""An error's code: kept where its place is added and between processes, and printed by commands."""

from __future__ import annotations

import pickle

import pytest
from refusals import check_refusal, refused

from megatron_solopo.cli import run
from megatron_solopo.errors import Diverged, UserError


def test_code_and_message_are_kept_between_processes_and_with_a_place() -> None:
    error = Diverged("loss-not-finite", "the loss is nan")
    assert str(error) == "the loss is nan"
    copy = pickle.loads(pickle.dumps(error)).at("step 7")
    assert (type(copy), copy.code, str(copy)) == (Diverged, "loss-not-finite", "step 7: the loss is nan")


def test_a_command_prints_the_code_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: list[str] | None) -> int:
        raise UserError("option-value", "--lr: no")

    assert run(command) == 2
    err = capsys.readouterr().err
    assert err == "error: --lr: no [option-value]\n"
    assert check_refusal(err, "option-value", "--lr") == "--lr: no"


@pytest.mark.parametrize(("code", "named"), [("option-unknown", "--lr"), ("option-value", "--beta")])
def test_another_code_or_name_is_noticed(code: str, named: str) -> None:
    with pytest.raises(AssertionError), refused(code, named):
        raise UserError("option-value", "--lr: no")
