"""Evaluation by length and questions over a document, with tiny random models."""

import io
import json
import re
import string

import pytest
from answering import PROMPT, one_by_one, write_model, write_questions
from option_lines import last_wins
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.scoring import score, sub_em
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.evaluation import ask, evaluate, items, scored
from megatron_solopo.evaluation.generation import Response
from megatron_solopo.evaluation.results import read_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")


def run_evaluate(folder, questions, output, *extra, lengths=("--context-documents", "2,4,8"), prompt=PROMPT):
    argv = [
        "--model",
        str(folder),
        "--data",
        str(questions),
        "--output",
        str(output),
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        *lengths,
        *prompt,
    ]
    return evaluate.main(last_wins([*argv, *extra]))


def normalised(text):
    """SQuAD's normalisation, written again."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\s+", " ", re.sub(r"\b(a|an|the)\b", " ", kept)).strip()


def test_evaluate_scores_the_same_questions_at_every_length(folder, questions, tmp_path, capsys):
    assert run_evaluate(folder, questions, tmp_path / "results.json") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    predictions = [json.loads(line) for line in (tmp_path / "results.predictions.jsonl").read_text().splitlines()]
    assert list(results["metrics"]) == ["2 documents", "4 documents", "8 documents"]
    for size, (label, metrics) in zip((2, 4, 8), results["metrics"].items(), strict=True):
        rows = [row for row in predictions if row["length"] == label]
        assert [row["id"] for row in rows] == [f"q{index}" for index in range(6)]
        # <user>, four words a document, the two words of the question, <assistant>
        assert {row["prompt_tokens"] for row in rows} == {4 * size + 4} == {metrics["mean_prompt_tokens"]}
        right = sum(normalised(row["answers"][0]) in normalised(row["prediction"]) for row in rows)
        assert metrics["sub_em_plain"] == right / 6 and metrics["count"] == 6
        assert metrics["sub_em"] == sum(sub_em(row["prediction"], row["answers"]) for row in rows) / 6
        assert metrics["em"] == sum(normalised(row["answers"][0]) == normalised(row["prediction"]) for row in rows) / 6
        assert metrics["cut"] == sum(not row["finished"] for row in rows)
    shown = capsys.readouterr().out
    cut = results["metrics"]["8 documents"]["cut"]
    assert cut > 0 and re.search(rf"8 documents +6 +{cut} +36\.0 +\d\.\d{{3}} \[", shown)
    assert "cut: answers that did not end within --max-new-tokens" in shown
    assert "6 questions at each length, 0 left out" in shown
    assert "plain sub-EM" in shown and results["settings"]["normalisation"] == "unicode"


@pytest.mark.parametrize(("normalisation", "expected"), [("unicode", 1.0), ("squad", 0.0)])
def test_evaluate_folds_spellings_by_choice(normalisation, expected):
    for name in ("sub_em", "em", "f1"):
        assert score(name, "O\u2019Brien", ["O'Brien"], normalisation) == expected
    assert score("sub_em_plain", "I know of O\u2019Brien", ["no", "O'Brien"], normalisation) == 1.0
    assert (
        score("sub_em_plain", "O\u2019Brien", ["O'Brien"], normalisation) == 0.0
    )  # the paper's, with any normalisation


def test_scores_of_known_responses(tmp_path):
    asked = [items.Item(str(index), "?", ["The red fox", "fox"], [[1] * (index + 1)]) for index in range(4)]
    texts = ["Answer: red fox.", "the red fox", "wolf", "a red wolf"]
    responses = [Response(text, finished=text != "wolf") for text in texts]
    result, records = scored.score_responses(asked, 0, 8, "documents", responses)
    means = result.means
    assert (means["sub_em"], means["em"], result.count, result.mean_prompt_tokens) == (0.5, 0.25, 4, 2.5)
    assert means["f1"] == pytest.approx((4 / 5 + 1 + 0 + 1 / 2) / 4)  # words in common: 2 of 3 + 2, all, 0, 1 of 2 + 2
    assert [record["sub_em"] for record in records] == [1, 1, 0, 0]
    assert [record["finished"] for record in records] == [True, True, False, True] and result.cut == 1
    assert result.methods == {**dict.fromkeys(("sub_em", "sub_em_plain", "em"), "wilson"), "f1": "wilson_bound"}
    # Wilson's interval of 2 out of 4 is centred on 1/2, its half width z / (2 sqrt(n + z^2)).
    half = 1.959964 / (2 * (4 + 1.959964**2) ** 0.5)
    assert result.intervals["sub_em"] == pytest.approx([0.5 - half, 0.5 + half])
    assert re.search(r"8 documents +4 +1 +2\.5 +0\.500 \[0\.150, 0\.850\]", scored.table_lines([result])[1])
    written = {"model": "m", "data": "d", "metrics": {result.label: result.record()}}
    (tmp_path / "e.json").write_text(json.dumps(written))
    assert read_evaluation(str(tmp_path / "e.json")).results == (result,)


def test_results_name_model_and_data_from_anywhere(folder, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert run_evaluate(".", questions, tmp_path / "r.json", lengths=("--context-documents", "2")) == 0
    monkeypatch.chdir(questions.parent)
    assert run_evaluate(folder, questions.name, tmp_path / "s.json", lengths=("--context-documents", "2")) == 0
    for name in "rs":
        results = json.loads((tmp_path / f"{name}.json").read_text())
        assert (results["model"], results["data"]) == (str(folder.resolve()), str(questions.resolve()))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_results_do_not_replace_a_file_of_the_model(questions, tmp_path, name):
    folder = write_model(tmp_path / "tiny")
    before = (folder / name).read_bytes()
    with refused("folder-overlap", f"--output {folder / name}: ", "--model"):
        run_evaluate(folder, questions, folder / name, lengths=("--context-documents", "2"))
    assert (folder / name).read_bytes() == before


def test_predictions_are_the_models_responses_to_each_length(folder, questions, tmp_path):
    run_evaluate(folder, questions, tmp_path / "all.json")
    lines = (tmp_path / "all.predictions.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    prompt_format = PromptFormat(
        document_template="{text}", document_separator=" ", prompt_template="{documents} {question}"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked, left_out = items.build_items([questions], [2, 4, 8], "documents", tokenizer, prompt_format)
    assert not left_out
    for index, size in enumerate((2, 4, 8)):
        expected, _ = one_by_one(folder, [item.prompts[index] for item in asked], 6)
        assert [row["prediction"] for row in rows if row["length"] == f"{size} documents"] == expected
    # The same seed writes the same file, with one prompt a batch too.
    run_evaluate(folder, questions, tmp_path / "again.json", "--batch-tokens", "1")
    assert (tmp_path / "again.predictions.jsonl").read_text() == lines


def test_answers_on_disk_are_not_generated_again(folder, questions, tmp_path, monkeypatch, capsys):
    lengths = ("--context-documents", "2,4")
    run_evaluate(folder, questions, tmp_path / "whole.json", "--batch-tokens", "40", lengths=lengths)
    add, calls = Jobs.add, []

    def add_or_stop(*arguments):
        calls.append(arguments)
        if len(calls) > 4:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Jobs, "add", add_or_stop)
        run_evaluate(folder, questions, tmp_path / "r.json", "--batch-tokens", "40", lengths=lengths)
    assert not (tmp_path / "r.json").exists()
    with refused("unfinished-other-settings", "r.json.partial: ", "max_new_tokens = 6, now 5;"):
        run_evaluate(folder, questions, tmp_path / "r.json", "--max-new-tokens", "5", lengths=lengths)
    before = (tmp_path / "r.json.partial").read_bytes()
    for batch_tokens in ("60", "40"):  # smaller or larger batches may finish the work
        capsys.readouterr()
        (tmp_path / "r.json.partial").write_bytes(before)
        run_evaluate(folder, questions, tmp_path / "r.json", "--batch-tokens", batch_tokens, lengths=lengths)
        done = sum(len(name) - 1 for _, name, _ in calls[:4])  # a name is the length's label and the questions' indices
        assert f"resuming: {done} of 12 answers were generated before" in capsys.readouterr().out
    for name in ("r", "r.predictions"):
        suffix = "json" if name == "r" else "jsonl"
        whole = tmp_path / f"whole{name[1:]}.{suffix}"
        assert (tmp_path / f"{name}.{suffix}").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "r.json.partial").exists()


def test_evaluate_by_tokens_stays_within_two_percent(folder, tmp_path):
    questions = write_questions(tmp_path / "many.jsonl", count=6, documents=36)
    assert run_evaluate(folder, questions, tmp_path / "r.json", lengths=("--context-tokens", "112,56")) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert list(metrics) == ["56 tokens", "112 tokens"]
    assert all(
        0.98 * size <= values["mean_prompt_tokens"] <= size
        for size, values in zip((56, 112), metrics.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("extra", "lengths", "code", "named"),
    [
        (
            [],
            ("--context-tokens", "32,1000"),
            "prompt-beyond-positions",
            ["--context-tokens 1000: ", "max_position_embeddings 48"],
        ),
        (
            [],
            ("--context-documents", "2,12"),
            "prompt-beyond-positions",
            ["--context-documents 12: ", "52 tokens", "max_position_embeddings 48"],
        ),
        ([], ("--context-documents", "2,x"), "option-value", ["--context-documents 2,x: ", "whole numbers"]),
        ([], ("--context-documents", "2,2"), "option-value", ["--context-documents 2,2: ", "once"]),
        ([], ("--context-documents", "500"), "questions-unusable", ["(6 x too few distractors"]),
        (["--limit", "0"], ("--context-documents", "2"), "option-value", ["--limit 0"]),
        (["--max-new-tokens", "0"], ("--context-documents", "2"), "option-value", ["--max-new-tokens 0"]),
        (["--data", "nowhere.jsonl"], ("--context-documents", "2"), "file-missing", ["nowhere.jsonl: "]),
        (["--model", "nowhere"], ("--context-documents", "2"), "folder-missing", ["nowhere: "]),
        (
            ["--model", "nowhere", "--tokenizer", "{folder}"],
            ("--context-documents", "2"),
            "model-config-missing",
            ["--model nowhere: ", "config.json"],
        ),
    ],
)
def test_evaluate_refuses_by_name(questions, tmp_path, extra, lengths, code, named):
    short = write_model(tmp_path / "short", positions=48)
    with refused(code, *named):
        run_evaluate(
            short, questions, tmp_path / "r.json", *(part.format(folder=short) for part in extra), lengths=lengths
        )
    assert not (tmp_path / "r.json").exists()


def _without_a_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _other_width(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 8}))


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (_without_a_layer, "tensor-missing", ["model.layers.1."]),
        (_pointer, "model-unreadable", []),
        (_other_width, "model-unreadable", []),
    ],
)
def test_an_incomplete_model_is_refused(questions, tmp_path, change, code, named):
    """transformers draws missing tensors at random, and continues."""
    broken = write_model(tmp_path / "broken")
    change(broken)
    with refused(code, str(broken), *named):
        run_evaluate(broken, questions, tmp_path / "r.json", lengths=("--context-documents", "2"))
    assert not (tmp_path / "r.json").exists()


def test_records_beyond_the_limit_are_not_listed_as_left_out(folder, tmp_path, capsys):
    path = write_questions(tmp_path / "questions.jsonl")
    lines = path.read_text().splitlines()
    unusable = [json.dumps(json.loads(lines[0]) | {"id": f"the{n}", "answer": "\u200b"}) for n in range(3)]
    path.write_text("\n".join([unusable[0], *lines, *unusable[1:]]) + "\n")
    run_evaluate(folder, path, tmp_path / "r.json", "--limit", "2", lengths=("--context-documents", "2"))
    assert "2 questions at each length, 1 left out\n" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "shown"), [(b"\xef\xbb\xbfw1 w2 .", True), (b"caf\xe9", False)])
def test_a_document_from_standard_input_is_utf8(folder, monkeypatch, capsys, content, shown):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    argv = ["--model", str(folder), "--document", "-", "--question", "w1 ?", "--max-new-tokens", "2", *PROMPT[4:]]
    if shown:
        assert ask.main(argv) == 0 and "prompt tokens" in capsys.readouterr().out
    else:
        with refused("not-utf8", "--document -: "):
            ask.main(argv)


def test_ask_shows_every_model_and_refuses_a_long_document(folder, tmp_path, capsys):
    other = write_model(tmp_path / "runs" / "tiny", seed=1)
    document = tmp_path / "document.txt"
    document.write_text("w1 w2 w3 .\nw4 w5 w6 .\n")
    argv = [
        "--model",
        str(folder),
        str(other),
        "--document",
        str(document),
        "--question",
        "w1 ?",
        "--max-new-tokens",
        "5",
        *PROMPT[4:],
    ]
    assert ask.main(argv) == 0
    shown = capsys.readouterr().out
    prompt = AutoTokenizer.from_pretrained(folder)(
        "<user>w1 w2 w3 .\nw4 w5 w6 . w1 ?<assistant>", add_special_tokens=False
    )["input_ids"]
    for path in (folder, other):
        [text], [length] = one_by_one(path, [prompt], 5)
        cut = r"\n +\| \[cut at --max-new-tokens\]" if length == 5 else r"(?!\n +\| \[cut)"
        assert re.search(rf"{path.parent.name}/tiny \({len(prompt)} prompt tokens\) +\| {re.escape(text)}{cut}", shown)
    document.write_text("w1 " * 300)
    with refused("prompt-beyond-positions", "--document: ", "304 tokens", "max_position_embeddings 256"):
        ask.main(argv)
    with refused("file-missing", f"--document {tmp_path / 'none.txt'}: "):
        ask.main(last_wins([*argv, "--document", str(tmp_path / "none.txt")]))
