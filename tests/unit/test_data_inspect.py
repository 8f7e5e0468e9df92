"""inspect-data: what is shown of a group is what training computes, and every mistake is one line."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspected import WORDS, groups, tokenizer_folder, view_of, write
from option_lines import last_wins
from refusals import refused
from segment_names import SEGMENTS, loss_by_name, names_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.files.parquet import write_groups
from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.inspection.blocks import Block
from megatron_solopo.data.inspection.view import token_text, uses
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.losses.solopo import reference_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


METHODS = [
    dict(),
    dict(alignment_reference="short"),
    dict(alignment_target="both", alignment_stop_short_gradient=True),
    dict(context_mode="short", preference_loss="simpo", sft_weight=0.5),
    dict(context_mode="long", preference_loss="ipo"),
    dict(preference_loss="orpo"),
    dict(context_mode="long", preference_loss="longpo"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: " ".join(map(str, method.values())) or "default")
def test_the_loss_depends_on_exactly_what_the_view_lists(method: dict[str, Any]) -> None:
    """`uses` against the gradient of the loss with respect to every log-prob."""
    loss, weight = method.get("preference_loss", "dpo"), 0.7
    config = MethodConfig(**{"beta": 0.3, "alignment_weight": weight, **method})
    draw = torch.Generator().manual_seed(1)
    names = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")

    def leaves(wanted: Any) -> dict[str, torch.Tensor]:
        return {name: (-5 - torch.rand(1, generator=draw).double()).requires_grad_() for name in wanted}

    policy, reference = leaves(names), leaves(names_of(reference_scores(config)))
    lengths = {name: torch.tensor([4.0], dtype=torch.float64) for name in names}

    def gradients(**change: Any) -> dict[str, float]:
        changed = MethodConfig(**{**vars(config), **change})
        total = loss_by_name(policy, lengths, reference or None, changed).loss.sum()
        partials = torch.autograd.grad(total, [*policy.values(), *reference.values()], allow_unused=True)
        keys = [*policy, *(f"reference {name}" for name in reference)]
        return {key: 0.0 if g is None else g.item() for key, g in zip(keys, partials, strict=True)}

    whole, without_alignment = gradients(), gradients(alignment_weight=0.0)
    for role in names:
        text = " | ".join(uses(*SEGMENTS[role], config))
        assert bool(text) == bool(whole[role] or whole.get(f"reference {role}"))
        preferred = "preference loss" in text
        assert preferred == (without_alignment[role] != 0)
        if preferred:
            # A higher log-prob of chosen lowers the loss.
            assert (without_alignment[role] < 0) == ("preference loss: chosen" in text), (role, loss)
        if "alignment" in text:
            assert (whole[role] == without_alignment[role]) == ("no gradient" in text)
        else:
            assert whole[role] == without_alignment[role]
        assert ("reference log-prob" in text) == (f"reference {role}" in whole)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (dict(), ["short_chosen", "short_rejected", "long_chosen"]),
        (dict(alignment_target="both"), ["short_chosen", "short_rejected", "long_chosen", "long_rejected"]),
        (dict(context_mode="long", preference_loss="orpo"), ["long_chosen", "long_rejected"]),
    ],
)
def test_segments_are_the_sequences_of_transformers(
    method: dict[str, Any], expected: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (record,) = groups(1)
    record["rejected"] = "Na\u00efve \U0001f600 <b>\n no"
    view = view_of(record, tokenizer, tmp_path, **method)
    assert [segment.name for segment in view.segments] == expected
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for segment in view.segments:
        context, response = segment.name.split("_")
        chat = [*record[f"{context}_messages"], {"role": "assistant", "content": record[response]}]
        full = tokenizer.apply_chat_template(chat)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        last = len(prompt) + full[len(prompt) :].index(end)
        assert segment.prompt_tokens == len(prompt)
        assert [(token.position, token.id) for token in segment.tokens] == [
            (place, full[place]) for place in range(len(prompt), last + 1)
        ]
        assert [token.end_of_turn for token in segment.tokens].index(True) == last - len(prompt)
        assert (
            segment.trained_tokens == len(segment.tokens) == sum(last - first + 1 for first, last in segment.predictors)
        )
        assert not any("\ufffd" in token.text or not token.text for token in segment.tokens)
        if response == "chosen":  # every token is shown as a separate text
            assert "".join(token.text for token in segment.tokens[:-1]) == record[response]


def test_tokens_keep_their_leading_space_with_metaspace_too() -> None:
    """As in SentencePiece vocabularies, where a token decoded alone loses it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator([" ".join(WORDS)] * 2, trainers.BpeTrainer(vocab_size=200))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = tokenizer.encode("the river town sold wool")
    assert len(ids) > 4 and "".join(token_text(tokenizer, i) for i in ids) == " the river town sold wool"


