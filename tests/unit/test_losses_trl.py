"""Losses against TRL's code: its trainers' loss functions, called on the same log-probs or tiny models."""

import math
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from segment_names import loss_by_name, scored, segment_name
from torch.testing import assert_close

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.schema import PreferenceGroup
from megatron_solopo.data.tokenized.encoder import Encoder

ROLES = ("short_chosen", "short_rejected")
LD_ALPHA = 0.4
CPU = SimpleNamespace(device="cpu")


def short(loss, beta=None, **options):
    of_loss = {"simpo": {"simpo_gamma": 0.7}, "orpo": {"orpo_lambda": 0.4}}.get(loss, {})
    return MethodConfig(preference_loss=loss, context_mode="short", beta=beta, loss_options=of_loss, **options)


def draw(seed, groups=5):
    """Summed log-probs and lengths of a few groups."""
    r = random.Random(seed)
    n = {role: [r.randint(1, 9) for _ in range(groups)] for role in ROLES}
    p = {role: [-r.uniform(0.05, 4) * k for k in n[role]] for role in ROLES}
    return tuple({role: torch.tensor(v, dtype=torch.float64) for role, v in x.items()} for x in (p, n))


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_simpo_equals_trl(monkeypatch, smoothing):
    """TRL's CPOTrainer.cpo_loss reads five settings of its trainer and mean log-probs."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo = pytest.importorskip("trl.experimental.cpo")
    p, n = draw(6)
    method = short("simpo", 2.1, label_smoothing=smoothing)
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=method.beta,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        alpha=0.0,
        accelerator=CPU,
    )
    losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(settings, *(p[role] / n[role] for role in ROLES))
    got = loss_by_name(p, n, None, method)
    assert_close(got.loss, losses, rtol=1e-12, atol=1e-12)
    assert_close(got.metrics["reward_chosen"], chosen, rtol=1e-12, atol=1e-12)
    assert_close(got.metrics["reward_rejected"], rejected, rtol=1e-12, atol=1e-12)


def test_orpo_odds_ratio_equals_trl(monkeypatch):
    """TRL's ORPOTrainer.odds_ratio_loss (float32) is the term that its trainer subtracts from the likelihood loss."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo")
    p, n = draw(7)
    method = short("orpo")
    settings = SimpleNamespace(beta=0.4, accelerator=CPU)
    means = [p[role] / n[role] for role in ROLES]
    odds_term = orpo.ORPOTrainer.odds_ratio_loss(settings, *means)[0]
    assert_close(loss_by_name(p, n, None, method).loss.float(), -means[0].float() - odds_term, rtol=1e-5, atol=1e-6)


ROWS = [("w1 w2 w3 w4", "w5 w6", "w7"), ("w8 w9", "w10", "w11 w12 w13")]
"""(question, chosen, rejected); the chosen answers have different lengths."""


def chat(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's DPOTrainer on two tiny models; its loss reads its attributes at every call."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny_models import write_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(write_model(folder / str(seed), seed=seed), dtype=torch.float32).eval()
        for seed in (1, 2)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "1")
    dataset = Dataset.from_list(
        [
            {"prompt": chat("user", q), "chosen": chat("assistant", a), "rejected": chat("assistant", b)}
            for q, a, b in ROWS
        ]
    )
    plain = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    options = trl.DPOConfig(str(folder / "trl"), beta=0.3, per_device_train_batch_size=2, use_weighting=True, **plain)
    trainer = trl.DPOTrainer(policy, reference, options, train_dataset=dataset, processing_class=tokenizer)
    trainer.use_weighting = False  # its model computes what the weights need
    return trainer


