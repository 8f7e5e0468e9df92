"""Prompt and response ids are the template's rendering, each end of turn exactly once; masks of conversations."""

import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from refusals import refused
from segment_names import scored
from token_data import tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer, prompt_ids, response_ids

EXAMPLES = Path(__file__).parents[2] / "examples"
CHATML = EXAMPLES / "chat_templates" / "chatml.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>"]
LLAMA3 = (  # a token before everything, contents trimmed, nothing after the end of turn
    "<|endoftext|>{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
PLAIN = (  # writes no end of turn at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # shows thoughts in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = (  # the generation prompt opens a thought that a stored answer does not have
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
R1 = (  # drops thoughts from every answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if m.role == 'assistant' else "
    "m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # takes the last answer's thought apart and writes it again
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "<think>\n{{ thought.strip('\n') if '</think>' in m.content }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}<|eot|>{% endfor %}"
)


def byte_tokenizer(template, eos="<|endoftext|>"):
    """One token a byte, so that token boundaries cannot differ between a text and its parts."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({byte: index for index, byte in enumerate(bytes_)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def facts_tokenizer(folder):
    spec = importlib.util.spec_from_file_location("quickstart_facts", EXAMPLES / "quickstart" / "facts.py")
    facts = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = facts  # dataclasses look their module up
    spec.loader.exec_module(facts)
    facts.write_tokenizer(folder)
    return load_tokenizer(folder)


def make(name, folder):
    """A tokenizer as `load_tokenizer` returns it from a folder."""
    if name == "facts":
        return facts_tokenizer(folder)
    byte_tokenizer(
        {
            "chatml": None,
            "llama3": LLAMA3,
            "plain": PLAIN,
            "thinking": THINKING,
            "opened": OPENED,
            "r1": R1,
            "qwen3": QWEN3,
        }[name]
    ).save_pretrained(folder)
    return load_tokenizer(folder, CHATML if name == "chatml" else None)


@pytest.fixture(params=["facts", "chatml", "llama3", "plain"])
def tokenizer(request, tmp_path):
    return make(request.param, tmp_path)


@pytest.fixture(scope="module")
def qwen(solopo_data):
    return load_tokenizer(solopo_data / "tokenizers" / "qwen2", CHATML)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ONE_TURN = [
    ([user("What does Dorin sell?")], "lanterns"),
    ([user("Dolka keeps owls. What does Dolka keep?")], "owls flutes"),
    ([{"role": "system", "content": "What?"}, user("What does Dorin sell?"), assistant("keys"), user("What?")], "maps"),
]


def check_one_turn(tokenizer, messages, response):
    prompt, answer = prompt_ids(tokenizer, messages), response_ids(tokenizer, messages, response)
    ids = prompt + answer
    assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(answer[:-1]).strip() == response.strip()
    rendered = tokenizer.apply_chat_template([*messages, assistant(response)], return_dict=False)
    if tokenizer.eos_token_id in rendered:
        assert rendered[: len(ids)] == ids  # what the template writes after the end of turn is left out
    else:
        assert rendered == ids[:-1]  # and the end of turn is put where the template writes none


@pytest.mark.parametrize("messages,response", ONE_TURN)
def test_prompt_and_response_are_the_templates_rendering(tokenizer, messages, response):
    check_one_turn(tokenizer, messages, response)


@pytest.mark.parametrize(
    "messages,response", [*ONE_TURN, ([user("Où est 東京?\n\nSay: 12,5")], "In **Japan**, \n\n日本 — 3.5 %.")]
)
def test_prompt_and_response_of_the_real_qwen2_tokenizer(qwen, messages, response):
    check_one_turn(qwen, messages, response)
    assert qwen.eos_token == "<|im_end|>" and qwen.eos_token_id == 151645


def test_an_answer_without_tokens_is_refused(tmp_path):
    tokenizer = make("llama3", tmp_path)
    with refused("response-empty"):
        response_ids(tokenizer, [user("hi")], "  ")


def test_templates_that_rewrite_keep_the_sampled_response(tmp_path):
    tokenizer = make("opened", tmp_path)
    ids = response_ids(tokenizer, [user("hi")], "sure</think>yes")
    assert tokenizer.decode(ids) == "sure</think>yes<|im_end|>"


THOUGHT = "<think>\nFrance has one.\n</think>\nAnswer: Paris"


def test_templates_that_drop_a_thought_keep_the_sampled_response(tmp_path):
    tokenizer = make("r1", tmp_path)
    for response in (THOUGHT, "<think>\nonly a thought\n</think>"):
        ids = response_ids(tokenizer, [user("hi")], response)
        assert tokenizer.decode(ids) == response + "<|im_end|>"
        prompt, ids, loss_mask = conversation_ids(tokenizer, [user("hi"), assistant(response)])
        assert tokenizer.decode(ids) == response + "<|im_end|>" and all(loss_mask)
        assert prompt == prompt_ids(tokenizer, [user("hi")])
    assert tokenizer.decode(response_ids(tokenizer, [user("hi")], "no thought")) == "no thought<|im_end|>"
    with refused("chat-template-rewrites"):
        conversation_ids(tokenizer, [user("a"), assistant(THOUGHT), user("c"), assistant("d")])
    check_conversation(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


RESPONSES = ["yes", " two\n\n  lines \n", THOUGHT, THOUGHT.replace("\nA", "\n\nA"), "</think>x"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("response", RESPONSES)
def test_what_an_ordinary_template_writes_is_trained_on(name, response, tmp_path):
    """With any spaces that it writes around a response: its rendering behind the prompt, to the end of turn."""
    tokenizer = make(name, tmp_path)
    rendered = tokenizer.apply_chat_template([user("hi"), assistant(response)], tokenize=False)
    prompt = tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    end = tokenizer.eos_token
    written = rendered.removeprefix(prompt).partition(end)[0] + end
    assert written != rendered and tokenizer.decode(response_ids(tokenizer, [user("hi")], response)) == written


def test_what_real_templates_write_is_trained_on(qwen, solopo_data):
    """Qwen2's ChatML and the template of a Llama 3 style folder, on answers of a real set."""
    for tokenizer in (qwen, load_tokenizer(solopo_data / "tokenizers" / "tiny_llama3_style")):
        with (solopo_data / "musique" / "musique_ans_train_subset.jsonl").open(encoding="utf-8") as lines:
            for record in map(json.loads, islice(lines, 50)):
                messages = [user(record["question"])]
                before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                for response in (record["answer"], record["paragraphs"][0]["paragraph_text"], THOUGHT):
                    full = tokenizer.apply_chat_template([*messages, assistant(response)], tokenize=False)
                    written = tokenizer(full.removeprefix(before), add_special_tokens=False)["input_ids"]
                    end = written.index(tokenizer.eos_token_id)
                    assert full.startswith(before)
                    assert response_ids(tokenizer, messages, response) == written[: end + 1]


CONVERSATIONS = [
    [
        user("What does Dorin sell?"),
        assistant("lanterns"),
        user("What?"),
        assistant("keys flutes"),
        user("What does Dolka keep?"),
        assistant("owls"),
    ],
    [{"role": "system", "content": "What?"}, user("What?"), assistant("keys")],
    [user("What?"), user("What does Dorin sell?"), assistant("keys"), assistant("owls"), user("never answered")],
]


def check_conversation(tokenizer, messages):
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt, ids, loss_mask = conversation_ids(tokenizer, messages)
    assert len(ids) == len(loss_mask) and loss_mask[0] and loss_mask[-1]
    assert prompt == prompt_ids(tokenizer, messages[: turns[0]])
    expected = [token for i in turns for token in response_ids(tokenizer, messages[:i], messages[i]["content"])]
    assert [token for token, trained in zip(ids, loss_mask, strict=True) if trained] == expected
    rendered = tokenizer.apply_chat_template(messages[: turns[-1] + 1], return_dict=False)
    if tokenizer.eos_token_id in rendered:
        assert rendered[: len(prompt) + len(ids)] == prompt + ids
        assert tokenizer.decode(rendered[len(prompt) + len(ids) :]).strip() == ""
    for i in turns[1:]:  # the same sequence as the turn alone
        alone = prompt_ids(tokenizer, messages[:i])
        if tokenizer.eos_token_id in rendered:
            assert (prompt + ids)[: len(alone)] == alone


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer, messages):
    check_conversation(tokenizer, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_of_the_real_qwen2_tokenizer(qwen, messages):
    check_conversation(qwen, messages)


def test_a_conversation_is_trained_on_turn_by_turn(tmp_path):
    tokenizer = make("chatml", tmp_path)
    prompt, ids, loss_mask = conversation_ids(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])
    parts = [[], []]
    for token, trained in zip(ids, loss_mask, strict=True):
        parts[trained].append(token)
    assert tokenizer.decode(parts[True]) == "b<|im_end|>d<|im_end|>"
    assert tokenizer.decode(parts[False]) == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_a_template_that_rewrites_earlier_turns_is_refused_for_conversations(tmp_path):
    tokenizer = make("opened", tmp_path)
    with refused("chat-template-rewrites"):
        conversation_ids(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_a_template_that_opens_a_thought_trains_on_the_answer_of_one_turn(tmp_path):
    tokenizer = make("opened", tmp_path)
    prompt, ids, loss_mask = conversation_ids(tokenizer, [user("hi"), assistant("sure</think>yes")])
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>")
    assert tokenizer.decode(ids) == "sure</think>yes<|im_end|>" and all(loss_mask)
    with refused("chat-template-rewrites"):
        conversation_ids(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_the_end_of_turn_is_the_templates(tmp_path):
    """Folders name the end of a text; the token that ends a turn is what the template writes after an answer."""
    assert {name: make(name, tmp_path / name).eos_token for name in ("facts", "chatml", "llama3", "plain")} == {
        "facts": "<end>",
        "chatml": "<|im_end|>",
        "llama3": "<|eot|>",
        "plain": "<|endoftext|>",
    }
    assert load_tokenizer(tmp_path / "llama3", eos_token="<|im_end|>").eos_token == "<|im_end|>"


def test_tokenizer_problems_get_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    byte_tokenizer(None).save_pretrained(tmp_path / "bare")
    byte_tokenizer(PLAIN, eos=None).save_pretrained(tmp_path / "endless")
    cases = [
        ((tmp_path / "absent",), "folder-missing", "absent: "),
        ((tmp_path / "empty",), "tokenizer-unreadable", "empty: ", "tokenizer.json"),
        ((tmp_path / "bare",), "chat-template-missing", "bare: ", "--chat-template"),
        ((tmp_path / "bare", tmp_path / "absent.jinja"), "file-missing", "--chat-template ", "absent.jinja: "),
        ((tmp_path / "bare", CHATML, "<stop>"), "token-unknown", "--eos-token <stop>: ", "bare"),
        ((tmp_path / "endless",), "eos-token-missing", "endless: ", "tokenizer_config.json"),
    ]
    for arguments, code, *named in cases:
        with refused(code, *named):
            load_tokenizer(*arguments)


@pytest.mark.parametrize(
    "record,role,code,named",
    [
        (
            '{"id": "g7", "short_messages": [{"role": "system", "content": "s"}], "chosen": "a", "rejected": "b"}',
            "short_chosen",
            "chat-template-refuses",
            ("data.jsonl: group 'g7': ", "(System role not supported)"),
        ),
        (
            '{"id": "g8", "short_messages": [{"role": "user", "content": "s"}], "chosen": "a", "rejected": "b"}',
            "long_chosen",
            "long-context-missing",
            ("data.jsonl: group 'g8': ", "long_messages", "--context-mode short"),
        ),
        (
            '{"id": "c9", "messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]}',
            "response",
            "chat-template-refuses",
            ("data.jsonl: conversation 'c9': ",),
        ),
    ],
)
def test_what_a_template_refuses_is_named(tmp_path, record, role, code, named):
    (tmp_path / "data.jsonl").write_text(record + "\n")
    with refused(code, *named):
        tokenize(tmp_path / "data.jsonl", byte_tokenizer(STRICT, "<|eot|>"), scored(role), 64)
