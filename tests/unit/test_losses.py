"""Every loss by value against plain Python, by float64 gradient checks, against TRL, and by its laws."""

import math
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.schema import PreferenceGroup
from megatron_solopo.data.tokens import tokenize_group
from megatron_solopo.losses import dpo_reward, orpo_log_odds, sft_loss, simpo_reward, solopo_loss
from megatron_solopo.losses.solopo import needs_reference, roles

ROLES = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")
CONSTANTS = dict(simpo_gamma=0.7, orpo_lambda=0.4, alignment_weight=1.7)
BETA = {"dpo": 0.3, "simpo": 2.1, "orpo": None}
GROUPS = 5


def variants():
    """Every loss x context mode x alignment option that has an effect."""
    for loss, mode in product(("dpo", "simpo", "orpo"), ("solo", "short", "long")):
        targets = ("chosen", "both") if mode == "solo" else ("chosen",)
        stops = (False, True) if mode == "solo" else (False,)
        references = ("per_context", "short") if mode == "solo" and loss == "dpo" else ("per_context",)
        for target, stop, reference in product(targets, stops, references):
            yield MethodConfig(
                preference_loss=loss,
                context_mode=mode,
                beta=BETA[loss],
                alignment_target=target,
                alignment_stop_short_gradient=stop,
                alignment_reference=reference,
                **CONSTANTS,
            )


def name_of(method):
    return "-".join(
        [
            method.preference_loss,
            method.context_mode,
            method.alignment_target,
            method.alignment_reference,
            *(["stop"] if method.alignment_stop_short_gradient else []),
        ]
    )


VARIANTS = list(variants())
every_variant = pytest.mark.parametrize("method", VARIANTS, ids=map(name_of, VARIANTS))


def draw(seed=0):
    """Summed log-probs, lengths and reference log-probs of GROUPS groups as lists; short and long lengths agree."""
    r = random.Random(seed)
    lengths = {"chosen": [r.randint(1, 9) for _ in range(GROUPS)], "rejected": [r.randint(1, 9) for _ in range(GROUPS)]}
    n = {role: lengths[role.split("_")[1]] for role in ROLES}
    log_probs = {role: [-r.uniform(0.05, 4) * k for k in n[role]] for role in ROLES}
    reference = {role: [-r.uniform(0.05, 4) * k for k in n[role]] for role in ROLES}
    return log_probs, n, reference


def closed_form(m, p, n, ref, still=None):
    """One group's (preference loss, alignment) from floats; ``still``: the short log-probs that the alignment sees."""
    still = still or p

    def log_sigmoid(x):
        return min(x, 0.0) - math.log1p(math.exp(-abs(x)))

    def reward(role, values):
        if m.preference_loss == "dpo":
            base = role
            if m.context_mode == "solo" and m.alignment_reference == "short":
                base = "short_" + role.split("_")[1]
            return m.beta * values[role] - m.beta * ref[base]
        if m.preference_loss == "simpo":
            return m.beta / n[role] * values[role]
        probability = math.exp(values[role] / n[role])
        return math.log(probability / (1 - probability))

    side = "long" if m.context_mode == "long" else "short"
    margin = reward(side + "_chosen", p) - reward(side + "_rejected", p)
    if m.preference_loss == "dpo":
        preference = -log_sigmoid(margin)
    elif m.preference_loss == "simpo":
        preference = -log_sigmoid(margin - m.simpo_gamma)
    else:
        preference = -p[side + "_chosen"] / n[side + "_chosen"] - m.orpo_lambda * log_sigmoid(margin)
    if m.context_mode != "solo":
        return preference, 0.0
    aligned = ("chosen", "rejected") if m.alignment_target == "both" else ("chosen",)
    return preference, sum(abs(reward(f"short_{y}", still) - reward(f"long_{y}", p)) for y in aligned)


def total(method, p, n, ref, still=None):
    preference, alignment = closed_form(method, p, n, ref, still)
    return preference + method.alignment_weight * alignment


def tensors(values, **options):
    return {role: torch.tensor(value, dtype=torch.float64, **options) for role, value in values.items()}


def group(values, i):
    return {role: value[i] for role, value in values.items()}


