"""Responses of several turns with tool calls, through real chat templates: what is trained is the assistant's alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from token_data import encoded

from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer, prompt_ids, turns_ids
from megatron_solopo.data.tokenized.token_store import SHORT_PAIR

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
