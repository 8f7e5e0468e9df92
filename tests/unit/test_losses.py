"""Every loss by value against plain Python, by float64 gradient checks, against TRL, and by its laws."""

import math
import random
from itertools import product

import pytest
import torch
from segment_names import loss_by_name, names_of, scored
from torch.testing import assert_close

from megatron_solopo.config import MethodConfig
from megatron_solopo.losses import (
    alignment_distance,
    dpo_reward,
    logistic_loss,
    orpo_log_odds,
    sft_loss,
    simpo_reward,
)
from megatron_solopo.losses.solopo import (
    all_scores,
    needs_reference,
    pair_accuracy,
    pair_context,
    policy_scores,
    reference_scores,
)
from megatron_solopo.metrics import declared
from megatron_solopo.pack import Context, Segments, Side, segment_name

ROLES = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")
LOSS_OPTIONS = {
    **{"simpo": {"simpo_gamma": 0.7}, "orpo": {"orpo_lambda": 0.4}, "longpo": {"longpo_lambda": 0.6}},
    "ld_dpo": {"ld_alpha": 0.3},
}
CONSTANTS = dict(alignment_huber_delta=1.2)
BETA = {"dpo": 0.3, "ipo": 0.4, "simpo": 2.1, "orpo": None, "longpo": 0.2, "dpo_norm": 2.5, "ld_dpo": 0.2, "wpo": 0.3}
WITH_REFERENCE = ("dpo", "ipo", "dpo_norm", "ld_dpo", "wpo")
LOSSES = (*WITH_REFERENCE, "simpo", "orpo")
"""Those with an alignment."""
SMOOTHED, LIKELY = ("dpo", "simpo", "dpo_norm", "ld_dpo", "wpo"), ("dpo", "ipo", "simpo", "dpo_norm", "wpo")
"""Those that read --label-smoothing, and --sft-weight."""
ALPHA = 1.7
GROUPS = 5


def make(loss, mode, **options):
    alpha = {"alignment_weight": ALPHA} if mode == "solo" else {}
    of_loss = {"loss_options": LOSS_OPTIONS.get(loss, {})}
    return MethodConfig(
        preference_loss=loss, context_mode=mode, beta=BETA[loss], **of_loss, **CONSTANTS, **alpha, **options
    )


def variants():
    """Every loss x context mode x alignment option that has an effect, then each further option on top."""
    for loss in LOSSES:
        yield from (make(loss, mode) for mode in ("short", "long"))
        references = ("per_context", "short") if loss in WITH_REFERENCE else ("per_context",)
        for target, stop, reference in product(("chosen", "both"), (False, True), references):
            alignment = dict(alignment_target=target, alignment_stop_short_gradient=stop, alignment_reference=reference)
            yield make(loss, "solo", **alignment)
            if (target == "both") != stop:
                yield from (make(loss, "solo", **alignment, alignment_distance=name) for name in ("l2", "huber"))
    for loss, mode, form in product(SMOOTHED, ("solo", "long"), ("conservative", "robust")):
        yield make(loss, mode, label_smoothing=0.15, label_smoothing_form=form)
    for loss, mode, how in product(LIKELY, ("solo", "short", "long"), ("sequence", "token")):
        yield make(loss, mode, sft_weight=0.8, sft_normalization=how)
    yield from (make("longpo", "long", sft_normalization=how) for how in ("sequence", "token"))


def name_of(method):
    plain = make(method.preference_loss, method.context_mode)
    changed = [str(v) for name, v in vars(method).items() if v != getattr(plain, name)]
    return "-".join([method.preference_loss, method.context_mode, *changed])


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


def squares_of(p, n):
    """Summed log of the summed squared probabilities, which no log-prob determines."""
    return {role: [0.4 * a - 0.1 * b for a, b in zip(p[role], n[role], strict=True)] for role in ROLES}


