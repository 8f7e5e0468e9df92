"""The loss mask covers what a model generates after the generation prompt, with any chat template."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from refusals import refused
from segment_names import scored
from test_chat import LLAMA3, SPECIAL, assistant, byte_tokenizer, user
from tiny_models import write_lines
from token_data import tokenize
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.sampling.prompts import Prompt
from megatron_solopo.data.sampling.sampled import Statistics, from_ids, from_texts
from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer, prompt_ids, response_ids

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # a space before an answer, and one behind it
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% else %}<|head|>{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
R1 = (  # opens a thought, and drops the thoughts of the past
    "{% for m in messages %}{% if m.role == 'assistant' %}<|head|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|tail|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|head|><think>\n{% endif %}"
)
SPLIT = (  # Qwen3's: the last answer's thought, or an empty one, is written anew; those of the past are dropped
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set c = m.content %}{% set thought = '' %}{% if '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}{% else %}{{ c }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN3 = SPLIT + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
QWEN3_THINKING = SPLIT + "<think>\n{% endif %}"
ALWAYS = (  # an empty thought in every answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think> {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
HARMONY = (  # control tokens between the role and the answer
    "{% for m in messages %}<|head|>{{ m.role }}{% if m.role == 'assistant' %}<|tail|>final{% endif %}<|endoftext|>"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant{% endif %}"
)
MOVED = (  # writes the answer before the question
    "{% if messages | length > 1 %}{{ messages[1].content }}<|im_end|>{% endif %}"
    "<|head|>{{ messages[0].content }}<|tail|>"
)

GLM45 = (  # no token ends a turn; an empty thought in every answer without one
    "<|tail|>{% for m in messages %}<|head|>{{ m.role }}\n{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in c %}<think>{{ c.split('</think>')[0].split('<think>')[-1].strip() }}</think>\n"
    "{{ c.split('</think>')[-1].strip() }}{% else %}<think></think>\n{{ c.strip() }}{% endif %}"
    "{% else %}{{ c }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|head|>assistant\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)

THOUGHT = "France has one.\n</think>\n\nAnswer: Paris"
BOTH = f"<think>\n{THOUGHT}"
TABLE = [
    # template, its values, the response, what is trained on before the end of turn
    (CHATML, None, "room 0", "room 0"),
    (CHATML, None, " room\n", " room\n"),
    (CHATML, None, BOTH, BOTH),
    (LLAMA3, None, " room 0\n", "room 0"),
    (LLAMA2, None, "room 0", " room 0 "),
    (LLAMA2, None, " room 0", " room 0 "),
    (R1, None, THOUGHT, THOUGHT),
    (R1, None, "room 0", "room 0"),
    (R1, None, BOTH, THOUGHT),
    (R1, None, "<think>I think.</think> room 0", "I think.</think> room 0"),
    (QWEN3, None, "room 0", "room 0"),
    (QWEN3, None, BOTH, BOTH),
    (QWEN3, None, "<think>\nI think.</think>room 0", "<think>\nI think.</think>room 0"),
    (QWEN3, None, "x</think>", "x</think>"),
    (QWEN3, '{"enable_thinking": false}', "room 0", "room 0"),
    (QWEN3, '{"enable_thinking": false}', "\nroom </think> 0", "\nroom </think> 0"),
    (QWEN3, '{"enable_thinking": false}', "<think>\n\n</think>\n\nroom 0", "room 0"),
    (QWEN3_THINKING, None, THOUGHT, THOUGHT),
    (QWEN3_THINKING, None, BOTH, THOUGHT),
    (QWEN3_THINKING, None, "I think.</think>room 0", "I think.</think>room 0"),
    (QWEN3_THINKING, None, "room 0", "room 0"),
    (ALWAYS, None, " I think. </think> room 0", " I think. </think> room 0"),
    (ALWAYS, None, "room 0", "room 0"),
    (HARMONY, None, "room 0", "<|tail|>final<|endoftext|>room 0"),
    (GLM45, None, BOTH, BOTH),
    (GLM45, '{"enable_thinking": false}', "room 0", "\nroom 0"),
    (MOVED, None, "room 0", "room 0"),
]


def make(folder: Path, template: str, values: str | None = None) -> PreTrainedTokenizerBase:
    byte_tokenizer(template, END).save_pretrained(folder)
    return load_tokenizer(folder, chat_template_kwargs=values)


@pytest.mark.parametrize(("template", "values", "response", "trained"), TABLE)
def test_the_response_follows_the_generation_prompt(
    template: str, values: str | None, response: str, trained: str, tmp_path: Path
) -> None:
    tokenizer = make(tmp_path, template, values)
    ids = response_ids(tokenizer, [user("hi")], response)
    assert tokenizer.decode(ids) == trained + tokenizer.eos_token
    prompt, continuation, taken = conversation_ids(tokenizer, [user("hi"), assistant(response)])
    assert (prompt, continuation) == (prompt_ids(tokenizer, [user("hi")]), ids) and all(taken)


@pytest.mark.parametrize(("template", "values"), dict.fromkeys(row[:2] for row in TABLE))
def test_what_was_sampled_is_trained_on_to_the_id(template: str, values: str | None, tmp_path: Path) -> None:
    """Sampled ids, spaces, tags and control tokens among them, come back from responses and groups as they were."""
    tokenizer = make(tmp_path, template, values)
    end, draw = tokenizer.eos_token_id, random.Random(0)
    texts = [*(name for name in SPECIAL if name != tokenizer.eos_token), "<think>", "</think>", "\n", " ", "a"]
    sampled = [tokenizer.encode("a" + "".join(draw.choices(texts, k=6))) for _ in range(30)]
    prompt = Prompt("q", [user("hi")], prompt_ids(tokenizer, [user("hi")]))
    done = from_ids(tokenizer, prompt, [[*ids, end] for ids in sampled], [True] * 30, [end], Statistics())
    for number, ids in enumerate(sampled[1:], 1):
        kept = done.token_ids or [None] * 30
        if done.responses[0] == done.responses[number]:
            continue
        record = {"id": "g", "short_messages": prompt.messages, "chosen_ids": kept[0], "rejected_ids": kept[number]}
        record |= {"chosen": done.responses[0], "rejected": done.responses[number]}
        data = tokenize(
            write_lines(tmp_path / "g.jsonl", [record]), tokenizer, scored("short_chosen", "short_rejected"), 999
        )
        (only,) = data.groups[0].prompts
        assert list(only.ids) == list(prompt.ids)
        assert [list(one.ids) for one in only.completions] == [[*sampled[0], end], [*ids, end]]


# The form of models' templates without tools, written again: no copy of their files.
TURN = "{% for m in messages %}"
OF_FOLDERS = {
    "glm4_0414": TURN
    + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "deepseek_v2": TURN
    + "{% if m.role == 'user' %}User: {{ m.content }}\n\n{% elif m.role == 'system' %}{{ m.content }}"
    "\n\n{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "mistral_small_3": "{{ bos_token }}" + TURN + "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
    "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "smollm3": TURN + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and enable_thinking is false %}<think>\n\n"
    "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}{% endif %}",
    "olmo2": "{{ bos_token }}"
    + TURN
    + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "phi4": TURN + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
}
# Those that TRL has as files; and tokens of the tokenizers.
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
TOKENS = {
    "gptoss": ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
    "qwen3_5_think": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "qwen3_5_nothink": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "qwen3_6": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "qwen3_instruct_2507": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "deepseekv3": ("<|begin|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"),
    "deepseek_v2": ("<|begin|>", "<|end|>"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    "phi4": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"),
    "mistral_small_3": ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "smollm3": ("<|begin_of_text|>", "<|im_end|>", "<|im_start|>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>"),
    "glm4_0414": ("[gMASK]", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
    "glm4moe": ("[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
}
WITHOUT_THOUGHT = '{"enable_thinking": false}'
OF_FAMILIES = [
    # template, its values, --eos-token, the response, the end of the prompt, what is trained on
    (
        "gptoss",
        None,
        None,
        "room 0",
        "Be brief.\n\n<|end|><|start|>user<|message|>hi<|end|><|start|>assistant",
        "<|channel|>final<|message|>room 0<|return|>",
    ),
    (
        "qwen3_5_think",
        None,
        None,
        THOUGHT,
        "Be brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n",
        f"{THOUGHT}<|im_end|>",
    ),
    ("qwen3_5_think", None, None, BOTH, "<|im_start|>assistant\n<think>\n", f"{THOUGHT}<|im_end|>"),
    (
        "qwen3_5_think",
        WITHOUT_THOUGHT,
        None,
        "room 0",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "room 0<|im_end|>",
    ),
    ("qwen3_5_nothink", None, None, "room 0", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "room 0<|im_end|>"),
    (
        "qwen3_5_nothink",
        '{"enable_thinking": true}',
        None,
        THOUGHT,
        "<|im_start|>assistant\n<think>\n",
        f"{THOUGHT}<|im_end|>",
    ),
    (
        "gemma3",
        None,
        None,
        "room 0",
        "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n",
        "room 0<end_of_turn>",
    ),
    ("glm4moe", None, None, BOTH, "<|system|>\nBe brief.<|user|>\nhi<|assistant|>", f"{BOTH}<|endoftext|>"),
    ("glm4moe", WITHOUT_THOUGHT, None, "room 0", "hi/nothink<|assistant|>\n<think></think>", "\nroom 0<|endoftext|>"),
    ("qwen3_6", None, None, THOUGHT, "hi<|im_end|>\n<|im_start|>assistant\n<think>\n", f"{THOUGHT}<|im_end|>"),
    ("qwen3_instruct_2507", None, None, "room 0", "hi<|im_end|>\n<|im_start|>assistant\n", "room 0<|im_end|>"),
    ("deepseekv3", None, None, THOUGHT, "Be brief.<｜User｜>hi<｜Assistant｜><think>\n", f"{THOUGHT}<|end|>"),
    ("deepseek_v2", None, None, "room 0", "Be brief.\n\nUser: hi\n\nAssistant:", " room 0<|end|>"),
    ("phi3", None, None, "room 0", "<|user|>\nhi<|end|>\n<|assistant|>\n", "room 0<|end|>"),
    ("phi4", None, None, "room 0", "hi<|im_end|><|im_start|>assistant<|im_sep|>", "room 0<|im_end|>"),
    ("mistral_small_3", None, None, "room 0", "Be brief.[/SYSTEM_PROMPT][INST]hi[/INST]", "room 0</s>"),
    ("smollm3", None, None, BOTH, "hi<|im_end|>\n<|im_start|>assistant\n", f"{BOTH}<|im_end|>"),
    ("smollm3", WITHOUT_THOUGHT, None, "room 0", "assistant\n<think>\n\n</think>\n", "room 0<|im_end|>"),
    ("olmo2", None, None, "room 0", "<|user|>\nhi\n<|assistant|>\n", "room 0<|endoftext|>"),
    ("glm4_0414", None, None, "room 0", "<|user|>\nhi<|assistant|>", "\nroom 0<|endoftext|>"),
    ("glm4moe", WITHOUT_THOUGHT, "<|user|>", "room 0", "hi/nothink<|assistant|>\n<think></think>", "\nroom 0<|user|>"),
]


@pytest.mark.parametrize(("name", "values", "end", "response", "prompt", "trained"), OF_FAMILIES)
def test_the_templates_of_families(
    name: str, values: str | None, end: str | None, response: str, prompt: str, trained: str, tmp_path: Path
) -> None:
    """The prompt ends where generation starts, and the loss covers the answer, its channel and the end of its turn."""
    begin, eos, *others = TOKENS[name]
    tokenizer = byte_tokenizer(OF_FOLDERS.get(name) or (TEMPLATES / f"{name}.jinja").read_text(), eos)
    tokenizer.add_special_tokens({"bos_token": begin, "additional_special_tokens": others})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, eos_token=end, chat_template_kwargs=values)
    system = {"role": "system", "content": "Be brief."}
    before, after, taken = conversation_ids(tokenizer, [system, user("hi"), assistant(response)])
    assert tokenizer.decode(before).endswith(prompt) and "Be brief." in tokenizer.decode(before)
    assert tokenizer.decode(after) == trained and all(taken)
    assert prompt_ids(tokenizer, [system, user("hi")]) == before
    assert response_ids(tokenizer, [system, user("hi")], response) == after
    assert {name for name in others if name in trained} <= {tokenizer.decode([token]) for token in after}


def test_a_system_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    """gpt-oss's writes one at the beginning alone; a text that a template takes out of it is not missed."""
    tokenizer = make(tmp_path, CHATML.replace("{{ m.content }}", "{{ m.content.replace('/think', '') }}"))
    prompt_ids(tokenizer, [{"role": "system", "content": "/think"}, user("hi")])
    tokenizer.chat_template = (TEMPLATES / "gptoss.jinja").read_text()
    with refused("chat-template-refuses", "does not write message 2, whose role is system"):
        prompt_ids(tokenizer, [user("hi"), {"role": "system", "content": "Be brief."}])