@pytest.fixture(scope="module")
def ours(trainer):
    """(token ids of each sequence, policy sums, lengths, reference sums) of the same rows by our tokens.

    "ld" sums have weight `LD_ALPHA` beyond the shorter response; "squares" are the policy's log_squares.
    """
    tokenizer, sequences, sums, lengths = trainer.processing_class, set(), {}, {}
    for question, chosen, rejected in ROWS:
        group = PreferenceGroup("x", chat("user", question), None, chosen, rejected)
        (prompt,) = Encoder(tokenizer, None, "refuse").encode(group, scored(*ROLES)).prompts
        for completion in prompt.completions:
            role = segment_name(prompt.context, completion.side)
            ids = [*prompt.ids, *completion.ids]
            sequences.add(tuple(ids))
            for name, model in (
                ("policy", trainer.accelerator.unwrap_model(trainer.model)),
                ("ref", trainer.ref_model),
            ):
                with torch.no_grad():
                    scores = model(torch.tensor([ids])).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
                picked = scores[range(len(completion.ids)), completion.ids]
                weights = torch.full_like(picked, LD_ALPHA)
                weights[: min(len(one.ids) for one in prompt.completions)] = 1
                sums.setdefault((name, role), []).append(picked.sum())
                sums.setdefault((f"{name} ld", role), []).append((weights * picked).sum())
                sums.setdefault((f"{name} squares", role), []).append(scores.exp().square().sum(-1).log().sum())
            lengths.setdefault(role, []).append(float(len(completion.ids)))
    names = ("policy", "ref", "policy ld", "ref ld", "policy squares")
    policy, reference, *more = ({role: torch.stack(sums[name, role]) for role in ROLES} for name in names)
    return sequences, policy, {role: torch.tensor(v) for role, v in lengths.items()}, reference, *more


def test_token_ids_equal_trl(trainer, ours):
    batch = next(iter(trainer.get_train_dataloader()))
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    assert ours[0] == {tuple(ids[mask.bool()].tolist()) for ids, mask in rows}


DPO_CASES = {
    "dpo": (["sigmoid"], [1.0], 0.0, short("dpo", 0.3)),
    "ipo": (["ipo"], [1.0], 0.0, short("ipo", 0.3)),
    "robust": (["robust"], [1.0], 0.2, short("dpo", 0.3, label_smoothing=0.2, label_smoothing_form="robust")),
    "dpo with sft": (
        ["sigmoid", "sft"],
        [1.0, 0.6],
        0.0,
        short("dpo", 0.3, sft_weight=0.6, sft_normalization="token"),
    ),
    "ipo with sft": (["ipo", "sft"], [1.0, 0.6], 0.0, short("ipo", 0.3, sft_weight=0.6, sft_normalization="token")),
    "dpo_norm": (["sigmoid_norm"], [1.0], 0.0, short("dpo_norm", 0.3)),
    "wpo": (["sigmoid"], [1.0], 0.0, short("wpo", 0.3)),
    "ld_dpo": (["sigmoid"], [1.0], 0.0, short("ld_dpo", 0.3)),
}
OF_TRAINER = {"wpo": {"use_weighting": True}, "ld_dpo": {"ld_alpha": LD_ALPHA}}
"""Further attributes of TRL's trainer."""


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_trainer_losses_equal_trl(trainer, ours, monkeypatch, case):
    """The same loss on a batch of two pairs: DPO, IPO, robust smoothing, and the sft term over the batch's tokens."""
    types, weights, smoothing, method = DPO_CASES[case]
    for name, value in (("loss_types", types), ("loss_weights", weights), ("label_smoothing", smoothing)):
        assert hasattr(trainer, name)
        monkeypatch.setattr(trainer, name, value)
    for name, value in OF_TRAINER.get(case, {}).items():
        assert hasattr(trainer, name)
        monkeypatch.setattr(trainer, name, value)
    theirs = trainer.compute_loss(trainer.model.eval(), next(iter(trainer.get_train_dataloader()))).detach()
    _, policy, lengths, reference, *ld, squares = ours
    if case == "ld_dpo":
        policy, reference = ld
    got = loss_by_name(policy, lengths, reference, method, lengths["short_chosen"].mean(), squares)
    assert got.metrics["margin"].abs().min() > 0.001  # the models differ, so the comparison is not trivial
    assert_close(got.loss.mean(), theirs, rtol=1e-5, atol=1e-5)
    if method.sft_weight:
        by_answer = loss_by_name(policy, lengths, reference, short(method.preference_loss, 0.3, sft_weight=0.6))
        assert abs(float(by_answer.loss.mean() - theirs)) > 1e-3  # the mean of each answer is another loss


def test_the_cases_are_not_one_loss(ours):
    _, policy, lengths, reference, *ld, squares = ours
    losses = []
    for name, case in DPO_CASES.items():
        sums = ld if name == "ld_dpo" else (policy, reference)
        got = loss_by_name(sums[0], lengths, sums[1], case[3], lengths["short_chosen"].mean(), squares)
        losses.append(float(got.loss.mean()))
    assert all(abs(a - b) > 1e-3 for (i, a), (j, b) in product(enumerate(losses), repeat=2) if i != j)
    assert all(abs(loss - math.log(2)) > 1e-3 for loss in losses)
