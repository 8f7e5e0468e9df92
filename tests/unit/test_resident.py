"""The resident reference: weights exchanged in place and back bit for bit, and which segment is compared with which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_step import METHODS, draw, only, trained  # noqa: F401  (a fixture)

from megatron_solopo import config_load
from megatron_solopo.config import Config, MethodConfig, TrainingConfig
from megatron_solopo.losses.solopo import policy_scores, reference_context, reference_scores
from megatron_solopo.pack import Context


def weights(engine: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for model in engine.models for parameter in model.parameters()]


def change(engine: Any) -> None:
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("piece", [64, 2**26])
def test_weights_are_exchanged_in_place_and_back(trained: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Also twice, where the block raises an error, and with NaN in the policy."""
    from megatron_solopo.training import resident

    engine = trained[0]
    monkeypatch.setattr(resident, "PIECE", piece)
    start, places = weights(engine), [p.data_ptr() for p in engine.models[0].parameters()]
    reference = resident.ResidentReference(engine, draw(METHODS["solo"]))
    assert reference.host_bytes >= sum(weight.nbytes for weight in start)
    change(engine)
    policy = weights(engine)
    for _ in range(2):
        with reference.in_place():
            assert equal(weights(engine), start) and not engine.models[0].training
        assert equal(weights(engine), policy) and engine.models[0].training
    with pytest.raises(KeyError), reference.in_place():
        raise KeyError
    assert equal(weights(engine), policy)
    assert places == [p.data_ptr() for p in engine.models[0].parameters()]
    with torch.no_grad():
        for parameter, weight in zip(engine.models[0].parameters(), start, strict=True):
            parameter.copy_(weight)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_compares_with_the_table_of_the_reference(trained: Any, name: str, micro_batch_size: int) -> None:  # noqa: F811
    """Each segment with the log-prob that the complete table has for it, whichever responses the reference scores."""
    from megatron_solopo.training import resident
    from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
    from megatron_solopo.training.step import segment_table
    from megatron_solopo.training.step_work import make_packs

    engine, method = trained[0], METHODS[name]
    config = Config(method=method, training=TrainingConfig(micro_batch_size=micro_batch_size))
    everything = draw(method, most=3)
    policy, compared = only(everything, policy_scores(method)), only(everything, reference_scores(method))
    indices = [3, 0, 4, 1]
    start, places = weights(engine), SegmentPlaces.of_dataset(compared)
    table = segment_table(engine, places, make_packs(engine, compared, indices, config))
    reference = resident.ResidentReference(engine, compared)
    change(engine)
    work = resident.scored_work(reference, policy, indices, config)
    assert work.score is not None
    inputs = work.score()
    contexts = [reference_context(context, method) for context in Context]
    for pack, loss_inputs in zip(work.packs, inputs.packs, strict=True):
        expected = ReferenceLogProbs(places, table).of_pack(pack.pack, contexts)
        torch.testing.assert_close(loss_inputs.compared, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter, weight in zip(engine.models[0].parameters(), start, strict=True):
            parameter.copy_(weight)


@pytest.mark.parametrize(
    ("flags", "device", "layers", "factor"),
    [
        ((), "cpu", 28, 1),
        ((), "cuda", 28, 8),
        ((), "cuda", 3, 4),
        (("--pipeline-model-parallel-size", "4"), "cuda", 8, 3),
        (("--pipeline-model-parallel-size", "4", "--decoder-first-pipeline-num-layers", "1"), "cuda", 7, 2),
        (("--recompute-granularity", "full"), "cuda", 28, 2),
    ],
)
def test_packs_of_the_reference_hold_what_fits_without_gradients(
    flags: tuple[str, ...], device: str, layers: int, factor: int
) -> None:
    from megatron_solopo.training.reference import pack_factor

    needed = ["--hf-path", "m", "--train-data", "x", "--save", "y", "--train-iters", "1"]
    assert pack_factor(config_load.load([*needed, *flags])[0], layers, device) == factor


@pytest.mark.parametrize(
    ("limits", "packs"),
    [
        ({"micro_batch_size": 1}, [3, 2]),  # two batches of three examples
        ({"micro_batch_size": 2}, [5]),
        ({"micro_batch_size": 8, "max_tokens_per_rank": 30}, [2, 2, 1]),
    ],
)
def test_larger_packs_have_the_same_log_probs(
    trained: Any,  # noqa: F811
    limits: dict[str, int],
    packs: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three times as many examples and tokens in a pack, and batches of a pack of every rank."""
    from megatron_solopo.training import reference

    engine = trained[0]
    config = Config(method=MethodConfig(reference="resident"), training=TrainingConfig(global_batch_size=1, **limits))
    dataset, sizes = draw(METHODS["solo"], most=2), []
    compute = reference.local_segment_sums

    def noted(engine: Any, places: Any, packs: list) -> Any:
        sizes.extend(len(pack.groups) for pack in packs)
        return compute(engine, places, packs)

    monkeypatch.setattr(reference, "local_segment_sums", noted)
    small = reference.reference_log_probs(engine, dataset, config, "weights")
    assert sizes == [1] * 5
    sizes.clear()
    monkeypatch.setattr(reference, "pack_factor", lambda *arguments: 3)
    large = reference.reference_log_probs(engine, dataset, config, "weights")
    assert sorted(sizes, reverse=True) == packs
    assert small is not None and large is not None
    torch.testing.assert_close(large.values, small.values, rtol=1e-5, atol=1e-5)
