"""Packs against brute force: each predicting token attends to exactly what precedes its target."""

import random

import pytest
import torch
from segment_names import prompt_of

from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.stretch import Jump
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Segments, Side


def draw_group(draw, number):
    """One to three prompts with one to three completions, also of one token or with untrained stretches; positions of
    some prompts jump."""

    def ids(most):
        return [draw.randint(1, 999) for _ in range(draw.randint(1, most))]

    def completion():
        tokens = ids(8)
        loss_mask = [draw.random() < 0.6 for _ in tokens] if draw.random() < 0.5 else None
        return Completion(draw.choice(list(Side)), tokens, loss_mask, draw.randint(0, 3))

    def prompt():
        tokens, completions = ids(12), tuple(completion() for _ in range(draw.randint(1, 3)))
        jumps = tuple(Jump(token, draw.randint(1, 30)) for token in range(1, len(tokens)) if draw.random() < 0.2)
        return Prompt(draw.choice(list(Context)), tokens, completions, jumps=jumps)

    return TokenGroup(f"g{number}", tuple(prompt() for _ in range(draw.randint(1, 3))))


def draw_pack(seed, share, *multiples):
    draw = random.Random(seed)
    groups = [draw_group(draw, number) for number in range(draw.randint(1, 4))]
    return groups, build_pack(groups, range(10, 10 + len(groups)), share, *multiples)


def rows_of(scored):
    return list(zip(*(value.tolist() for value in list(vars(scored).values())[:5]), strict=True))


