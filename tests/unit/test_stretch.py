"""Stretched positions: where they may jump, what is drawn, and that policy and reference see the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected import groups as documented
from inspected import tokenizer_folder, view_of
from refusals import refused
from segment_names import scored
from test_chat_templates import LLAMA2, QWEN3
from tiny_models import preference_groups, write_lines, write_model
from token_data import encoded, tokenize

from megatron_solopo.config import Config
from megatron_solopo.data.inspection.examples import read_examples
from megatron_solopo.data.inspection.view import make_view
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.stretch import Jump, Stretch, boundary_places
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS
from megatron_solopo.data.tokenized.tokens import CONVERSATION, Completion, Prompt, TokenGroup
from megatron_solopo.losses.registry import LOSSES
from megatron_solopo.losses.solopo import policy_scores, reference_scores
from megatron_solopo.pack import Context, Side

LENGTH = 300
STRETCH = Stretch(LENGTH, 1.0, 7, by_epoch=True)
BOUNDARIES = [5, 12, 30]


def group(first: int = 0, boundaries: list[int] = BOUNDARIES) -> TokenGroup:
    """40 tokens of a long prompt, whose longest response has 7, and a short prompt with boundaries of no use."""
    chosen, rejected = Completion(Side.CHOSEN, range(7)), Completion(Side.REJECTED, range(3))
    long = Prompt(Context.LONG, range(first, first + 40), (chosen, rejected), boundaries)
    return TokenGroup("g", (Prompt(Context.SHORT, range(8), (chosen,), [2]), long))


def drawn(stretch: Stretch, count: int, epoch: int = 0) -> list[Prompt]:
    return [stretch.of_group(group(first), epoch).prompts[1] for first in range(count)]


def test_positions_jump_at_boundaries_up_to_the_length() -> None:
    """The total is uniform from the prompt's own to what leaves room for its longest response."""
    ends = []
    for number, prompt in enumerate(drawn(STRETCH, 3000)):
        assert STRETCH.of_group(group(number), 0).prompts[0] == group(number).prompts[0]
        positions = prompt.positions()
        steps = np.diff(positions)
        assert positions[0] == 0 and (steps >= 1).all()
        assert set(np.flatnonzero(steps > 1) + 1) == {jump.token for jump in prompt.jumps} <= set(BOUNDARIES)
        assert prompt.end == positions[-1] + 1
        ends.append(prompt.end)
    assert min(ends) == 40 and max(ends) == LENGTH - 7
    shares = np.histogram(ends, bins=8, range=(40, LENGTH - 6))[0] / len(ends)
    assert abs(shares - 1 / 8).max() < 0.03
    means = np.mean([[dict(p.jumps).get(token, 0) for token in BOUNDARIES] for p in drawn(STRETCH, 3000)], axis=0)
    assert means == pytest.approx([(LENGTH - 47) / 6] * 3, rel=0.1)  # a third of half of what is spare


def test_a_draw_depends_on_seed_prompt_and_epoch_alone() -> None:
    """So on no process, layout or earlier step; a cache of log-probs has one draw for all epochs."""
    assert drawn(STRETCH, 9, 2) == drawn(STRETCH, 9, 2)
    others = [drawn(STRETCH, 9, 3), drawn(dataclasses.replace(STRETCH, seed=8), 9, 2), drawn(STRETCH, 9, 2)[::-1]]
    for other in others:
        assert sum(a.jumps == b.jumps for a, b in zip(drawn(STRETCH, 9, 2), other, strict=True)) <= 1
    once = dataclasses.replace(STRETCH, by_epoch=False)
    assert drawn(once, 9, 2) == drawn(once, 9, 0) == drawn(STRETCH, 9, 0)


def test_a_fraction_of_the_examples_is_stretched() -> None:
    halves = [p.jumps for p in drawn(dataclasses.replace(STRETCH, fraction=0.5), 2000)]
    assert sum(map(bool, halves)) == pytest.approx(1000, abs=100)
    assert all(not half or half == p.jumps for half, p in zip(halves, drawn(STRETCH, 2000), strict=True))
    assert not any(p.jumps for p in drawn(dataclasses.replace(STRETCH, fraction=0.0), 99))
    assert STRETCH.of_group(group(boundaries=[]), 0) == group(boundaries=[])
    exact = dataclasses.replace(STRETCH, length=47)  # of prompt and response: nothing is spare
    assert drawn(exact, 9) == [group(first).prompts[1] for first in range(9)]


