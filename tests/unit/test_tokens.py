"""One data set tokenized once, seen with the roles of the policy and with those of the reference."""

from array import array

from segment_names import names_in, prompt_of, scored
from tiny_models import preference_groups, write_lines, write_model
from token_data import encoded, tokenize

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized.tokens import Report, TokenGroup
from megatron_solopo.losses.solopo import all_scores, policy_scores, reference_scores

SHORT, LONG = ("short_chosen", "short_rejected"), ("long_chosen", "long_rejected")
LONGPO = MethodConfig(preference_loss="longpo", context_mode="long", beta=0.1)


def ids(*values):
    return array("i", values)


def group(number):
    responses = {"chosen": ids(number, 1), "rejected": ids(number, 2, 3)}
    return TokenGroup(
        f"g{number}",
        tuple(
            prompt_of(ids(number), {role: responses[role.split("_")[1]] for role in names}) for names in (SHORT, LONG)
        ),
    )


def names(dataset):
    return [names_in(group) for group in dataset.groups]


def test_a_selection_drops_prompts_that_are_not_used():
    short, solo = (group(1).only(scored(*segments)) for segments in (SHORT, (*SHORT, "long_chosen")))
    assert names_in(short) == list(SHORT) and len(short.prompts) == 1 and short.id == "g1"
    assert names_in(solo) == [*SHORT, "long_chosen"] and group(1).only(scored(*SHORT, *LONG)) == group(1)


def test_a_selection_equals_tokenizing_those_roles(tmp_path):
    """So a reference cache is the same whichever method filled it."""
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    path = write_lines(tmp_path / "groups.jsonl", preference_groups(5))
    both = tokenize(path, tokenizer, all_scores(LONGPO), 128)
    assert names(both) == [[*SHORT, *LONG]] * 5
    fingerprints = {both.fingerprint}
    for wanted in (policy_scores(LONGPO), reference_scores(LONGPO), scored(*SHORT, "long_chosen")):
        selection = both.only(wanted)
        assert selection.fingerprint == tokenize(path, tokenizer, wanted, 128).fingerprint
        assert list(selection.groups) == encoded(path, tokenizer, wanted)
        fingerprints.add(selection.fingerprint)
    assert len(fingerprints) == 4 and both.only(scored(*SHORT, *LONG)) is both


def test_policy_and_reference_drop_the_same_examples(tmp_path):
    """An example whose long side is beyond the limit goes from the short side too: rows of the table stay in place."""
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    path = write_lines(tmp_path / "groups.jsonl", preference_groups(9))
    both = tokenize(path, tokenizer, all_scores(LONGPO), 60, "drop")
    policy, reference = both.only(policy_scores(LONGPO)), both.only(reference_scores(LONGPO))
    assert both.dropped and len(policy.groups) == 9 - len(both.dropped)
    assert [g.id for g in policy.groups] == [g.id for g in reference.groups]
    assert len(tokenize(path, tokenizer, reference_scores(LONGPO), 60, "drop").groups) == 9


def test_sampled_ids_are_trained_on_where_they_are_the_text(tmp_path):
    """Another split of the same text into tokens is kept; ids of another tokenizer are not, and are counted."""
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    end, (w1, w2) = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(["w1", "w2"])
    group = {**preference_groups(1)[0], "chosen": "w1 w2", "rejected": "w2"}
    special = tokenizer.convert_tokens_to_ids("<user>")  # skipped when decoded: not how the text is tokenized
    cases = {
        "own": ([w1, w2], [w2], [w1, w2], 2),
        "ended": ([w1, w2, end], [w2, end, end], [w1, w2], 2),
        "special": ([w1, special, w2], [w2], [w1, special, w2], 2),
        "other text": ([w2, w1], [w2], [w1, w2], 1),
        "beyond the vocabulary": ([w1, 10**9], [w2], [w1, w2], 1),
        "only the end": ([end], [w2], [w1, w2], 1),
        "text only": (None, None, [w1, w2], 0),
    }
    for name, (chosen, rejected, expected, used) in cases.items():
        path = write_lines(tmp_path / "g.jsonl", [group | {"chosen_ids": chosen, "rejected_ids": rejected}])
        data = tokenize(path, tokenizer, scored(*SHORT, *LONG), 128)
        for one in data.groups[0].prompts:
            assert [list(c.ids) for c in one.completions] == [[*expected, end], [w2, end]], name
        assert (data.report.ids_used, data.report.ids_mismatched) == (used, 0 if chosen is None else 2 - used), name
    assert "token ids of 1 responses are not this tokenizer's" in Report(ids_mismatched=1).lines(9)[0]