@every_variant
def test_value_equals_the_closed_form(method):
    p, n, ref = draw()
    got = solopo_loss(tensors(p), tensors(n), tensors(ref), method)
    wanted = [closed_form(method, group(p, i), group(n, i), group(ref, i)) for i in range(GROUPS)]
    losses = [preference + method.alignment_weight * alignment for preference, alignment in wanted]
    assert_close(got.loss, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert_close(
        got.metrics["po_loss"], torch.tensor([a for a, _ in wanted], dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    if method.context_mode == "solo":
        assert_close(
            got.metrics["alignment_loss"],
            torch.tensor([b for _, b in wanted], dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )
    assert not any(value.requires_grad or value.shape != (GROUPS,) for value in got.metrics.values())


@every_variant
def test_gradient_equals_differences_of_the_closed_form(method):
    """Central differences of the plain-Python loss; a stopped short side stands still in the alignment."""
    p, n, ref = draw(1)
    inputs = tensors(p, requires_grad=True)
    solopo_loss(inputs, tensors(n), tensors(ref), method).loss.sum().backward()
    step = 1e-5
    for i, role in product(range(GROUPS), ROLES):
        here = group(p, i)
        still = here if method.alignment_stop_short_gradient else None
        up, down = ({**here, role: here[role] + sign * step} for sign in (1, -1))
        slope = (
            total(method, up, group(n, i), group(ref, i), still)
            - total(method, down, group(n, i), group(ref, i), still)
        ) / (2 * step)
        gradient = 0.0 if inputs[role].grad is None else float(inputs[role].grad[i])
        assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-8), role
        assert (inputs[role].grad is not None) == (role in roles(method)), role


@pytest.mark.parametrize(
    "method",
    [m for m in VARIANTS if not m.alignment_stop_short_gradient],
    ids=[name_of(m) for m in VARIANTS if not m.alignment_stop_short_gradient],
)
def test_gradcheck(method):
    p, n, ref = draw(2)
    wanted = roles(method)
    lengths, reference = tensors(n), tensors(ref)

    def loss(*values):
        return solopo_loss(dict(zip(wanted, values, strict=True)), lengths, reference, method).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors(p, requires_grad=True)[role] for role in wanted))


def test_sft_is_the_mean_negative_log_likelihood():
    log_prob = torch.tensor([-6.0, -1.0], dtype=torch.float64, requires_grad=True)
    lengths = {"response": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    assert sft_loss({"response": log_prob}, lengths).loss.tolist() == [2.0, 0.25]
    assert torch.autograd.gradcheck(lambda x: sft_loss({"response": x}, lengths).loss, (log_prob,))


def test_roles_and_reference():
    def method(**options):
        return MethodConfig(alignment_weight=1.0, beta=0.1, **options)

    assert roles(method(objective="sft")) == ("response",)
    assert roles(method(context_mode="short")) == ROLES[:2]
    assert roles(method(context_mode="long")) == ROLES[2:]
    assert roles(method()) == ROLES[:3]
    assert roles(method(alignment_target="both")) == ROLES
    assert [needs_reference(method(preference_loss=loss)) for loss in ("dpo", "simpo", "orpo")] == [True, False, False]
    assert not needs_reference(method(objective="sft"))


@pytest.mark.parametrize("missing", ["short_chosen", "short_rejected", "long_chosen"])
def test_a_missing_role_is_an_error(missing):
    p, n, ref = draw()
    with pytest.raises(KeyError, match=missing):
        solopo_loss(tensors({r: v for r, v in p.items() if r != missing}), tensors(n), tensors(ref), VARIANTS[0])


def test_dpo_without_reference_is_an_error():
    p, n, _ = draw()
    with pytest.raises(KeyError, match="reference"):
        solopo_loss(tensors(p), tensors(n), None, VARIANTS[0])


@pytest.mark.parametrize("mode", ["solo", "short", "long"])
def test_dpo_starts_at_ln_2(mode):
    p, n, _ = draw(3)
    method = MethodConfig(context_mode=mode, beta=0.1, alignment_weight=3.0)
    got = solopo_loss(tensors(p), tensors(n), tensors(p), method)
    assert_close(got.metrics["po_loss"], torch.full((GROUPS,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-15)
    assert got.metrics["accuracy"].sum() == 0 and got.metrics["margin"].abs().max() == 0
    if mode == "solo":
        assert got.metrics["alignment_loss"].abs().max() == 0
        assert_close(got.loss, got.metrics["po_loss"], rtol=0, atol=0)


@pytest.mark.parametrize("loss,target", list(product(("dpo", "simpo", "orpo"), ("chosen", "both"))))
def test_equal_short_and_long_log_probs_leave_plain_preference_optimization(loss, target):
    p, n, ref = draw(4)
    p, ref = ({role: values["short_" + role.split("_")[1]] for role in ROLES} for values in (p, ref))
    solo = MethodConfig(preference_loss=loss, beta=BETA[loss], alignment_target=target, **CONSTANTS)
    short = MethodConfig(preference_loss=loss, beta=BETA[loss], context_mode="short", **CONSTANTS)
    inputs = tensors(p, requires_grad=True)
    got = solopo_loss(inputs, tensors(n), tensors(ref), solo)
    assert got.metrics["alignment_loss"].tolist() == [0.0] * GROUPS
    assert got.metrics["short_long_gap_nats_per_token"].tolist() == [0.0] * GROUPS
    assert torch.equal(got.loss, solopo_loss(tensors(p), tensors(n), tensors(ref), short).loss)
    got.loss.sum().backward()
    assert inputs["long_chosen"].grad.abs().max() == 0  # the subgradient of |x| at 0


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_stopped_short_side_gets_no_gradient_from_the_alignment(loss):
    """The gradient on short log-probs is that of the short loss alone; the long side still moves."""
    p, n, ref = draw(5)
    gradients = {}
    for mode, stop in (("short", False), ("solo", True), ("solo", False)):
        method = MethodConfig(
            preference_loss=loss,
            context_mode=mode,
            beta=BETA[loss],
            alignment_target="both",
            alignment_stop_short_gradient=stop,
            **CONSTANTS,
        )
        inputs = tensors(p, requires_grad=True)
        solopo_loss(inputs, tensors(n), tensors(ref), method).loss.sum().backward()
        gradients[mode, stop] = {role: x.grad for role, x in inputs.items()}
    for role in ("short_chosen", "short_rejected"):
        assert torch.equal(gradients["solo", True][role], gradients["short", False][role])
        assert (gradients["solo", False][role] != gradients["short", False][role]).all()
    for role in ("long_chosen", "long_rejected"):
        assert (gradients["solo", True][role] != 0).all()
        assert torch.equal(gradients["solo", True][role], gradients["solo", False][role])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_stable_where_the_answer_is_certain(dtype):
    """Mean log-probs at and next to 0: finite value and gradient, clamps counted for each group."""
    p = {
        "short_chosen": [0.0, -1e-8, -2e-6, -1.0],
        "short_rejected": [-1e-7, -30.0, -0.5, -200.0],
        "long_chosen": [-1e-9, -80.0, -1e-5, 0.0],
    }
    inputs = {role: torch.tensor(value, dtype=dtype, requires_grad=True) for role, value in p.items()}
    lengths = {role: torch.ones(4, dtype=dtype) for role in p}
    method = MethodConfig(preference_loss="orpo", **CONSTANTS)
    got = solopo_loss(inputs, lengths, None, method)
    got.loss.sum().backward()
    assert got.loss.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs.values())
    assert got.metrics["orpo_clamped"].tolist() == [3, 1, 0, 1]
    largest = -1e-6 - math.log(-math.expm1(-1e-6))
    assert float(got.metrics["reward_chosen"][0]) == pytest.approx(largest, rel=1e-6)
    assert float(inputs["short_chosen"].grad[0]) == -1.0  # the likelihood term still moves a clamped answer


def test_orpo_odds_keep_their_precision_near_one():
    """float64 odds next to p = 0 against exact arithmetic: log(P / (1 - P)) = -log(exp(-p) - 1)."""
    means = [-1e-6 * 1.5, -1e-4, -1e-2, -0.7, -5.0, -40.0]
    got = orpo_log_odds(torch.tensor(means, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    assert_close(
        got, torch.tensor([-math.log(math.expm1(-p)) for p in means], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_rewards_use_sums_for_dpo_and_means_for_the_others():
    log_prob, length = torch.tensor([-8.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    assert dpo_reward(log_prob, torch.tensor([-5.0]), 0.1).tolist() == pytest.approx([-0.3])
    assert simpo_reward(log_prob, length, 2.0).tolist() == [-4.0]
    assert orpo_log_odds(log_prob, length).tolist() == pytest.approx([math.log(math.exp(-2) / (1 - math.exp(-2)))])


def short_method(loss):
    return MethodConfig(preference_loss=loss, context_mode="short", beta=BETA[loss], **CONSTANTS)


def test_simpo_equals_trl(monkeypatch):
    """TRL's CPOTrainer.cpo_loss reads five settings of its trainer and mean log-probs."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo = pytest.importorskip("trl.experimental.cpo")
    p, n, _ = draw(6)
    p, n = tensors(p), tensors(n)
    method = short_method("simpo")
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=method.beta,
        simpo_gamma=method.simpo_gamma,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(settings, *(p[role] / n[role] for role in ROLES[:2]))
    got = solopo_loss(p, n, None, method)
    assert_close(got.loss, losses, rtol=1e-12, atol=1e-12)
    assert_close(got.metrics["reward_chosen"], chosen, rtol=1e-12, atol=1e-12)
    assert_close(got.metrics["reward_rejected"], rejected, rtol=1e-12, atol=1e-12)


def test_orpo_odds_ratio_equals_trl(monkeypatch):
    """TRL's ORPOTrainer.odds_ratio_loss (float32) is the term that its trainer subtracts from the likelihood loss."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo")
    p, n, _ = draw(7)
    p, n = tensors(p), tensors(n)
    method = short_method("orpo")
    settings = SimpleNamespace(beta=method.orpo_lambda, accelerator=SimpleNamespace(device="cpu"))
    means = [p[role] / n[role] for role in ROLES[:2]]
    odds_term = orpo.ORPOTrainer.odds_ratio_loss(settings, *means)[0]
    assert_close(solopo_loss(p, n, None, method).loss.float(), -means[0].float() - odds_term, rtol=1e-5, atol=1e-6)


def test_dpo_equals_trl(tmp_path, monkeypatch):
    """TRL's DPOTrainer on two tiny models: the same token ids, the same loss on a batch of two pairs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny_models import write_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(write_model(tmp_path / str(seed), seed=seed), dtype=torch.float32).eval()
        for seed in (1, 2)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "1")
    rows = [("w1 w2 w3 w4", "w5 w6", "w7"), ("w8 w9", "w10", "w11 w12 w13")]

    def chat(role, text):
        return [{"role": role, "content": text}]

    dataset = Dataset.from_list(
        [
            {"prompt": chat("user", q), "chosen": chat("assistant", a), "rejected": chat("assistant", b)}
            for q, a, b in rows
        ]
    )
    plain = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    options = trl.DPOConfig(str(tmp_path / "trl"), beta=BETA["dpo"], per_device_train_batch_size=2, **plain)
    trainer = trl.DPOTrainer(policy, reference, options, train_dataset=dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model.eval(), batch)

    their_ids = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    our_ids, sums, lengths = set(), {}, {}
    for question, chosen, rejected in rows:
        (prompt,) = tokenize_group(
            PreferenceGroup("x", chat("user", question), None, chosen, rejected), tokenizer, ROLES[:2]
        ).prompts
        for continuation in prompt.continuations:
            ids = [*prompt.ids, *continuation.ids]
            our_ids.add(tuple(ids))
            for model in (policy, reference):
                with torch.no_grad():
                    picked = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
                sums.setdefault((model is policy, continuation.role), []).append(picked[len(prompt.ids) - 1 :].sum())
            lengths.setdefault(continuation.role, []).append(len(continuation.ids))
    assert our_ids == their_ids
    by_role = [{role: torch.stack(sums[of_policy, role]) for role in ROLES[:2]} for of_policy in (True, False)]
    ours = solopo_loss(
        by_role[0], {role: torch.tensor(v) for role, v in lengths.items()}, by_role[1], short_method("dpo")
    ).loss.mean()
    assert abs(float(ours) - math.log(2)) > 0.01  # the models differ, so the comparison says something
    assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
