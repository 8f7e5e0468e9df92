"""A text that spells control tokens is text, at any place and with any tokenizer."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from segment_names import scored
from test_chat import CHATML, R1, assistant, byte_tokenizer, user
from tiny_models import write_lines, write_model
from token_data import tokenize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_solopo.data.text.chat import (
    conversation_ids,
    load_tokenizer,
    prompt_ids,
    prompt_starts,
    render_prompt,
    response_ids,
)
from megatron_solopo.data.text.control import control_tokens
from megatron_solopo.data.text.counting import TokenCounter
from megatron_solopo.data.text.tokenizer import encode, encode_batch, parse_batch

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
FOLDERS = {
    "qwen2": ("qwen2", CHATML.read_text()),
    "llama3 style": ("tiny_llama3_style", None),
    "Mistral v0.1": ("mistral/tokenizer.model.v1", INST),
    "Mistral v0.1, not legacy": ("mistral/tokenizer.model.v1", INST),
    "Mistral v0.3": ("mistral/mistral_instruct_tokenizer_240323.model.v3", INST),
    "unigram": ("sentencepiece_test/test_model.model", INST),
}
WORDS = ["a document", " 12,5 %", "\n\n", "König 🙂", " two  spaces ", "<", "|>", "</", "s>", "<|im", "x"]


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request: pytest.FixtureRequest, solopo_data: Path, tmp_path_factory: pytest.TempPathFactory):
    name, template = FOLDERS[request.param]
    path = solopo_data / "tokenizers" / name
    folder = tmp_path_factory.mktemp("tokenizer")
    if path.is_dir():
        shutil.copytree(path, folder, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, folder / "tokenizer.model")
        (folder / "config.json").write_text('{"model_type": "mistral"}')
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": "not legacy" not in request.param}))
    if template is not None:
        (folder / "template.jinja").write_text(template)
    return load_tokenizer(folder, folder / "template.jinja" if template else None)


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def texts_of(names: list[str], seed: int) -> list[str]:
    """Texts with control tokens at the start, at the end, inside words, beside each other and cut in two."""
    draw = random.Random(seed)
    drawn = draw.sample(names, min(6, len(names)))
    mixed = ["".join(draw.choice(drawn if draw.random() < 0.3 else WORDS) for _ in range(12)) for _ in range(20)]
    return [*mixed, *drawn, "".join(drawn), *(f"x{name}y" for name in drawn), *(name[:3] + name for name in drawn)]


def test_the_text_comes_back_and_holds_no_control_token(tokenizer: PreTrainedTokenizerBase) -> None:
    names = special_names(tokenizer)
    ids = set(tokenizer.convert_tokens_to_ids(names)) - {tokenizer.unk_token_id}
    texts = texts_of(names, 1)
    parsed = parse_batch(tokenizer, texts)
    assert any(ids & set(tokens.ids) for tokens in parsed)
    rows = [tokens.ids for tokens in encode_batch(tokenizer, texts)]
    assert rows == [encode(tokenizer, text) for text in texts]
    assert TokenCounter(tokenizer).texts(texts) == list(map(len, rows))
    keeps = tokenizer.decode(parse_batch(tokenizer, ["a  ½\n b"])[0].ids) == "a  ½\n b"
    for text, row, tokens in zip(texts, rows, parsed, strict=True):
        assert not ids & set(row), text
        assert any(name in text for name in names) or row == tokens.ids
        # A leading space is one that SentencePiece puts before a text and takes away.
        assert not keeps or tokenizer.decode(row) in (text, text.removeprefix(" "))


def test_a_bytelevel_text_is_what_the_library_makes_without_special_tokens(solopo_data: Path) -> None:
    """`encode_special_tokens` of the tokenizers library is the oracle, for vocabularies that do not spell them."""
    ours = load_tokenizer(solopo_data / "tokenizers" / "qwen2", CHATML)
    theirs = Tokenizer.from_str(ours.backend_tokenizer.to_str())
    theirs.encode_special_tokens = True
    start, end = ours.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for text in texts_of(special_names(ours), 2):
        assert ours.decode(encode(ours, text)) == text
        framed = [start, *theirs.encode(f"user\n{text}").ids, end, *encode(ours, "\n")]
        framed += [start, *encode(ours, "assistant\n")]
        system = prompt_ids(ours, [{"role": "system", "content": text}, user(text)])
        assert system[-len(framed) :] == framed and system[0] == start
        assert system[1:].index(end) == len(theirs.encode(f"system\n{text}").ids)
        assert response_ids(ours, [user(text)], text)[:-1] == theirs.encode(text).ids


def test_a_chat_that_spells_them_has_the_templates_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """In prompts, responses and conversations: as many as a chat that spells none, and one end a turn."""
    names = special_names(tokenizer)
    ids = set(tokenizer.convert_tokens_to_ids(names)) - {tokenizer.unk_token_id}

    def count(row: list[int]) -> int:
        return sum(token in ids for token in row)

    end = tokenizer.eos_token_id
    texts = [f"a {name} b" for name in sorted(names, key=hash)[:5]] + ["".join(names[:9])]
    tags = {name for name in names if name.startswith("</") and name != "</s>"}
    frames = [name for name in names if name not in tags and f"</{name[1:]}" not in tags]
    for text in texts:
        assert count(prompt_ids(tokenizer, [user(text)])) == count(prompt_ids(tokenizer, [user("plain")]))
        assert TokenCounter(tokenizer).chat([user(text)]) == len(prompt_ids(tokenizer, [user(text)]))
        assert text in render_prompt(tokenizer, [user(text)])
        assert len(prompt_starts(tokenizer, [user(text)])) == len(prompt_ids(tokenizer, [user(text)]))
    for text in [f"room {name} x" for name in {*frames[:8], tokenizer.eos_token}]:
        row = response_ids(tokenizer, [user("hi")], text)
        assert row[-1] == end and count(row) == 1, text
        if tokenizer.unk_token_id not in row:
            spaces = "" if tokenizer.decode(encode(tokenizer, "a b")) == "ab" else " "
            assert tokenizer.decode(row[:-1]).strip() == text.replace(" ", spaces)
        chat = [user(text), assistant(text), user(text), assistant(text)]
        neutral = conversation_ids(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])
        prompt, completion, loss_mask = conversation_ids(tokenizer, chat)
        assert [count(prompt), count(completion)] == [count(neutral[0]), count(neutral[1])]
        assert sum(token == end for token, trained in zip(completion, loss_mask, strict=True) if trained) == 2


def test_a_chat_that_spells_none_is_read_alike_by_both(tokenizer: PreTrainedTokenizerBase, solopo_data: Path) -> None:
    """The reader of chats that spell control tokens is the same tokenizer: real prompts have the same ids."""
    with (solopo_data / "musique" / "musique_ans_train_subset.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(5), strict=False)]
    control = control_tokens(tokenizer)
    for record in records:
        documents = " ".join(paragraph["paragraph_text"] for paragraph in record["paragraphs"][:4])
        assert not control.spelled(documents)
        chat = [user(documents), assistant(" So? "), user("  ½\n")]
        text = render_prompt(tokenizer, chat)
        reader = control.reader([text])
        (tokens,) = reader.encode_batch([reader.exchange(text)])
        assert tokens.ids == parse_batch(tokenizer, [text])[0].ids == prompt_ids(tokenizer, chat)


TEMPLATES = {  # each writes the text between <|head|> and <|tail|>, in a different way
    "trim": "<|head|>{{ messages[0].content | trim }}<|tail|>",
    "strings": "{{ '<|head|>' + messages[0]['content'].strip() + '<|tail|>' }}",
    "names": "{% set a = 'head' %}{{ '<|' + a + '|>' }}{{ messages[0].content }}<|{{ 'tail' }}|>",
    "roles": "{{ bos_token }}{{ messages[0].content }}{{ pad_token }}",
    "twice": "{% set c = messages[0].content %}<|head|>{{ c }}{{ c[:0] }}<|tail|>{% if c in c %}{% endif %}",
    "json": "<|head|>{{ messages[0].content | tojson }}<|tail|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text", ["a<|tail|>b", "<|head|>", "<|eot|><|eot|>", "<|tail|> <|he<|head|>ad|>", "\U00100000<|tail|>"]
)
def test_templates_write_control_tokens_in_many_ways(name: str, text: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    head, tail = tokenizer.convert_tokens_to_ids(["<|head|>", "<|tail|>"])
    tokenizer.bos_token, tokenizer.pad_token = "<|head|>", "<|tail|>"
    row = prompt_ids(tokenizer, [user(text)])
    assert (row[0], row[-1]) == (head, tail) and max(row[1:-1]) < 256
    assert tokenizer.decode(row[1:-1]).strip('"') == text
    starts = prompt_starts(tokenizer, [user(text)])
    assert len(starts) == len(row) and text in render_prompt(tokenizer, [user(text)])[starts[1] : starts[-1]]


FLAGS: list[dict[str, Any]] = [
    {"lstrip": True},
    {"rstrip": True},
    {"single_word": True},
    {"normalized": True},
    {"normalized": True, "lstrip": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_flags_of_added_tokens_hold_for_the_templates_and_not_for_texts(flags: dict[str, Any]) -> None:
    template = "<turn>  {{ messages[0].content }}  <turn>{{ messages[0].role }}<turn> x"
    ours = byte_tokenizer(template)
    raw: Tokenizer = ours.backend_tokenizer
    raw.normalizer = normalizers.Lowercase()
    raw.add_special_tokens([AddedToken("<turn>", special=True, **flags)])
    turn = raw.token_to_id("<turn>")
    plain, spelling = prompt_ids(ours, [user("a ? b")]), prompt_ids(ours, [user("a <turn> b")])
    middle = plain.index(ord("?") - 33)
    assert plain.count(turn) == spelling.count(turn) == (1 if flags == {"single_word": True} else 3)
    assert plain[:middle] == spelling[:middle] and plain[middle + 1 :] == spelling[middle + 6 :]
    assert prompt_ids(ours, [user("<TURN>")]).count(turn) == plain.count(turn)  # what a normaliser makes one


def test_what_is_no_special_token_is_control_where_the_template_frames_messages_with_it() -> None:
    """As DeepSeek-R1's <｜User｜>; <tool_call> stays one token in every text, as <think> in answers."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ '<｜User｜>' + m.content if m.role == 'user' "
        "else '<｜Bot｜>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<｜Bot｜><think>\n{% endif %}"
    )
    tokenizer.backend_tokenizer.add_tokens(["<｜User｜>", "<｜Bot｜>", "<tool_call>", "<think>", "</think>"])
    first = tokenizer.convert_tokens_to_ids("<｜User｜>")
    text = "<｜User｜>a<tool_call>b<｜Bot｜></think>"
    row = prompt_ids(tokenizer, [user(text)])
    assert [token for token in row if token > 255] == [first, first + 2, first + 4, first + 1, first + 3]
    row = response_ids(tokenizer, [user("a")], "<｜User｜>b</think>c")
    assert [token for token in row if token > 255] == [first + 4, tokenizer.eos_token_id]
    assert tokenizer.decode(row) == "<｜User｜>b</think>c" + tokenizer.eos_token