def closed_form(m, p, n, ref, squares, mean_length, still=None, weighed=None):
    """One group's (preference loss, chosen likelihood, alignment) from floats.

    ``weighed``: the log-probs that WPO's weights see.
    ``still``: the short log-probs that the alignment sees; ``mean_length``: of the chosen answers of all groups.
    """
    still = still or p
    loss = m.preference_loss

    def softplus(x):  # -log sigmoid(-x)
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def ratio(role, values):
        base = role
        if loss == "longpo" or (m.context_mode == "solo" and m.alignment_reference == "short"):
            base = "short_" + role.split("_")[1]
        return values[role] - ref[base]

    def reward(role, values):
        if loss in ("dpo", "ipo", "longpo", "ld_dpo", "wpo"):  # LD-DPO's weights are in the sums
            return m.beta * ratio(role, values)
        if loss == "dpo_norm":
            return m.beta / n[role] * ratio(role, values)
        if loss == "simpo":
            return m.beta / n[role] * values[role]
        probability = math.exp(values[role] / n[role])
        return math.log(probability / (1 - probability))

    def distance(d):
        if m.alignment_distance == "l2":
            return d * d
        if m.alignment_distance == "huber":
            delta = m.alignment_huber_delta
            return d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)
        return abs(d)

    side = "long" if m.context_mode == "long" else "short"
    chosen, rejected = side + "_chosen", side + "_rejected"
    margin = reward(chosen, p) - reward(rejected, p)
    likelihood = -p[chosen] / (mean_length if m.sft_normalization == "token" else n[chosen])
    if loss == "simpo":
        margin -= m.loss_options["simpo_gamma"]
    e = m.label_smoothing
    if loss == "ipo":
        preference = (ratio(chosen, p) / n[chosen] - ratio(rejected, p) / n[rejected] - 1 / (2 * m.beta)) ** 2
    elif loss == "orpo":
        preference = likelihood + m.loss_options["orpo_lambda"] * softplus(-margin)
    elif m.label_smoothing_form == "robust":
        preference = ((1 - e) * softplus(-margin) - e * softplus(margin)) / (1 - 2 * e)
    else:
        preference = (1 - e) * softplus(-margin) + e * softplus(margin)
    if loss == "wpo":
        preference *= math.prod(math.exp(((weighed or p)[r] - squares[r]) / n[r]) for r in (chosen, rejected))
    if m.context_mode != "solo":
        return preference, likelihood, 0.0
    aligned = ("chosen", "rejected") if m.alignment_target == "both" else ("chosen",)
    return preference, likelihood, sum(distance(reward(f"short_{y}", still) - reward(f"long_{y}", p)) for y in aligned)


def total(m, *arguments):
    preference, likelihood, alignment = closed_form(m, *arguments)
    if m.preference_loss == "longpo":
        return m.loss_options["longpo_lambda"] * preference + likelihood
    return preference + m.sft_weight * likelihood + (m.alignment_weight or 0) * alignment


def mean_chosen_length(n):
    return sum(n["short_chosen"]) / GROUPS


def loss_of(p, n, ref, method, squares=None):
    return loss_by_name(p, n, ref, method, n[segment_name(pair_context(method), Side.CHOSEN)].mean(), squares)


def tensors(values, **options):
    return {role: torch.tensor(value, dtype=torch.float64, **options) for role, value in values.items()}


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def group(values, i):
    return {role: value[i] for role, value in values.items()}


@every_variant
def test_value_equals_the_closed_form(method):
    p, n, ref = draw()
    squares = squares_of(p, n)
    got = loss_of(tensors(p), tensors(n), tensors(ref), method, tensors(squares))
    each = [[group(values, i) for values in (p, n, ref, squares)] for i in range(GROUPS)]
    arguments = [(*one, mean_chosen_length(n)) for one in each]
    parts = {"po_loss": 0, "sft_loss": 1, "alignment_loss": 2}
    wanted = {name: [closed_form(method, *one)[place] for one in arguments] for name, place in parts.items()}
    for name in ("sft_loss",) * (not method.sft_weight and method.preference_loss != "longpo") + ("alignment_loss",) * (
        method.context_mode != "solo"
    ):
        del wanted[name]
        assert name not in got.metrics
    assert_close(got.loss, doubles([total(method, *one) for one in arguments]), rtol=1e-12, atol=1e-12)
    assert_close({name: got.metrics[name] for name in wanted}, {k: doubles(v) for k, v in wanted.items()})
    assert got.metrics.keys() <= {metric.name for metric in declared()}  # each has a label and a unit
    assert not any(value.requires_grad or value.shape != (GROUPS,) for value in got.metrics.values())