@pytest.mark.parametrize("share", [True, False])
def test_responses_follow_the_last_position_of_their_prompt(share: bool) -> None:
    prompt = Prompt(Context.LONG, [11, 12, 13], (Completion(Side.CHOSEN, [21, 22, 23]),), [2], (Jump(2, 5),))
    pack = build_pack([TokenGroup("g", (prompt,))], [0], share, 8, 4)
    rows = [row for piece in pack.pieces for row in range(piece.start, piece.start + piece.length)]
    assert pack.positions[rows].tolist() == [0, 1, 7, 8, 9] and pack.tokens[rows].tolist() == [11, 12, 13, 21, 22]


def test_boundaries_of_a_text() -> None:
    text = "Read.\n\nFirst.\n \n\n Second.\nof two lines\n\nThird."
    assert [text[place:][:3] for place in boundary_places(text, [])] == ["Fir", " Se", "Thi"]
    assert boundary_places("a b\nc d\n e f", []) == [4, 8] and boundary_places("one", []) == []
    assert boundary_places(text, [(7, 13, True), (18, 30, False)]) == [7, 18, 30]


@pytest.mark.parametrize("template", [None, LLAMA2, QWEN3], ids=["chatml", "llama2", "qwen3"])
@pytest.mark.parametrize("change", ["none", "control token", "spaces"])
def test_boundaries_are_the_first_tokens_of_documents(tmp_path: Path, template: str | None, change: str) -> None:
    """Also where a text spells a control token, and where a document's first token has the space before it; and the
    store has the encoder's."""
    folder = tokenizer_folder(tmp_path / "hf")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.replace("<|head|>", "<|im_start|>"))
    tokenizer, records = load_tokenizer(folder, eos_token="<|im_end|>"), documented(3)
    for record in records:
        message = record["long_messages"][-1]
        if change == "control token":
            message["content"] += " <|im_end|>?"
        elif change == "spaces":
            message["content"] = message["content"].replace("\n", " ")
    path = write_lines(tmp_path / "groups.jsonl", records)
    expected = encoded(path, tokenizer, BOTH_PAIRS)
    assert list(tokenize(path, tokenizer, BOTH_PAIRS, 8192).groups) == expected
    for record, example in zip(records, expected, strict=True):
        short, long = example.prompts
        content, spans = record["long_messages"][-1]["content"], record["long_spans"]
        texts = [content[start:end] for start, end, _ in spans] + [content[spans[-1][1] :]]
        assert not len(short.boundaries) and len(long.boundaries) == len(texts)
        for token, text in zip(long.boundaries, texts, strict=True):
            behind, before = tokenizer.decode(long.ids[token:]), tokenizer.decode(long.ids[:token])
            assert behind.strip().startswith(text.strip()[:40])
            assert content[: content.index(text.strip()[:40])].strip()[-20:] in before[-60:]


def paragraphs(tmp_path: Path, sft: bool = False) -> Path:
    """Two groups or conversations of three paragraphs, and one of a single line."""
    records = []
    for number, text in enumerate(["w1 w2\n\nw3 w4 w5\n\nw6", "w1 w2\n\nw7\n\nw8 w9", "w1 w2 w3 w4"]):
        user = [{"role": "user", "content": text}]
        record: dict[str, Any] = {"id": str(number), "messages": [*user, {"role": "assistant", "content": "w5 w6"}]}
        if not sft:
            short = [{"role": "user", "content": "w1\n\nw2"}]
            record = {"id": str(number), "short_messages": short, "long_messages": user}
            record |= {"chosen": "w5 w6", "rejected": "w7"}
        records.append(record)
    return write_lines(tmp_path / "data.jsonl", records)


@pytest.mark.parametrize("sft", [False, True])
def test_without_documents_paragraphs_are_boundaries(tmp_path: Path, sft: bool) -> None:
    tokenizer, wanted = load_tokenizer(write_model(tmp_path / "hf")), CONVERSATION if sft else BOTH_PAIRS
    path = paragraphs(tmp_path, sft)
    store = tokenize(path, tokenizer, wanted, 64)
    assert list(store.groups) == encoded(path, tokenizer, wanted)
    long = [group.prompts[-1] for group in store.groups]
    assert [list(prompt.boundaries) for prompt in long] == [[3, 6], [3, 4], []]  # behind <user>
    assert len(long[0].ids) == 8
    stretched = store.stretched(STRETCH, path)
    assert stretched.report.without_boundary == ["2"]
    assert any("1 examples have no document or paragraph" in line for line in stretched.report.lines(64))
    assert stretched.of_epoch(0, 1) == STRETCH.of_group(store.groups[0], 1) != store.of_epoch(0, 1) == store.groups[0]
    with refused("stretch-too-short", f"{path}: example '0' has 11 tokens", "--stretch-positions 10"):
        store.stretched(dataclasses.replace(STRETCH, length=10), path)
    if not sft:
        assert stretched.only(scored("long_chosen")).stretch == STRETCH
        assert stretched.only(scored("short_chosen", "short_rejected")).stretch is None


