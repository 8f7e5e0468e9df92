"""The quickstart's questions, conversations and tokenizer."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused

from megatron_solopo.data.schema import read_conversations
from megatron_solopo.data.text.chat import conversation_ids, load_tokenizer

HERE = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "facts.py"


@pytest.fixture(scope="module")
def facts():
    spec = importlib.util.spec_from_file_location("quickstart_facts", HERE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SIZES = "--train-questions 60 --eval-questions 20 --echoes 64 --lookups 64 --valid-conversations 8".split()


@pytest.fixture(scope="module")
def folder(facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    assert facts.main(["--output", str(folder), "--seed", "3", *SIZES]) == 0
    return folder


def items(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_answered_by_their_one_supporting_fact_only(folder):
    for item in items(folder / "train.jsonl") + items(folder / "eval.jsonl"):
        (gold,) = (p for p in item["paragraphs"] if p["is_supporting"])
        assert gold["paragraph_text"].split()[-1] == item["answer"] + "."
        assert all(len(p["paragraph_text"].split()) <= 6 for p in item["paragraphs"])
        assert len({p["title"] for p in item["paragraphs"]}) == len(item["paragraphs"]) == 64
        assert gold["title"] in item["question"]


def test_no_evaluation_question_is_asked_in_training(folder):
    asked = {item["question"] for item in items(folder / "train.jsonl")}
    for conversation in read_conversations(folder / "conversations.jsonl"):
        asked |= {m["content"].rsplit(". ", 1)[-1] for m in conversation.messages if m["role"] == "user"}
    assert not asked & {item["question"] for item in items(folder / "eval.jsonl")}


def test_the_same_seed_writes_the_same_bytes(facts, folder, tmp_path):
    facts.main(["--output", str(tmp_path), "--seed", "3", *SIZES])
    for name in (
        "train.jsonl",
        "eval.jsonl",
        "conversations.jsonl",
        "conversations_valid.jsonl",
        "tokenizer/tokenizer.json",
    ):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_every_word_has_a_token_and_only_answers_are_trained(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    lookups = [c for c in read_conversations(folder / "conversations.jsonl") if c.id.startswith("lookup")]
    for conversation in lookups:
        prompt, ids, loss_mask = conversation_ids(tokenizer, conversation.messages)
        assert tokenizer.unk_token_id not in prompt + ids
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        assert tokenizer.decode(
            [token for token, is_trained in zip(ids, loss_mask, strict=True) if is_trained]
        ).split() == [w for a in answers for w in (a, "<end>")]


def test_answers_may_have_several_wordings(facts, folder, tmp_path):
    """The same questions; every wording occurs, is tokenized, and holds the answer."""
    facts.main(["--output", str(tmp_path), "--seed", "3", "--wordings", "8", *SIZES])
    assert (tmp_path / "eval.jsonl").read_bytes() == (folder / "eval.jsonl").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    lookups = [c for c in read_conversations(tmp_path / "conversations.jsonl") if c.id.startswith("lookup")]
    answers = [m["content"] for c in lookups for m in c.messages if m["role"] == "assistant"]
    assert {answer.split()[0] for answer in answers} <= set(facts.THINGS)
    assert {answer[len(answer.split()[0]) :] for answer in answers} == set(facts.CLOSINGS)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(answers)).input_ids
    for wrong in ("0", "9"):
        with refused("option-value", f"--wordings {wrong}"):
            facts.main(["--output", str(tmp_path), "--wordings", wrong])


def test_conversations_of_a_batch_have_one_length(facts, folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    echoes = [c for c in read_conversations(folder / "conversations.jsonl") if c.id.startswith("echo")]
    for first in range(0, len(echoes), facts.BATCH):
        lengths = {len(conversation_ids(tokenizer, c.messages)[1]) for c in echoes[first : first + facts.BATCH]}
        assert len(lengths) == 1


def test_a_folder_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(HERE), "--output", str(tmp_path / "file" / "x")]
    done = subprocess.run(command, cwd=HERE.parents[2], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'file' / 'x'}: Not a directory [file-system]\n")