@every_variant
def test_gradient_equals_differences_of_the_closed_form(method):
    """Central differences of the plain-Python loss; a stopped short side is constant in the alignment."""
    p, n, ref = draw(1)
    inputs = tensors(p, requires_grad=True)
    squares = squares_of(p, n)
    loss_of(inputs, tensors(n), tensors(ref), method, tensors(squares)).loss.sum().backward()
    step = 1e-5
    for i, role in product(range(GROUPS), ROLES):
        here = group(p, i)
        still = here if method.alignment_stop_short_gradient else None
        fixed = [group(values, i) for values in (n, ref, squares)]
        up, down = (
            total(method, {**here, role: here[role] + h}, *fixed, mean_chosen_length(n), still, here)
            for h in (step, -step)
        )
        gradient = 0.0 if inputs[role].grad is None else float(inputs[role].grad[i])
        assert gradient == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-8), role
        assert (inputs[role].grad is not None) == (role in names_of(policy_scores(method))), role


DIFFERENTIABLE = [m for m in VARIANTS if not m.alignment_stop_short_gradient and m.preference_loss != "wpo"]
"""Those whose gradient is that of their value: WPO's weights have none."""


@pytest.mark.parametrize("method", DIFFERENTIABLE, ids=map(name_of, DIFFERENTIABLE))
def test_gradcheck(method):
    p, n, ref = draw(2)
    wanted = names_of(policy_scores(method))
    lengths, reference = tensors(n), tensors(ref)

    def loss(*values):
        return loss_of(dict(zip(wanted, values, strict=True)), lengths, reference, method).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors(p, requires_grad=True)[role] for role in wanted))


def test_sft_is_the_mean_negative_log_likelihood():
    log_prob = torch.tensor([-6.0, -1.0], dtype=torch.float64, requires_grad=True)
    segments = Segments.of([(i, Context.SHORT, Side.PLAIN, 0, length) for i, length in enumerate((3, 4))], 2)
    assert sft_loss(log_prob, segments).loss.tolist() == [2.0, 0.25]
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, segments).loss, (log_prob,))


def test_what_the_policy_scores():
    def method(**options):
        return MethodConfig(alignment_weight=1.0, beta=0.1, **options)

    assert policy_scores(method(objective="sft")) == scored("response")
    assert policy_scores(method(context_mode="short")) == scored(*ROLES[:2])
    assert policy_scores(method(context_mode="long")) == scored(*ROLES[2:])
    assert policy_scores(method()) == scored(*ROLES[:3])
    assert policy_scores(method(alignment_target="both")) == scored(*ROLES)
    assert policy_scores(method(preference_loss="longpo", context_mode="long")) == scored(*ROLES[2:])


def test_the_reference_scores_what_the_loss_reads():
    def read_of(**options):
        """Which reference log-probs move the loss."""
        p, n, ref = draw()
        method = MethodConfig(beta=0.1, **{"alignment_weight": 1.0} | options)
        ref = tensors(ref, requires_grad=True)
        loss_of(tensors(p), tensors(n), ref, method).loss.sum().backward()
        read = tuple(role for role in ROLES if ref[role].grad is not None)
        assert scored(*read) == reference_scores(method)
        assert needs_reference(method) and all_scores(method) == scored(*read) | policy_scores(method)
        return read

    for loss in ("dpo", "ipo"):
        assert read_of(preference_loss=loss) == ROLES[:3]
        assert read_of(preference_loss=loss, alignment_target="both") == ROLES
        assert read_of(preference_loss=loss, alignment_reference="short", alignment_target="both") == ROLES[:2]
        assert read_of(preference_loss=loss, context_mode="short") == ROLES[:2]
        assert read_of(preference_loss=loss, context_mode="long") == ROLES[2:]
    assert read_of(preference_loss="longpo", context_mode="long") == ROLES[:2]
    for without in (dict(preference_loss="simpo"), dict(preference_loss="orpo"), dict(objective="sft")):
        assert not reference_scores(MethodConfig(**without)) and not needs_reference(MethodConfig(**without))