def test_documents_are_at_the_reported_positions(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (record,) = groups(1, sizes=(5, 30))
    view = view_of(record, tokenizer, tmp_path)
    for context in view.contexts:
        chat = record[f"{context.name}_messages"]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert context.tokens == len(ids)
        spans = record[f"{context.name}_spans"]
        for document, (start, end, gold) in zip(context.documents, spans, strict=True):
            decoded = tokenizer.decode(ids[document.first_token : document.first_token + document.tokens])
            # A token may reach over the border of a document.
            assert document.text.plain[2:-2] in decoded and len(decoded) - len(document.text) <= 4
            assert document.text.plain == chat[-1]["content"][start:end] and document.gold == gold
        starts = [start for start, _, _ in spans]
        expected = [np.interp(start, [starts[0], starts[-1]], [0, 1]) for start, _, gold in spans if gold]
        assert context.depths == pytest.approx(expected) and len(expected) == 2
        pieces = [piece for piece in context.pieces if isinstance(piece, Block)]
        shown = [one for piece in pieces for one in (piece.parts if piece.kind == "fold" else [piece])]
        assert [one.kind for one in shown] == [document.kind for document in context.documents]
        numbers = [int(re.search(r"document (\d+) of ", one.title)[1]) for one in shown]
        assert numbers == [*range(1, len(spans) + 1)]
        for fold in (piece for piece in pieces if piece.kind == "fold"):
            # From the first token of its first document to the last of its last.
            at = shown.index(fold.parts[0])
            first, last = context.documents[at], context.documents[at + len(fold.parts) - 1]
            tokens = last.first_token + last.tokens - first.first_token
            assert fold.title.startswith(f"{tokens:,} tokens of {len(fold.parts)} distractor")


def test_choosing_an_example(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "groups.jsonl", groups(6, sizes=(3, 4)))

    def shown(*more: str) -> str:
        assert inspect_data.main(["--data", str(path), "--tokenizer", str(folder), *more]) == 0
        return re.match(r"\n== (\w+)  \(index", capsys.readouterr().out)[1]

    assert shown() == "q0" and shown("--index", "4") == "q4" and shown("--id", "q2") == "q2"
    assert shown("--random", "--seed", "3") == shown("--random", "--seed", "3")
    assert len({shown("--random", "--seed", str(seed)) for seed in range(9)}) > 2


WRONG = {
    "missing": ([], None, "file-missing", "groups.jsonl: "),
    "empty": ([], [], "data-empty", "--data groups.jsonl: "),
    "half a line": ([], ['{"id": "a", "chosen'], "not-json", "groups.jsonl:1: "),
    "questions": ([], [{"id": "a", "paragraphs": []}], "data-kind", "groups.jsonl:1: ", "questions", "prepare-data"),
    "responses": ([], [{"id": "a", "responses": []}], "data-kind", "groups.jsonl:1: ", "responses", "build-pairs"),
    "conversations": ([], [{"messages": []}], "data-kind", "groups.jsonl:1: ", "--objective sft"),
    "something else": ([], [{"a": 1}], "data-kind", "groups.jsonl:1: ", "(fields found: a)"),
    "broken later": ([], lambda g: [*g, {"chosen": "x"}], "field-missing", "groups.jsonl:4: ", "'rejected'"),
    "span outside": (
        ["--id", "q1"],
        lambda g: [g[0], g[1] | {"long_spans": [[0, 10**6, True]]}],
        "field-value",
        "groups.jsonl:2: long_spans[0] is 0 to 1000000;",
    ),
    "unknown id": (["--id", "q11"], lambda g: g, "example-unknown", "--id q11: ", "3 of groups.jsonl"),
    "index beyond": (["--index", "3"], lambda g: g, "example-unknown", "--index 3: ", "0 to 2"),
    "index 0 and id": (
        ["--index", "0", "--id", "q1"],
        lambda g: g,
        "option-conflict",
        "--id and --index: ",
    ),
    "index below": (["--index", "-1"], lambda g: g, "option-value", "--index -1: "),
    "two choices": (["--id", "q1", "--random"], lambda g: g, "option-conflict", "--id and --random: "),
    "samples without page": (["--samples", "3"], lambda g: g, "option-unused", "--samples ", "--output"),
    "no samples": (
        ["--output", "page.html", "--samples", "0"],
        lambda g: g,
        "option-value",
        "--samples 0: ",
    ),
    "seed of nothing": (["--seed", "1"], lambda g: g, "option-unused", "--seed ", "--random or --output"),
    "unknown loss": (["--preference-loss", "dpoo"], lambda g: g, "option-value", "'dpoo'", "dpo, dpo_norm"),
    "unused option": (
        ["--context-mode", "short", "--alignment-target", "both"],
        lambda g: g,
        "option-unused",
        "--alignment-target",
    ),
    "longpo on short": (["--preference-loss", "longpo"], lambda g: g, "option-conflict", "--context-mode long"),
    "loss of contexts": (
        ["--context-mode", "short"],
        [{"short_messages": [], "short_tokens": 1}],
        "option-unused",
        "--context-mode: groups.jsonl ",
    ),
    "page over the data": (
        ["--output", "groups.jsonl"],
        lambda g: g,
        "file-overlap",
        "--output groups.jsonl: ",
        "--data",
    ),
    "no tokenizer": (["--tokenizer", "nowhere"], lambda g: g, "folder-missing", "nowhere: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, records, code, *named = WRONG[case]
    monkeypatch.chdir(tmp_path)
    good = groups(3, sizes=(3, 4))
    if records is not None:
        written = records(good) if callable(records) else records
        lines = (record if isinstance(record, str) else json.dumps(record) for record in written)
        Path("groups.jsonl").write_text("".join(f"{line}\n" for line in lines))
    page = [] if "--output" in arguments or case != "broken later" else ["--output", "page.html"]
    with refused(code, *named):
        inspect_data.main(last_wins(["--data", "groups.jsonl", "--tokenizer", str(folder), *arguments, *page]))
    assert not Path("page.html").exists()


def test_a_runs_configuration_decides_what_is_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "groups.jsonl", groups(2, sizes=(3, 6)))
    run = tmp_path / "run.yaml"
    run.write_text(
        "method: {preference_loss: simpo, context_mode: long}\ntraining: {train_iters: 3}\ndata: {seq_length: 100}\n"
    )
    base = ["--data", str(path), "--tokenizer", str(folder), "--config", str(run)]
    assert inspect_data.main(base) == 0
    output = capsys.readouterr().out
    assert "--preference-loss simpo --context-mode long" in output and "! longer than --seq-length" in output
    assert re.findall(r"^(\w+_\w+) +\d", output, re.MULTILINE) == ["long_chosen", "long_rejected"]
    assert inspect_data.main([*base, "--context-mode", "short", "--seq-length", "5000"]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^(\w+_\w+) +\d", output, re.MULTILINE) == ["short_chosen", "short_rejected"]
    assert "! longer" not in output
    run.write_text("method: {preference_loss: simpo}\n")  # --train-iters on training's command line
    assert inspect_data.main(base) == 0 and "--preference-loss simpo" in capsys.readouterr().out
    run.write_text("method: {objective: sft}\ntraining: {train_iters: 3}\n")
    with refused("option-conflict", f"--config {run}: ", "--objective sft"):
        inspect_data.main(base)


def test_new_special_tokens_of_a_run_are_shown_as_training_has_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = groups(1)
    path = write(tmp_path / "groups.jsonl", [{**record, "chosen": f"<think>{record['chosen']}"}])
    run = tmp_path / "run.yaml"
    run.write_text("model: {add_special_tokens: <think>}\ntraining: {train_iters: 3}\n")
    base = ["--data", str(path), "--tokenizer", str(folder)]
    for more, whole in ([], False), (["--config", str(run)], True), (["--add-special-tokens", "<think>"], True):
        assert inspect_data.main([*base, *more]) == 0
        assert ("|<think>|" in capsys.readouterr().out) == whole, more


def test_every_position_of_the_pack_is_accounted_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The places that predict lie in the pack, and no two tokens of a response share one."""
    (record,) = groups(1)
    view = view_of(record, tokenizer, tmp_path)
    prompts = {segment.name.split("_")[0]: segment.prompt_tokens for segment in view.segments}
    responses = sum(len(segment.tokens) - 1 for segment in view.segments)
    assert view.pack_tokens == sum(prompts.values()) + responses
    for segment in view.segments:
        places = list(itertools.chain(*(range(first, last + 1) for first, last in segment.predictors)))
        assert len(set(places)) == len(segment.tokens) and max(places) < view.pack_tokens


def test_parquet_shows_what_jsonl_shows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a long folder is wrapped
    lines = write(tmp_path / "groups.jsonl", groups(3))
    assert write_groups(tmp_path / "groups.parquet", read_groups(lines)) == 3
    shown = []
    for path in ("groups.jsonl", "groups.parquet"):
        assert inspect_data.main(["--data", path, "--tokenizer", str(folder), "--id", "q2"]) == 0
        shown.append(capsys.readouterr().out.replace(path, "FILE"))
    assert shown[0] == shown[1] and "[[Harbour2x]]" in shown[0]