def seen_by(pack, row):
    """The (position, token) pairs that a row of the pack attends to, in the order of positions."""
    (piece,) = (p for p in pack.pieces if p.start <= row < p.start + p.length)
    rows = list(range(piece.start, row + 1))
    if piece.prompt is not None:
        prompt = pack.pieces[piece.prompt]
        assert prompt.prompt is None
        rows += range(prompt.start, prompt.start + prompt.length)
    return sorted((int(pack.positions[r]), int(pack.tokens[r])) for r in rows)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_each_target_is_predicted_from_exactly_its_past(seed, share):
    groups, pack = draw_pack(seed, share, *((1, 1), (8, 1), (8, 4), (1, 1, 16))[seed % 4])
    wanted, segments = [], []
    for number, group in enumerate(groups):
        for prompt in group.prompts:
            for completion in prompt.completions:
                full = [*prompt.ids, *completion.ids]
                places = [k + sum(gap for token, gap in prompt.jumps if token <= k) for k in range(len(full))]
                loss_mask = completion.loss_mask or [True] * len(completion.ids)
                wanted += [
                    (len(segments), list(zip(places, full[:k], strict=False)), full[k])
                    for k in range(len(prompt.ids), len(full))
                    if loss_mask[k - len(prompt.ids)]
                ]
                segments.append((number, prompt.context, completion.side, completion.response, sum(loss_mask)))
    got = []
    for predictor, target, segment in zip(
        pack.predictors.tolist(), pack.targets.tolist(), pack.segments.tolist(), strict=True
    ):
        got.append((segment, seen_by(pack, predictor), target))
    assert got == wanted
    assert rows_of(pack.scored) == segments and pack.scored.group_count == len(groups)
    assert pack.groups == tuple(range(10, 10 + len(groups)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("multiple_of", "of_pieces", "of_prompts"),
    [(1, 1, None), (7, 1, None), (64, 1, None), (8, 8, None), (12, 4, None), (1, 1, 16), (4, 4, 8), (7, 1, 5)],
)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_cover_the_pack_once_and_padding_is_counted(seed, share, multiple_of, of_pieces, of_prompts):
    groups, pack = draw_pack(seed, share, multiple_of, of_pieces, of_prompts)
    padded = sum(group.tokens(share, of_pieces, of_prompts) for group in groups)
    assert len(pack.tokens) == len(pack.positions) == sum(group.tokens(share) for group in groups) + pack.padding
    assert len(pack.tokens) % multiple_of == 0 and 0 <= len(pack.tokens) - padded < multiple_of
    assert [row for piece in pack.pieces for row in range(piece.start, piece.start + piece.slot)] == list(
        range(len(pack.tokens))
    )
    assert all(piece.slot > 0 and piece.slot % of_pieces == 0 for piece in pack.pieces)
    alone = [piece for piece in pack.pieces if piece.prompt is None and piece.length]
    assert all(piece.slot % (of_prompts or of_pieces) == 0 for piece in alone)
    assert pack.is_padding().sum() == pack.padding and not pack.is_padding()[pack.predictors].any()
    assert pack.predictors.numel() == 0 or int(pack.predictors.max()) < padded


def test_a_shared_prompt_occurs_once():
    group = TokenGroup("g", (prompt_of([11, 12, 13], {"short_chosen": [21, 22], "short_rejected": [31]}),))
    shared, apart = build_pack([group], [0]), build_pack([group], [0], share_prompts=False)
    assert shared.tokens.tolist() == [11, 12, 13, 21]  # the last token of a completion is only predicted
    assert shared.positions.tolist() == [0, 1, 2, 3]
    assert (shared.predictors.tolist(), shared.targets.tolist()) == ([2, 3, 2], [21, 22, 31])
    assert apart.tokens.tolist() == [11, 12, 13, 21, 11, 12, 13]
    assert (apart.predictors.tolist(), apart.targets.tolist()) == ([2, 3, 6], [21, 22, 31])
    assert group.separate_tokens() == 7 and group.longest == 5


def test_only_trained_tokens_of_a_conversation_are_predicted():
    """Assistant 21 22, user 31 32, assistant 41: the user's tokens are context."""
    loss_mask = [True, True, False, False, True]
    response = Completion(Side.PLAIN, [21, 22, 31, 32, 41], loss_mask)
    group = TokenGroup("c", (Prompt(Context.SHORT, [11, 12], (response,)),))
    pack = build_pack([group], [0])
    assert pack.tokens.tolist() == [11, 12, 21, 22, 31, 32]
    assert (pack.predictors.tolist(), pack.targets.tolist()) == ([1, 2, 5], [21, 22, 41])
    assert pack.scored.lengths.tolist() == [3] == [group.prompts[0].completions[0].trained_tokens]


@pytest.mark.parametrize("multiple_of", [1, 16])
def test_a_pack_without_groups_is_padding_alone(multiple_of):
    pack = build_pack([], [], multiple_of=multiple_of)
    assert len(pack.tokens) == pack.padding == multiple_of
    assert pack.positions.tolist() == list(range(multiple_of))
    assert len(pack.scored) == pack.scored.group_count == 0 and pack.groups == ()
    assert pack.scored.pairs(Context.SHORT).shape == pack.scored.alignments([Side.CHOSEN]).shape == (0, 2)
    for empty in (pack.predictors, pack.targets, pack.segments, pack.scored.groups, pack.scored.lengths):
        assert empty.numel() == 0 and empty.dtype == torch.int64


def test_pairs_and_alignments_are_those_of_each_group_in_any_order():
    """Against brute force over all segments, with k chosen and m rejected responses in a random order."""
    draw = random.Random(5)
    for _ in range(20):
        rows = []
        count = draw.randint(1, 4)
        for group in range(count):
            for side, most in ((Side.CHOSEN, draw.randint(1, 3)), (Side.REJECTED, draw.randint(1, 3))):
                rows += [(group, context, side, k, 1) for context in Context for k in range(most)]
        draw.shuffle(rows)
        segments = Segments.of(rows, count)
        for context in Context:
            wanted = [
                [i, j]
                for i, one in enumerate(rows)
                for j, other in enumerate(rows)
                if one[:3] == (other[0], context, Side.CHOSEN) and other[1:3] == (context, Side.REJECTED)
            ]
            assert segments.pairs(context).tolist() == wanted
        aligned = segments.alignments([Side.CHOSEN, Side.REJECTED]).tolist()
        assert sorted(aligned) == sorted(
            [i, j]
            for i, one in enumerate(rows)
            for j, other in enumerate(rows)
            if (one[1], other[1]) == (Context.SHORT, Context.LONG) and one[0] == other[0] and one[2:] == other[2:]
        )
        chosen = segments.alignments([Side.CHOSEN]).tolist()
        assert chosen == [pair for pair in aligned if rows[pair[0]][2] == Side.CHOSEN]