TURNS = [user("a"), assistant("b"), user("c"), assistant("d")]
THINKING_TURNS = [user("a"), assistant("b"), user("c"), assistant("<think>\nx\n</think>\n\nd")]


@pytest.mark.parametrize(
    ("template", "values", "turns"),
    [
        (CHATML, None, THINKING_TURNS),
        (LLAMA3, None, TURNS),
        (LLAMA2, None, TURNS),
        (QWEN3, None, TURNS),
        (QWEN3, None, THINKING_TURNS),
    ],
)
def test_every_turn_follows_its_generation_prompt(
    template: str, values: str | None, turns: list[dict[str, str]], tmp_path: Path
) -> None:
    """Prompt and turn by turn are the sequence that a conversation with the model is."""
    tokenizer = make(tmp_path, template, values)
    prompt, ids, loss_mask = conversation_ids(tokenizer, turns)
    first = response_ids(tokenizer, turns[:1], "b")
    second = [*prompt_ids(tokenizer, turns[:3]), *response_ids(tokenizer, turns[:3], turns[3]["content"])]
    assert prompt + ids == second and (prompt + ids)[len(prompt) :][: len(first)] == first
    taken = [token for token, trained in zip(ids, loss_mask, strict=True) if trained]
    assert taken == [*first, *response_ids(tokenizer, turns[:3], turns[3]["content"])]