def test_a_group_without_a_pair_or_with_one_context_is_an_error():
    both = [(Context.SHORT, Side.CHOSEN), (Context.SHORT, Side.REJECTED), (Context.LONG, Side.CHOSEN)]
    for missing, match in ((0, "no pair"), (1, "no pair"), (2, "not scored on both contexts")):
        rows = [(group, *one, 0, 3) for group in (0, 1) for k, one in enumerate(both) if (group, k) != (1, missing)]
        with pytest.raises(ValueError, match=match):
            Segments.of(rows, 2).pairs(Context.SHORT)
            Segments.of(rows, 2).alignments([Side.CHOSEN])


def test_dpo_without_reference_is_an_error():
    p, n, _ = draw()
    with pytest.raises(ValueError, match="reference"):
        loss_by_name(tensors(p), tensors(n), None, make("dpo", "solo"))


@pytest.mark.parametrize("mode", ["solo", "short", "long"])
def test_dpo_starts_at_ln_2(mode):
    p, n, _ = draw(3)
    method = MethodConfig(context_mode=mode, beta=0.1, alignment_weight=3.0)
    got = loss_by_name(tensors(p), tensors(n), tensors(p), method)
    assert_close(got.metrics["po_loss"], torch.full((GROUPS,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-15)
    assert got.metrics["accuracy"].tolist() == [0.5] * GROUPS and got.metrics["margin"].abs().max() == 0
    if mode == "solo":
        assert got.metrics["alignment_loss"].abs().max() == 0
        assert_close(got.loss, got.metrics["po_loss"], rtol=0, atol=0)


def test_a_tie_counts_half_in_the_accuracy():
    margin = torch.tensor([1e-30, -1e-30, 0.0, -0.0, 5.0, -5.0, math.inf], dtype=torch.float64)
    assert pair_accuracy(margin).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 1.0]
    assert pair_accuracy(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_aligned_responses_are_logged_at_length(loss):
    """Both of them with alignment target both; the alignment is the distance of what is logged."""
    p, n, ref = draw(6)
    for target in ("chosen", "both"):
        method = make(loss, "solo", alignment_target=target)
        got = loss_by_name(tensors(p), tensors(n), tensors(ref), method).metrics
        aligned = ("chosen", "rejected") if target == "both" else ("chosen",)
        long = {f"{kind}_long_{answer}" for kind in ("reward", "logp") for answer in aligned}
        assert {name for name in got if "_long_" in name} == long | {"short_long_gap_nats_per_token"}
        distance = sum((got[f"reward_{answer}"] - got[f"reward_long_{answer}"]).abs() for answer in aligned)
        assert_close(got["alignment_loss"], distance, rtol=0, atol=1e-12)
        for answer in aligned:
            assert_close(got[f"logp_long_{answer}"], tensors(p)[f"long_{answer}"], rtol=0, atol=0)


@pytest.mark.parametrize("loss,target", list(product(LOSSES, ("chosen", "both"))))
def test_equal_short_and_long_log_probs_leave_plain_preference_optimization(loss, target):
    p, n, ref = draw(4)
    p, ref = ({role: values["short_" + role.split("_")[1]] for role in ROLES} for values in (p, ref))
    solo, short = make(loss, "solo", alignment_target=target), make(loss, "short")
    inputs = tensors(p, requires_grad=True)
    got = loss_by_name(inputs, tensors(n), tensors(ref), solo)
    assert got.metrics["alignment_loss"].tolist() == [0.0] * GROUPS
    assert got.metrics["short_long_gap_nats_per_token"].tolist() == [0.0] * GROUPS
    assert torch.equal(got.loss, loss_by_name(tensors(p), tensors(n), tensors(ref), short).loss)
    got.loss.sum().backward()
    assert inputs["long_chosen"].grad.abs().max() == 0  # the subgradient of |x| at 0


@pytest.mark.parametrize("loss", LOSSES)
def test_stopped_short_side_gets_no_gradient_from_the_alignment(loss):
    """The gradient on short log-probs is that of the short loss alone; the long side still moves."""
    p, n, ref = draw(5)
    gradients = {}
    for mode, stop in (("short", False), ("solo", True), ("solo", False)):
        method = make(loss, mode, alignment_target="both", alignment_stop_short_gradient=stop)
        inputs = tensors(p, requires_grad=True)
        loss_by_name(inputs, tensors(n), tensors(ref), method).loss.sum().backward()
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
    method = make("orpo", "solo")
    got = loss_by_name(inputs, lengths, None, method)
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


def test_further_laws_at_step_zero():
    """Policy = reference: IPO starts at (1 / (2 beta))^2, smoothed DPO at ln 2, LongPO at ln 2 where contexts agree."""
    p, n, _ = draw(3)
    for mode in ("solo", "short", "long"):
        got = loss_of(tensors(p), tensors(n), tensors(p), make("ipo", mode))
        assert_close(got.loss, torch.full((GROUPS,), (1 / 0.8) ** 2, dtype=torch.float64), rtol=1e-12, atol=0)
        assert got.metrics["ipo_margin"].abs().max() == 0
    for form in ("conservative", "robust"):
        smooth = make("dpo", "short", label_smoothing=0.2, label_smoothing_form=form)
        got = loss_of(tensors(p), tensors(n), tensors(p), smooth)
        assert_close(got.loss, torch.full((GROUPS,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0)
    same = {role: p["short_" + role.split("_")[1]] for role in ROLES}
    for values, is_same in ((same, True), (p, False)):
        got = loss_of(tensors(values), tensors(n), tensors(values), make("longpo", "long"))
        at_ln_2 = (got.metrics["po_loss"] - math.log(2)).abs() < 1e-12
        assert at_ln_2.all() if is_same else not at_ln_2.any()


def test_token_normalization_weighs_every_chosen_token_equally():
    """The mean over groups is the mean over tokens, and packs of a batch agree on it."""
    p, n, ref = draw(8)
    method = make("dpo", "short", sft_weight=1.0, sft_normalization="token")
    inputs = tensors(p, requires_grad=True)
    likelihood = loss_of(inputs, tensors(n), tensors(ref), method).metrics["sft_loss"].mean()
    assert float(likelihood) == pytest.approx(-sum(p["short_chosen"]) / sum(n["short_chosen"]))
    with pytest.raises(ValueError, match="mean chosen length"):
        loss_by_name(tensors(p), tensors(n), tensors(ref), method)


def test_robust_smoothing_is_unbiased():
    """Over labels that are swapped with probability e, the mean robust loss is the plain loss of true labels."""
    margin = torch.linspace(-3, 3, 13, dtype=torch.float64)
    e = 0.3
    robust, swapped = logistic_loss(margin, e, "robust"), logistic_loss(-margin, e, "robust")
    assert_close((1 - e) * robust + e * swapped, logistic_loss(margin), rtol=1e-12, atol=1e-12)
    # The conservative loss has its minimum where the model believes a pair as much as the labels deserve.
    margin = torch.tensor(math.log((1 - e) / e), dtype=torch.float64, requires_grad=True)
    logistic_loss(margin, e, "conservative").backward()
    assert abs(float(margin.grad)) < 1e-15


def test_distances_of_known_differences():
    d = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    wanted = {
        "l1": ([3.0, 0.5, 0.0, 0.5, 3.0], [-1.0, -1.0, 0.0, 1.0, 1.0]),
        "l2": ([9.0, 0.25, 0.0, 0.25, 9.0], [-6.0, -1.0, 0.0, 1.0, 6.0]),
        "huber": ([4.0, 0.125, 0.0, 0.125, 4.0], [-2.0, -0.5, 0.0, 0.5, 2.0]),
    }
    for name, (values, slopes) in wanted.items():
        got = alignment_distance(d, name, huber_delta=2.0)
        assert got.tolist() == values, name
        (gradient,) = torch.autograd.grad(got.sum(), d)
        assert gradient.tolist() == slopes, name
