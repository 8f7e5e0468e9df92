"""Tokenizers without a tokenizer.json have the ids of sentencepiece and tiktoken; special tokens are added by name."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiktoken
from refusals import refused
from sentencepiece import SentencePieceProcessor
from tiny_models import WORDS, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from megatron_solopo.conversion.sidecar_files import SidecarFiles
from megatron_solopo.data.text import tokenizer as tokenizers
from megatron_solopo.data.text.chat import load_tokenizer, prompt_ids, response_ids
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.text.tokenizer import add_special_tokens, parse_tokens, read_tokenizer

ODD = [
    "Es war einmal ein König. 从前有一位国王。 1,234.56 € — 7 × 8 = 56.",
    "  two  spaces\n\nnew line\ttab",
    "a   b    c  ",
    "🙂 emoji ∑∆ a\u00a0b ½",
    "def f(x):\n    return x  # two",
    "",
]
MODELS = {
    "Mistral v0.1": "mistral/tokenizer.model.v1",
    "Mistral v0.3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
    "unigram": "sentencepiece_test/test_model.model",
}


@pytest.fixture(scope="module")
def texts(solopo_data: Path) -> list[str]:
    """Real questions and paragraphs, and odd ones."""
    with (solopo_data / "musique" / "musique_ans_train_subset.jsonl").open() as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(5), strict=False)]
    return [*ODD, *(text for r in records for text in (r["question"], *(p["paragraph_text"] for p in r["paragraphs"])))]


def ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def folder_of(path: Path, model: Path, model_type: str, **settings: object) -> Path:
    """A folder with a tokenizer.model and nothing else of a tokenizer but its settings."""
    path.mkdir()
    shutil.copyfile(model, path / "tokenizer.model")
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("Mistral v0.1", "mistral"), ("Mistral v0.3", "mistral"), ("Mistral v0.1", "llama"), ("unigram", "llama")],
)
def test_sentencepiece_models_keep_their_ids(
    solopo_data: Path, texts: list[str], tmp_path: Path, name: str, model_type: str
) -> None:
    """Also as transformers loads them from an exported folder; control tokens are one id and never in plain text."""
    model = solopo_data / "tokenizers" / MODELS[name]
    folder = folder_of(tmp_path / "hf", model, model_type, chat_template="{{ messages[0].content }}")
    theirs = SentencePieceProcessor(model_file=str(model))
    ours = read_tokenizer(folder)
    assert ids(ours, texts) == theirs.encode(texts)
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (1, 2, theirs.get_piece_size())
    (tmp_path / "out").mkdir()
    SidecarFiles(folder, (folder / "config.json").read_text()).write(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert ids(exported, texts) == theirs.encode(texts) and exported.chat_template == ours.chat_template
    if name != "unigram":  # whose normalisation takes spaces away
        assert [exported.decode(row) for row in ids(exported, texts)] == theirs.decode(theirs.encode(texts))
    if name == "Mistral v0.3":
        assert ids(exported, ["[INST]"]) == [[theirs.piece_to_id("[INST]")]] == [[3]]


def test_a_folder_that_is_not_legacy_has_no_space_behind_a_special_token(solopo_data: Path, tmp_path: Path) -> None:
    """tokenizer_config.json as transformers writes it for Llama's SentencePiece models."""
    model = solopo_data / "tokenizers" / MODELS["Mistral v0.3"]
    split = {}
    for legacy in (True, False):
        folder = folder_of(tmp_path / str(legacy), model, "mistral", legacy=legacy)
        split[legacy] = read_tokenizer(folder).tokenize("[INST]hi")
    assert split == {True: ["[INST]", "▁hi"], False: ["[INST]", "hi"]}


def test_a_conversion_that_differs_is_refused(
    solopo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "hf", solopo_data / "tokenizers" / MODELS["unigram"], "llama")
    monkeypatch.setattr(tokenizers, "PROBES", ("▁ under",))  # which transformers' Unigram splits otherwise
    with refused("tokenizer-conversion", "tokenizer.model: ", "'▁ under'", "tokenizer.json"):
        read_tokenizer(folder)


@pytest.fixture(scope="module")
def ranks(solopo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[bytes, int], Path]:
    """The first 20,000 of Qwen2's tokens as a rank file in a Llama folder, with Llama 3's names for special tokens."""
    vocabulary = json.loads((solopo_data / "tokenizers/qwen2/tokenizer.json").read_text())["model"]["vocab"]
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks_of = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items() if rank < 20_000}
    file = tmp_path_factory.mktemp("ranks") / "ranks"
    file.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks_of.items()))
    added = {20_000 + i: {"content": token, "special": True} for i, token in enumerate(("<|begin|>", "<|eot_id|>"))}
    return ranks_of, folder_of(file.parent / "hf", file, "llama", eos_token="<|eot_id|>", added_tokens_decoder=added)


def test_rank_files_have_tiktokens_ids(
    ranks: tuple[dict[bytes, int], Path], texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks_of, folder = ranks
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default  # Llama 3's
    theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks_of, special_tokens={})
    ours = read_tokenizer(folder)
    assert ids(ours, texts) == theirs.encode_batch(texts) and not caplog.text
    assert ids(ours, ["<|begin|>a<|eot_id|>"]) == [[20_000, *theirs.encode("a"), 20_001]]
    SidecarFiles(folder, (folder / "config.json").read_text()).write(tmp_path)
    exported = AutoTokenizer.from_pretrained(str(tmp_path))
    assert ids(exported, texts) == theirs.encode_batch(texts) and exported.eos_token_id == 20_001