@pytest.mark.parametrize(
    ("template", "values"), [(R1, None), (QWEN3, '{"enable_thinking": false}'), (QWEN3_THINKING, None), (ALWAYS, None)]
)
def test_turns_that_the_template_rewrites_are_refused(template: str, values: str | None, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, template, values)
    path = write_lines(tmp_path / "c.jsonl", [{"id": "c1", "messages": TURNS}])
    with refused("chat-template-rewrites", "c.jsonl: conversation 'c1': "):
        tokenize(path, tokenizer, scored("response"), 999)


def test_a_thought_behind_a_closed_one_is_refused(tmp_path: Path) -> None:
    """Where it is only a text; sampled ids are what was sampled."""
    tokenizer = make(tmp_path, QWEN3, '{"enable_thinking": false}')
    record = {"id": "g1", "short_messages": [user("hi")], "chosen": BOTH, "rejected": "no"}
    path = tmp_path / "g.jsonl"
    with refused("response-reopens-thought", "group 'g1': ", "<think>", "--chat-template-kwargs"):
        tokenize(write_lines(path, [record]), tokenizer, scored("short_chosen"), 999)
    ids = tokenizer.encode(BOTH)
    data = tokenize(write_lines(path, [record | {"chosen_ids": ids}]), tokenizer, scored("short_chosen"), 999)
    assert list(data.groups[0].prompts[0].completions[0].ids) == [*ids, tokenizer.eos_token_id]
    counts = Statistics()
    prompt = Prompt("q", [user("hi")], prompt_ids(tokenizer, [user("hi")]))
    assert from_texts(tokenizer, prompt, [BOTH], [True], len(ids) + 1, counts).responses == [BOTH]
    assert from_ids(tokenizer, prompt, [ids], [False], [], counts).token_ids == [ids] and counts.mismatches == 2


