"""--chat-template-kwargs: the same rendering in every command, and wrong values refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from segment_names import scored
from tiny_models import TEMPLATE, preference_groups, write_lines, write_model
from token_data import tokenize
from transformers import AutoTokenizer

from megatron_solopo.config_load import load
from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.data.building.prepare_data import main as prepare_data
from megatron_solopo.data.sampling.sample_responses import main as sample_responses
from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer, prompt_ids, response_ids
from megatron_solopo.evaluation.ask import main as ask
from megatron_solopo.evaluation.evaluate import main as evaluate
from megatron_solopo.training.preflight import load_data

OFF = '{"enable_thinking": false}'
# As Qwen3's: with thinking switched off, an empty thought precedes the answer.
THINKING = TEMPLATE.replace(
    "<assistant> {% endif %}",
    "<assistant> {% if enable_thinking is defined and not enable_thinking %}w58 w59 {% endif %}{% endif %}",
)
CHAT = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), template=THINKING)


def test_prompts_and_responses_are_transformers_rendering_with_these_values(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    for text, values in ((None, {}), (OFF, {"enable_thinking": False}), ('{"enable_thinking": true}', {})):
        tokenizer = load_tokenizer(folder, chat_template_kwargs=text)
        expected = plain.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **values)
        assert prompt_ids(tokenizer, CHAT) == expected
        assert response_ids(tokenizer, CHAT, "w3") == plain.encode("w3 <end>")
        prompt, ids, _ = conversation_ids(tokenizer, [*CHAT, {"role": "assistant", "content": "w3"}])
        assert (prompt, ids) == (expected, plain.encode("w3 <end>"))
    assert len(expected) + 2 == len(prompt_ids(load_tokenizer(folder, chat_template_kwargs=OFF), CHAT))


def test_training_tokens_and_their_fingerprint_follow_the_values(folder: Path, tmp_path: Path) -> None:
    groups = write_lines(tmp_path / "groups.jsonl", preference_groups(3))
    data = {}
    for text in (None, OFF, '{"enable_thinking": true}'):
        tokenizer = load_tokenizer(folder, chat_template_kwargs=text)
        data[text] = tokenize(groups, tokenizer, scored("short_chosen", "short_rejected"), 256)
    assert data[None].fingerprint == data['{"enable_thinking": true}'].fingerprint != data[OFF].fingerprint
    thought = AutoTokenizer.from_pretrained(folder).encode("w58 w59")
    assert all(list(group.prompts[0].ids[-2:]) == thought for group in data[OFF].groups)


def test_a_training_run_tokenizes_with_them(folder: Path, tmp_path: Path) -> None:
    groups = write_lines(tmp_path / "groups.jsonl", preference_groups(3))
    required = ["--hf-path", str(folder), "--train-data", str(groups), "--save", "run", "--train-iters", "1"]
    default, off = (load_data(load([*required, *more])[0]) for more in ([], ["--chat-template-kwargs", OFF]))
    for one, other in ((default.train, off.train), (default.reference["train"], off.reference["train"])):
        assert one.fingerprint != other.fingerprint
        assert [len(g.prompts[0].ids) + 2 for g in one.groups] == [len(g.prompts[0].ids) for g in other.groups]


def test_a_training_run_ends_turns_with_the_token_of_the_option(folder: Path, tmp_path: Path) -> None:
    groups = write_lines(tmp_path / "groups.jsonl", preference_groups(2))
    required = ["--hf-path", str(folder), "--train-data", str(groups), "--save", "run", "--train-iters", "1"]
    data = load_data(load([*required, "--eos-token", "<user>"])[0])
    (end,) = AutoTokenizer.from_pretrained(folder).encode("<user>")
    assert {c.ids[-1] for group in data.train.groups for prompt in group.prompts for c in prompt.completions} == {end}


def test_an_exported_folder_keeps_its_runs_values(folder: Path, tmp_path: Path) -> None:
    """They are in tokenizer_config.json, every command reads them there, and the option overrides them."""
    (tmp_path / "hf").mkdir()
    SidecarFiles(folder, "{}", chat_template_kwargs=OFF).write(tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["chat_template_kwargs"] == {"enable_thinking": False}
    off, default = (prompt_ids(load_tokenizer(folder, chat_template_kwargs=text), CHAT) for text in (OFF, None))
    assert prompt_ids(load_tokenizer(tmp_path / "hf"), CHAT) == off != default
    assert prompt_ids(load_tokenizer(tmp_path / "hf", chat_template_kwargs="{}"), CHAT) == default
    (tmp_path / "again").mkdir()
    SidecarFiles(tmp_path / "hf", "{}").write(tmp_path / "again")
    assert prompt_ids(load_tokenizer(tmp_path / "again"), CHAT) == off


WRONG = [
    ('{"a": 1, "a": 2}', "json-key-twice", '"a"'),
    ("{", "not-json", "{: ", "at column 2"),
    ("[1]", "option-value", "[1]: ", "JSON object"),
    ('{"thinking": 1}', "template-variable", "no variable thinking; it has enable_thinking"),
    ('{"messages": []}', "template-variable", "messages is set by every command"),
    ('{"tokenize": true}', "template-variable", "tokenize is set by every command"),
]


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0])
def test_wrong_values_are_one_line(folder: Path, row: tuple[str, ...]) -> None:
    text, code, *named = row
    with refused(code, "--chat-template-kwargs", *named):
        load_tokenizer(folder, chat_template_kwargs=text)


def test_every_command_refuses_them(folder: Path, tmp_path: Path) -> None:
    contexts = {
        "id": "q",
        "question": "?",
        "answers": ["w1"],
        "short_messages": CHAT,
        "long_messages": CHAT,
        "short_tokens": 4,
        "long_tokens": 4,
        "source": "test",
    }
    write_lines(tmp_path / "contexts.jsonl", [contexts])
    document = tmp_path / "document.txt"
    document.write_text("w1")
    paragraph = {"idx": 0, "title": "t", "paragraph_text": "w1", "is_supporting": True}
    question = {"id": "q", "question": "?", "answer": "w1", "answer_aliases": [], "paragraphs": [paragraph]}
    data = write_lines(tmp_path / "questions.jsonl", [question])
    output, end = str(tmp_path / "out.json"), ["--chat-template-kwargs", '{"thinking": 1}']
    model, sizes = ["--model", str(folder)], ["--short-documents", "1", "--long-documents", "1"]
    commands: list[tuple[Any, list[str]]] = [
        (prepare_data, ["--data", str(data), "--tokenizer", str(folder), "--output", output, *sizes]),
        (sample_responses, [*model, "--contexts", str(tmp_path / "contexts.jsonl"), "--output", output]),
        (evaluate, [*model, "--data", str(data), "--context-documents", "1", "--output", output]),
        (ask, [*model, "--document", str(document), "--question", "?"]),
    ]
    for main, arguments in commands:
        with refused("template-variable", "no variable thinking"):
            main([*arguments, *end])


def test_a_training_run_has_them_as_text_or_mapping(tmp_path: Path) -> None:
    required = ["--hf-path", "model", "--train-data", "data.jsonl", "--save", "run", "--train-iters", "1"]
    config, _ = load([*required, "--chat-template-kwargs", '{ "b": 1,"a": false }'])
    assert config.model.chat_template_kwargs == '{"a": false, "b": 1}'
    path = tmp_path / "config.yaml"
    for yaml in ("{b: 1, a: false}", """'{"b": 1, "a": false}'"""):
        path.write_text(f"model:\n  chat_template_kwargs: {yaml}\n")
        assert load(["--config", str(path), *required])[0].model.chat_template_kwargs == '{"a": false, "b": 1}'
    path.write_text("model:\n  hf_path: {a: 1}\n")
    with refused("option-value", "model.hf_path: ", "str"):
        load(["--config", str(path), *required[2:]])
    with refused("not-json", "--chat-template-kwargs {: "):
        load([*required, "--chat-template-kwargs", "{"])
