"""Responses of several turns with tool calls, through real chat templates: what is trained is the assistant's alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from token_data import encoded

from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer, prompt_ids, turns_ids
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, SHORT_PAIR
from megatron_solopo.data.tokenized.tokens import CONVERSATION

ASK: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Oslo?"}]


def call(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


RESULT, ANSWER = {"role": "tool", "content": "rain <|im_end|> 4 C"}, {"role": "assistant", "content": "Rain, 4 C."}
TURNS = [call("Oslo"), RESULT, call("Bergen"), RESULT, ANSWER]

QWEN_CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3_instruct_2507"])
def tokenizer(request: pytest.FixtureRequest, solopo_data: Path) -> Any:
    """Qwen's tokenizer with a chat template of Qwen's that calls tools."""
    trl = pytest.importorskip("trl")
    template = Path(trl.__file__).parent / "chat_templates" / f"{request.param}.jinja"
    return load_tokenizer(solopo_data / "tokenizers" / "qwen2", template)


def group(**fields: Any) -> str:
    return json.dumps({"id": "g", "short_messages": ASK, **fields}) + "\n"


def parts(tokenizer: Any, ids: Any, loss_mask: Any) -> tuple[str, str]:
    """The text that is trained and the text that is not."""
    pairs = list(zip(ids, loss_mask, strict=True))
    return tuple(tokenizer.decode([i for i, trained in pairs if trained == which]) for which in (True, False))


def test_calls_and_answers_are_trained_and_results_are_not(tokenizer: Any, tmp_path: Path) -> None:
    """The ids are those of the whole rendered conversation; a result that spells a control token is text."""
    (tmp_path / "g.jsonl").write_text(group(chosen=TURNS, rejected="I do not know."))
    (example,) = encoded(tmp_path / "g.jsonl", tokenizer, SHORT_PAIR)
    (prompt,) = example.prompts
    chosen, rejected = prompt.completions
    trained, context = parts(tokenizer, chosen.ids, chosen.loss_mask)
    assert "".join(trained.split("\n")) == "".join(
        (QWEN_CALL.format("Oslo") + QWEN_CALL.format("Bergen") + "Rain, 4 C.<|im_end|>").split("\n")
    )
    assert context.count("<tool_response>\nrain <|im_end|> 4 C\n</tool_response>") == 2
    assert "weather" not in context and rejected.loss_mask is None
    assert list(prompt.ids) == prompt_ids(tokenizer, ASK)
    end = tokenizer.eos_token_id
    assert list(chosen.ids).count(end) == 3 + 2  # three turns of the assistant, two of the tool's; none of the texts'
    texts = [{**turn, "content": turn["content"] or ""} for turn in TURNS]
    plain = [{**turn, "content": turn["content"].replace(" <|im_end|>", "")} for turn in texts]
    whole = tokenizer.apply_chat_template([*ASK, *plain], return_dict=False)
    ids, _ = turns_ids(tokenizer, ASK, plain)
    assert whole[: len(prompt.ids) + len(ids)] == [*prompt.ids, *ids]


def test_a_call_alone_is_a_response_and_conversations_may_hold_calls(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text(group(chosen=[call("Oslo")], rejected=[call("Rome")]))
    (example,) = encoded(tmp_path / "g.jsonl", tokenizer, SHORT_PAIR)
    for completion, city in zip(example.prompts[0].completions, ("Oslo", "Rome"), strict=True):
        assert completion.loss_mask is None
        assert tokenizer.decode(completion.ids).strip() == QWEN_CALL.format(city)
    turns = [{**turn, "content": turn["content"] or ""} for turn in TURNS]
    prompt, ids, loss_mask = conversation_ids(tokenizer, [*ASK, *turns])
    assert (ids, loss_mask) == turns_ids(tokenizer, ASK, turns) and prompt == prompt_ids(tokenizer, ASK)


def test_a_template_that_leaves_calls_out_is_refused(solopo_data: Path, tmp_path: Path) -> None:
    """Plain ChatML would train an empty turn."""
    chatml = Path(__file__).parents[2] / "examples" / "chat_templates" / "chatml.jinja"
    plain = load_tokenizer(solopo_data / "tokenizers" / "qwen2", chatml)
    (tmp_path / "g.jsonl").write_text(group(chosen=TURNS, rejected="I do not know."))
    with refused("chat-template-refuses", "group 'g': ", "'weather'", "--chat-template"):
        encoded(tmp_path / "g.jsonl", plain, SHORT_PAIR)


def test_arguments_that_spell_control_tokens_are_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text(group(chosen=[call("O<|im_end|>slo")], rejected="no"))
    (example,) = encoded(tmp_path / "g.jsonl", tokenizer, SHORT_PAIR)
    ids = list(example.prompts[0].completions[0].ids)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert "O<|im_end|>slo" in tokenizer.decode(ids)


def weather(about: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"name": "weather", "description": about, "parameters": parameters}


FORMS: dict[str, Any] = {
    "a list": lambda tool: [{"type": "function", "function": tool}],
    "JSON text": lambda tool: json.dumps([{"type": "function", "function": tool}]),
    "bare, a null": lambda tool: [tool | {"strict": None}],
}
"""How records hold a tool."""


@pytest.mark.parametrize("form", FORMS)
def test_tools_beside_the_messages_are_part_of_every_prompt(tokenizer: Any, form: str, tmp_path: Path) -> None:
    """The ids are those of transformers; a description that spells a control token is text."""
    for about in ("Of a city.", "Of <|im_end|> a city."):
        tools = FORMS[form](weather(about))
        given = [weather(about)] if form.startswith("bare") else FORMS["a list"](weather(about))
        text = tokenizer.apply_chat_template(ASK, tools=given, add_generation_prompt=True, tokenize=False)
        records = [
            group(chosen=TURNS, rejected="No.", long_messages=ASK, tools=tools),
            json.dumps({"id": "f", "prompt": ASK, "chosen": TURNS, "rejected": "No.", "tools": tools}) + "\n",
        ]
        for record, scored in zip(records, (BOTH_PAIRS, SHORT_PAIR), strict=True):
            (tmp_path / "g.jsonl").write_text(record)
            (example,) = encoded(tmp_path / "g.jsonl", tokenizer, scored)
            for prompt in example.prompts:
                assert tokenizer.decode(prompt.ids) == text
                spelled = list(prompt.ids).count(tokenizer.eos_token_id)
                assert spelled == text.replace("Of <|im_end|>", "").count("<|im_end|>")
        (tmp_path / "c.jsonl").write_text(json.dumps({"id": "c", "messages": [*ASK, ANSWER], "tools": tools}) + "\n")
        (example,) = encoded(tmp_path / "c.jsonl", tokenizer, CONVERSATION)
        assert tokenizer.decode(example.prompts[0].ids) == text


def test_no_tools_are_no_difference(tokenizer: Any, tmp_path: Path) -> None:
    for tools in ([], None, "[]"):
        (tmp_path / "g.jsonl").write_text(group(chosen=TURNS, rejected="No.", tools=tools))
        (example,) = encoded(tmp_path / "g.jsonl", tokenizer, SHORT_PAIR)
        assert list(example.prompts[0].ids) == prompt_ids(tokenizer, ASK)


def test_a_template_that_leaves_tools_out_is_refused(solopo_data: Path, tmp_path: Path) -> None:
    chatml = Path(__file__).parents[2] / "examples" / "chat_templates" / "chatml.jinja"
    plain = load_tokenizer(solopo_data / "tokenizers" / "qwen2", chatml)
    (tmp_path / "g.jsonl").write_text(group(chosen="Yes.", rejected="No.", tools=[weather("")]))
    with refused("chat-template-refuses", "group 'g': ", "the tool 'weather'", "--chat-template"):
        encoded(tmp_path / "g.jsonl", plain, SHORT_PAIR)


@pytest.mark.parametrize("tools", [["weather"], {"name": "weather"}, [{"function": {}}], "weather"])
def test_what_is_no_tool_is_refused(tools: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text(group(chosen="Yes.", rejected="No.", tools=tools))
    with refused("field-type", "g.jsonl:1: ", "'tools'", "'function'"):
        encoded(tmp_path / "g.jsonl", tokenizer, SHORT_PAIR)
