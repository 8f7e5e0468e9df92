"""The command: its output, its summary, its options, and the tokenizer's end of turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_solopo.data.chat import load_tokenizer, prompt_ids, response_ids
from megatron_solopo.data.contexts import read_contexts
from megatron_solopo.data.prepare import main
from megatron_solopo.errors import UserError

CHATML = Path(__file__).parents[2] / "examples" / "chat_templates" / "chatml.jinja"
SPECIAL = ["<pad>", "<text_end>", "<turn_end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <turn_end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<text_end>",
        pad_token="<pad>",
        extra_special_tokens=["<turn_end>", "<user>", "<assistant>"],
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    with (tmp_path / "q.jsonl").open("w", encoding="utf-8") as out:
        for i in range(12):
            paragraphs = [
                {
                    "idx": j,
                    "title": f"t{i}.{j}",
                    "paragraph_text": "word " * (3 + (i * j) % 7) + (f"code{i}x" if j == 1 else ""),
                    "is_supporting": j == 1,
                }
                for j in range(5)
            ]
            out.write(
                json.dumps(
                    {
                        "id": f"q{i}",
                        "question": f"code of {i}",
                        "answer": f"code{i}x",
                        "answer_aliases": [],
                        "paragraphs": paragraphs,
                        "answerable": i != 11,
                    }
                )
                + "\n"
            )
    return tmp_path / "q.jsonl"


@pytest.fixture
def command(questions: Path, tokenizer: Path, tmp_path: Path) -> list[str]:
    return ["--input", str(questions), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "contexts.jsonl")]


def test_records_and_summary(
    command: list[str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--short-documents", "3", "--long-documents", "10"])
    pairs = list(read_contexts(tmp_path / "contexts.jsonl"))
    assert [pair.id for pair in pairs] == [f"q{i}" for i in range(11)]
    loaded = load_tokenizer(tokenizer)
    for pair in pairs:
        assert (pair.short_documents, pair.long_documents) == (3, 10)
        assert pair.answers == [f"code{pair.id[1:]}x"] and pair.source == "musique"
        for messages, tokens in ((pair.short_messages, pair.short_tokens), (pair.long_messages, pair.long_tokens)):
            assert (
                len(prompt_ids(loaded, messages))
                == tokens
                == len(f"<user> {messages[0]['content']} <turn_end> <assistant>".split())
            )
            assert messages[0]["content"].count(pair.answers[0]) == 1
    printed = capsys.readouterr().out
    rho = sum(pair.short_tokens / pair.long_tokens for pair in pairs) / len(pairs)
    for line in (
        "questions kept: 11, left out: 1",
        "1 left out: not answerable",
        f"mean {rho:.3f}",
        "3.0 (min 3, max 3) documents",
    ):
        assert line in printed


def test_templates_from_text_and_file(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Q {question}\n{documents}\nA\n", encoding="utf-8")
    main(
        [
            *command,
            "--short-documents",
            "2",
            "--long-documents",
            "2",
            "--document-template",
            "{text}",
            "--document-separator",
            r"\n--\n",
            "--prompt-template",
            f"@{tmp_path / 'prompt.txt'}",
            "--system-prompt",
            "Be brief.",
        ]
    )
    pair = next(read_contexts(tmp_path / "contexts.jsonl"))
    assert pair.short_messages[0] == {"role": "system", "content": "Be brief."}
    content = pair.short_messages[1]["content"]
    assert content.startswith("Q code of 0\nword ") and content.endswith("\nA") and content.count("\n--\n") == 1
    assert pair.short_messages == pair.long_messages


def test_limit_and_seed_and_pool(command: list[str], tmp_path: Path) -> None:
    def run(*more: str) -> list[str]:
        main([*command, "--short-documents", "3", "--long-documents", "10", *more])
        return (tmp_path / "contexts.jsonl").read_text(encoding="utf-8").splitlines()

    whole = run()
    assert run("--limit", "4") == whole[:4]  # the pool stays the same
    assert run("--seed", "1") != whole
    (tmp_path / "pool.jsonl").write_text(
        "".join(json.dumps({"title": f"p{i}", "text": "more"}) + "\n" for i in range(200))
    )
    assert len(run("--pool", str(tmp_path / "pool.jsonl"), "--long-documents", "150")) == 11


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give both --short-tokens and --long-tokens, or both"),
        (["--short-tokens", "9", "--long-documents", "3"], "not a mixture"),
        (["--short-tokens", "9", "--long-tokens", "30", "--short-documents", "3"], "not a mixture"),
        (["--short-documents", "9", "--long-documents", "3"], "the short one not above the long one"),
        (
            ["--short-documents", "3", "--long-documents", "900"],
            "no question could be used (11 x too few distractors for 900 documents",
        ),
        (["--short-documents", "3", "--long-documents", "9", "--limit", "0"], "--limit 0"),
        (
            ["--short-documents", "3", "--long-documents", "9", "--prompt-template", "@nowhere"],
            "--prompt-template @nowhere: no such file",
        ),
        (
            ["--short-documents", "3", "--long-documents", "9", "--eos-token", "<nope>"],
            "--eos-token <nope>: no such token",
        ),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_output(
    command: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        main([*command, *more])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "contexts.jsonl").exists()


def test_the_end_of_turn_comes_from_the_template(tokenizer: Path) -> None:
    """The folder names <text_end>, as base models do; its template ends a turn with <turn_end>."""
    loaded = load_tokenizer(tokenizer)
    assert loaded.eos_token == "<turn_end>"
    ids = response_ids(loaded, [{"role": "user", "content": "x"}], "x y")
    assert loaded.convert_ids_to_tokens(ids)[-1] == "<turn_end>" and ids.count(ids[-1]) == 1
    assert load_tokenizer(tokenizer, eos_token="<text_end>").eos_token == "<text_end>"


def test_a_tokenizer_without_template_or_end_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "x": 1}, unk_token="<pad>"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no chat template; give one with --chat-template"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer names no eos_token"):
        load_tokenizer(tmp_path, CHATML)


def test_chatml_on_the_real_tokenizer(solopo_data: Path) -> None:
    """tokenizer.json alone: no template, no eos token; ChatML as Qwen2's own template writes it."""
    loaded = load_tokenizer(solopo_data / "tokenizers" / "qwen2", CHATML)
    assert loaded.eos_token == "<|im_end|>" and loaded.eos_token_id == 151645
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go."},
    ]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    with_system = loaded.apply_chat_template([{"role": "system", "content": "S"}, *chat], tokenize=False)
    assert (
        with_system.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")
        and with_system.count("system") == 1
    )
    assert loaded.decode(response_ids(loaded, chat, "Done.")) == "Done.<|im_end|>"