def test_ranks_of_another_family_are_refused(ranks: tuple[dict[bytes, int], Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", ranks[1] / "tokenizer.model", "qwen2")
    with refused("tokenizer-conversion", "tokenizer.model: ", "tiktoken", "it has qwen2"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    """With any class that it declares: DeepSeek's distilled Llama has LlamaTokenizerFast, SmolLM2 GPT2Tokenizer."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>", "<user>"], initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([f"{text} 1234 56" for text in ODD * 3], trainer)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), theirs.pre_tokenizer])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = dict(tokenizer_class=name, eos_token="<end>", extra_special_tokens=["<user>"], chat_template="{{ x }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template_kwargs": {"x": 1}}))
    ours = read_tokenizer(tmp_path)
    assert ids(ours, ODD) == [theirs.encode(text).ids for text in ODD]
    assert [ours.decode(row) for row in ids(ours, ODD)] == ODD
    assert (ours.eos_token, ours.chat_template) == ("<end>", "{{ x }}") and "<user>" in ours.all_special_tokens
    assert ours.init_kwargs["chat_template_kwargs"] == {"x": 1}


@pytest.mark.parametrize("kind", ["tokenizer.json", "SentencePiece", "ranks", "Python"])
def test_worker_processes_have_the_same_tokenizer(
    solopo_data: Path, ranks: tuple[dict[bytes, int], Path], texts: list[str], tmp_path: Path, kind: str
) -> None:
    """They unpickle the one that the command has read: template, its values and date, end of turn and added tokens."""
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{{ x }}{% endfor %}"
    file = solopo_data / "tokenizers" / MODELS["Mistral v0.1"]
    folder, end = {
        "tokenizer.json": lambda: (solopo_data / "tokenizers" / "qwen2", "<|im_end|>"),
        "SentencePiece": lambda: (folder_of(tmp_path / "hf", file, "llama"), "</s>"),
        "ranks": lambda: (ranks[1], "<|eot_id|>"),
        "Python": lambda: (ByT5Tokenizer().save_pretrained(tmp_path) and tmp_path, "</s>"),
    }[kind]()
    (tmp_path / "template").write_text(template)
    ours = load_tokenizer(folder, tmp_path / "template", end, '{"x": "!"}', "<think>,<one>", "2026-01-09")
    theirs = pickle.loads(pickle.dumps(ours))
    assert ids(theirs, texts) == ids(ours, texts)
    chat = [{"role": "user", "content": "a"}]
    for read in (prompt_ids, lambda *arguments: response_ids(*arguments, "b <one>")):
        assert read(theirs, chat) == read(ours, chat)
    assert text_facts(folder, theirs) == text_facts(folder, ours)


@pytest.mark.parametrize(("package", "content"), [("tiktoken", b"IQ== 0\n"), ("sentencepiece", b"\x0a\x0e\x00")])
def test_an_absent_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, content: bytes
) -> None:
    (tmp_path / "content").write_bytes(content)
    folder = folder_of(tmp_path / "hf", tmp_path / "content", "llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(
        "package-missing", "tokenizer.model: ", f"package {package} ", f"pip install 'megatron-solopo[{package}]'"
    ):
        read_tokenizer(folder)
    (tmp_path / "out").mkdir()
    SidecarFiles(folder, "{}").write(tmp_path / "out")  # weights that are done get the files as they are
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "tokenizer.model"]


def test_added_tokens_are_one_id_each(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf")
    tokenizer = load_tokenizer(folder, added_tokens="<think>, </think>")
    size = len(AutoTokenizer.from_pretrained(folder))
    assert ids(tokenizer, ["w3 <think>w1</think>"])[0][1::2] == [size, size + 1]
    assert tokenizer.decode(ids(tokenizer, ["<think> w1 </think>"])[0], skip_special_tokens=True).strip() == "w1"
    assert {"<user>", "<assistant>"} <= set(tokenizer.all_special_tokens)  # those it had stay


def test_the_end_of_turn_may_be_a_new_token(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} <over>{% endfor %}")
    assert load_tokenizer(write_model(tmp_path / "hf"), template, added_tokens="<over>").eos_token == "<over>"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("<a>,,<b>", "option-value", ("--add-special-tokens <a>,,<b>: ", "empty", "'<think>,</think>'")),
        ("", "option-value", ("--add-special-tokens : ", "empty")),
        ("<a>,<a>", "option-value", ("--add-special-tokens <a>,<a>: <a> ", "twice")),
        (f"<a>,{WORDS[0]}", "token-exists", (f"--add-special-tokens {WORDS[0]}: ", "an ordinary token (id 4)")),
        ("<user>", "token-exists", ("--add-special-tokens <user>: ", "a special token (id 1)")),
    ],
)
def test_wrong_tokens_are_one_line(tmp_path: Path, text: str, code: str, named: tuple[str, ...]) -> None:
    folder = write_model(tmp_path / "hf")
    with refused(code, *named):
        add_special_tokens(read_tokenizer(folder), text, folder)


def test_tokens_of_a_list() -> None:
    assert parse_tokens("<think>, </think>,<x y>") == ["<think>", "</think>", "<x y>"]