def test_answers_inside_an_open_thought_are_counted_and_listed(tmp_path: Path) -> None:
    tokenizer, roles = make(tmp_path, R1), scored("short_chosen", "short_rejected")
    texts = [("a</think>b", "c</think>d"), ("a", "c</think>d"), ("a</think>b", "<think>c")]
    records = [
        {"id": f"g{n}", "short_messages": [user("hi")], "chosen": chosen, "rejected": rejected}
        for n, (chosen, rejected) in enumerate(texts)
    ]
    records.append(records[1] | {"id": "g3", "chosen_ids": tokenizer.encode("a")})
    path = write_lines(tmp_path / "g.jsonl", records)
    report = tokenize(path, tokenizer, roles, 999).report
    assert report.open == ["g1", "g2"] and "responses of 2 examples do not close the thought" in report.lines(9)[-1]
    plain = make(tmp_path / "plain", QWEN3)
    assert not tokenize(path, plain, roles, 999).report.open


INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
PIECES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("template", [INST, CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")])
def test_sentencepiece_puts_no_second_space_before_an_answer(
    name: str, legacy: bool, template: str, tmp_path: Path, solopo_data: Path
) -> None:
    """Mistral's tokenizers put a space before a text without its prompt; the ids of the complete chat are right."""
    (tmp_path / "tokenizer.model").write_bytes((solopo_data / "tokenizers" / "mistral" / PIECES[name]).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tokenizer_config.json").write_text(f'{{"legacy": {str(legacy).lower()}}}')
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path, tmp_path / "t.jinja")
    for response in ("answer", "12,5 %", "In **Japan**,\n日本"):
        turns = [user("Where?"), assistant(response), user("Why?"), assistant("So.")]
        complete = tokenizer.apply_chat_template(turns[:2], return_dict=False)
        one = [*prompt_ids(tokenizer, turns[:1]), *response_ids(tokenizer, turns[:1], response)]
        assert one == complete[: len(one)] and one[-1] == tokenizer.eos_token_id
        prompt, ids, _ = conversation_ids(tokenizer, turns)
        complete = tokenizer.apply_chat_template(turns, return_dict=False)
        assert prompt + ids == complete[: len(prompt) + len(ids)]