def test_words_that_a_template_writes_are_no_control_tokens() -> None:
    """Tokenizers have spaces, line ends and marks of headings among their added tokens."""
    template = "### {{ messages[0].content }}\n\n<end>    "
    tokenizer = byte_tokenizer(template)
    tokenizer.backend_tokenizer.add_tokens(["###", "\n\n", "    ", "<end>"])
    assert [control_tokens(tokenizer).spelled(text) for text in ("a ###\n\n    ", "a <end>")] == [False, True]
    assert prompt_ids(tokenizer, [user("###\n\n<end>")])[:4] == [262, 220, 262, 263]
    text = template.replace("{{ messages[0].content }}", "###")
    assert prompt_ids(tokenizer, [user("###")]) == tokenizer.encode(text)


def test_added_tokens_are_tokens_in_answers_and_text_elsewhere(tmp_path: Path) -> None:
    """Also where they were added before: as tokenizer_config.json of the folder declares. They need be no tags."""
    byte_tokenizer(R1).save_pretrained(tmp_path / "hf")
    ours = load_tokenizer(tmp_path / "hf", added_tokens="<think>,</think>,<more>")
    ours.save_pretrained(tmp_path / "saved")
    for tokenizer in (ours, load_tokenizer(tmp_path / "saved")):
        new = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<more>"])
        row = response_ids(tokenizer, [user("hi")], "<think>a</think><more>b<|im_end|>c")
        assert [token for token in row if token in new] == new and row.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(row) == "<think>a</think><more>b<|im_end|>c<|im_end|>"
        assert not set(new) & set(prompt_ids(tokenizer, [user("<think>a</think><more>")]))
        past = prompt_ids(tokenizer, [user("<more>"), assistant("<more>"), user("<more>")])
        assert past.count(new[2]) == 1
    assert encode(ours, "<more>") == [ord(c) - 33 for c in "<more>"]