def test_data_without_any_boundary_are_refused(tmp_path: Path) -> None:
    tokenizer, path = load_tokenizer(write_model(tmp_path / "hf")), tmp_path / "groups.jsonl"
    store = tokenize(write_lines(path, preference_groups(3)), tokenizer, BOTH_PAIRS, 128)
    with refused("stretch-without-boundaries", f"{path}: ", "--stretch-positions", "long_spans"):
        store.stretched(STRETCH, path)


def test_other_boundaries_are_other_data_where_positions_are_stretched(tmp_path: Path) -> None:
    """With the same texts, as where the documents were recorded anew: the key of reference log-probs has this."""
    tokenizer, records = load_tokenizer(tokenizer_folder(tmp_path / "hf")), documented(2)
    stores = []
    for name in ("one", "two"):
        stores.append(tokenize(write_lines(tmp_path / f"{name}.jsonl", records), tokenizer, BOTH_PAIRS, 8192))
        records[0]["long_spans"] = records[0]["long_spans"][1:]
    assert stores[0].fingerprint == stores[1].fingerprint
    far = dataclasses.replace(STRETCH, length=9999)
    prints = [store.stretched(far, "x").fingerprint for store in stores]
    assert len({*prints, stores[0].fingerprint}) == 3


def _methods() -> list[Config]:
    configs = []
    for loss, mode, target, anchor in product(LOSSES, ("solo", "long"), ("chosen", "both"), ("per_context", "short")):
        if mode in LOSSES[loss].context_modes:
            config = Config()
            config.data.stretch_positions = LENGTH
            config.method.preference_loss, config.method.context_mode = loss, mode
            config.method.alignment_target, config.method.alignment_reference = target, anchor
            configs.append(config)
    return configs


def test_policy_and_reference_have_the_same_positions(tmp_path: Path) -> None:
    """With every method; epochs draw anew unless a cache has log-probs of the long side."""
    tokenizer, kinds = load_tokenizer(tokenizer_folder(tmp_path / "hf")), Counter[bool]()
    store = tokenize(write_lines(tmp_path / "g.jsonl", documented(2)), tokenizer, BOTH_PAIRS, 8192)
    for config in _methods():
        config.data.stretch_positions = 9999
        stretch = Stretch.of(config)
        assert stretch is not None
        compared = reference_scores(config.method)
        on_long = any(context == Context.LONG for context, _ in compared)
        assert stretch.by_epoch == (not on_long)
        config.method.reference = "resident"
        anew = Stretch.of(config)
        assert anew is not None and anew.by_epoch
        kinds[on_long] += 1
        if on_long:
            stretched = store.stretched(anew, "x")
            policy, reference = (stretched.only(s).of_epoch(1, 4) for s in (policy_scores(config.method), compared))
            assert policy.prompts[-1].jumps == reference.prompts[-1].jumps != ()
    assert kinds[True] and kinds[False]


def test_inspection_shows_the_jumps(tmp_path: Path) -> None:
    tokenizer, (record,) = load_tokenizer(tokenizer_folder(tmp_path / "hf")), documented(1)
    plain = view_of(record, tokenizer, tmp_path)
    example = next(read_examples(tmp_path / "one.jsonl"))
    view = make_view(example, tokenizer, plain.method, stretch=dataclasses.replace(STRETCH, length=30_000))
    (short, long), tokens = view.contexts, plain.contexts[1].tokens
    assert not short.jumps and long.jumps
    last = tokens - 1 + sum(jump.gap for jump in long.jumps)
    text = "\n".join(str(part) for part in long.section().parts)
    assert f"stretched to position {last:,} by {len(long.jumps)} jumps: {long.jumps[0].gap:,} at token " in text
    moved = [b.first_token - a.first_token for a, b in zip(plain.contexts[1].documents, long.documents, strict=True)]
    gaps = dict(long.jumps)
    assert moved == np.cumsum([gaps.get(document.first_token, 0) for document in plain.contexts[1].documents]).tolist()
    (segment,) = (segment for segment in view.segments if segment.context == Context.LONG)
    assert segment.tokens[0].position == last + 1 and segment.prompt_tokens == tokens
    assert [segment.tokens[0].position for segment in view.segments[:2]] == [short.tokens] * 2