def test_merges_do_not_spell_a_control_token() -> None:
    """As those that transformers derives from SentencePiece's pieces, for any `encode_special_tokens`."""
    pieces = ["<unk>", *"<a/s>", "</", "s>", "</s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    raw = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    raw.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert prompt_ids(tokenizer, [user("a</s>a")]) == [2, 6, 7, 2, 8] and encode(tokenizer, "</s>") == [6, 7]
    assert response_ids(tokenizer, [user("a")], "a</s>") == [2, 6, 7, 8]


def test_a_token_of_one_character_is_a_letter() -> None:
    tokenizer = byte_tokenizer("{{ messages[0].content }}<|tail|>")
    tokenizer.backend_tokenizer.add_special_tokens(["!"])
    assert prompt_ids(tokenizer, [user("<|tail|>!")])[-2:] == [tokenizer.convert_tokens_to_ids("!"), 260]


def test_control_tokens_that_cannot_be_read_as_text_are_refused(tmp_path: Path) -> None:
    slow = ByT5Tokenizer()
    slow.chat_template = "{{ messages[0].content }}</s>"
    assert prompt_ids(slow, [user("a")])[-1] == 1
    with refused("control-token-in-text", "tokenizer.json"):
        prompt_ids(slow, [user("a</s>b")])
    # An end of turn that is an ordinary token of the vocabulary.
    words = Tokenizer(models.WordLevel({"<unk>": 0, "###": 1, "room": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, eos_token="###")
    assert response_ids(tokenizer, [user("room")], "room room") == [2, 2, 1]
    record = {"id": "g1", "short_messages": [user("room")], "chosen": "room ### room", "rejected": "room"}
    with refused("control-token-in-text", "groups.jsonl: group 'g1': ", "end of turn ###", "--eos-token"):
        tokenize(write_lines(tmp_path / "groups.jsonl", [record]), tokenizer, scored("short_chosen"), 99)


def test_examples_that_spell_them_are_counted_and_listed(tmp_path: Path) -> None:
    """A word-level vocabulary has no other word for them, so they are unknown words, as in any text."""
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    texts = {"g0": ("w1", "w2"), "g1": ("w1 <end> w3", "w2"), "g2": ("w1", "w2 <end> w4"), "g3": ("w1", "w2 <user> w4")}
    records = [{"id": i, "short_messages": [user(q)], "chosen": a, "rejected": "w5"} for i, (q, a) in texts.items()]
    records.append(records[2] | {"id": "g4", "chosen_ids": [6, 3, 8]})  # ids that end before the text does
    records.append(records[2] | {"id": "g5", "chosen": "w2", "chosen_ids": [6, 3, 8]})
    data = tokenize(write_lines(tmp_path / "g.jsonl", records), tokenizer, scored("short_chosen", "short_rejected"), 99)
    assert data.report.spelled == ["g1", "g2", "g3", "g4"]
    line = "control tokens in the texts of 4 examples, which are tokenized as text: g1, g2, g3, g4"
    assert line in data.report.lines(99)
    chosen = [list(group.prompts[0].completions[0].ids) for group in data.groups]
    assert chosen == [[6, 3], [6, 3], [6, 0, 8, 3], [6, 0, 8, 3], [6, 0, 8, 3], [6, 3]]
    assert list(data.groups[1].prompts[0].ids) == [1, 5, 0, 7, 2]


def test_copies_of_a_tokenizer_do_not_share_control_tokens() -> None:
    tokenizer = byte_tokenizer("{{ messages[0].content }}")
    assert control_tokens(tokenizer).spelled("a<|eot|>") and not control_tokens(tokenizer).spelled("a<new>")
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"extra_special_tokens": ["<new>"]})
    assert control_tokens(other).spelled("a<new>") and not control_tokens(tokenizer).spelled("a<new>")
    assert decoders.ByteLevel().decode(other.convert_ids_to_tokens(encode(other, "<new>"))) == "<new>"
