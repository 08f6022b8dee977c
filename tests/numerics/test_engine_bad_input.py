"""Whatever a datum carries, it succeeds or fails for its own request alone: tenants do not mix.

Bodies that admission refuses never get here (tests/wire); what is left is what only the numbers show.
Comparisons with a run alone are bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine_builders import VOCAB_SIZE, make_datum, make_state, quantum_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.domain.losses import LOSSES, resolve_loss
from treadle.domain.ops import AdamParams, Datum, LoraSpec
from treadle.engine.base_model import BaseModel
from treadle.engine.optim import adamw_step
from treadle.engine.passes import QuantumInput, QuantumResult, run_micro_batch
from treadle.engine.state import MAX_GRAD_NORM, commit_scratch
from treadle.errors import NonFiniteResult

POLICY_LOSSES = sorted(set(LOSSES) - {"cross_entropy"})


def run_alone(base: BaseModel, quantum: QuantumInput) -> tuple[QuantumResult, torch.Tensor]:
    """The quantum's result and gradient in a pass of its own."""
    alone = replace(quantum, scratch=quantum.state.new_scratch())
    (result,) = run_micro_batch(base, [alone])
    assert alone.scratch is not None
    return result, alone.scratch.flat


def assert_unharmed(base: BaseModel, quantum: QuantumInput, result: QuantumResult) -> None:
    """A good quantum has exactly what it would have had alone."""
    expected, gradient = run_alone(base, quantum)
    assert result.failure is None
    assert result.metrics == expected.metrics
    for ours, theirs in zip(result.logprobs, expected.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert quantum.scratch is not None
    assert torch.equal(quantum.scratch.flat, gradient)


Spoil = Callable[[Datum, int], None]


def _put(name: str, value: float) -> Spoil:
    def spoil(datum: Datum, position: int) -> None:
        datum.inputs[name][position] = value  # type: ignore[index]

    return spoil


def _nan_sampling_logprob(datum: Datum, position: int) -> None:
    name = "logprobs" if "logprobs" in datum.inputs else "sampling_logprobs"
    _put(name, np.nan)(datum, position)


def _overflow(datum: Datum, position: int) -> None:
    _put("advantages", -3e38)(datum, position)
    _put("logprobs", -80.0)(datum, position)


def _far_away(datum: Datum, position: int) -> None:
    """Within float32, but its square is not."""
    _put("logprobs", -1e30)(datum, position)


# What makes a datum fail, by loss. ppo and gspo bound the ratio only on one side of an advantage, hence its sign.
INTRUDERS: list[tuple[str, str, Spoil]] = [
    ("cross_entropy", "nan weight", _put("weights", np.nan)),
    ("cross_entropy", "infinite weight", _put("weights", np.inf)),
    *((loss, "nan advantage", _put("advantages", np.nan)) for loss in POLICY_LOSSES),
    *((loss, "infinite advantage", _put("advantages", -np.inf)) for loss in POLICY_LOSSES),
    *((loss, "nan sampling logprob", _nan_sampling_logprob) for loss in POLICY_LOSSES),
    *((loss, "overflowing product", _overflow) for loss in ("importance_sampling", "ppo")),
    ("dro", "logprob far away", _far_away),
    ("gspo", "overflowing mean", lambda datum, position: _put("logprobs", -3e38)(datum, position)),
]


@pytest.mark.parametrize(("loss", "what", "spoil"), INTRUDERS, ids=[f"{loss}: {what}" for loss, what, _ in INTRUDERS])
def test_a_datum_that_is_not_finite_is_named_and_fails_alone(
    base: BaseModel, loss: str, what: str, spoil: Spoil
) -> None:
    rng = np.random.default_rng(1)
    good, bad = make_datum(rng, 9, loss, idle=0.0), make_datum(rng, 21, loss, idle=0.0)
    if "advantages" in bad.inputs:
        # Negative, so that no clip hides what overflows.
        bad.inputs["advantages"][:] = -np.abs(bad.inputs["advantages"])  # type: ignore[index]
    spoil(bad, 13)
    neighbour = quantum_of(make_state(base, LoraSpec(rank=3, seed=1)), [make_datum(rng, 30)])
    intruder = replace(quantum_of(make_state(base, LoraSpec(rank=4, seed=2)), [good, bad], loss), first_datum_index=5)
    results = run_micro_batch(base, [neighbour, intruder])
    assert_unharmed(base, neighbour, results[0])
    assert results[1].failure is not None
    message = results[1].failure.message
    assert "datum 6: " in message
    assert f"loss_fn {loss}" in message
    # In a loss over whole sequences a bad logprob spoils the rows before it too.
    if loss != "gspo" and (loss, spoil) != ("stable_reinforce", _nan_sampling_logprob):
        field = {"cross_entropy": "weights"}.get(loss, "advantages")
        assert "at position 13 is not finite" in message
        assert f"{field}[13] = {bad.inputs[field][13].tolist()}" in message
    assert results[1].logprobs == ()
    assert results[1].metrics == {}


def test_the_same_tenants_next_request_works_and_has_no_trace_of_the_failed_one(base: BaseModel) -> None:
    rng = np.random.default_rng(2)
    good, bad = make_datum(rng, 12), make_datum(rng, 12)
    bad.inputs["weights"][3] = np.nan  # type: ignore[index]
    adam = AdamParams(learning_rate=1e-2)

    def train(requests: list[Datum]) -> torch.Tensor:
        state = make_state(base, LoraSpec(rank=4, seed=0))
        for datum in requests:
            quantum = quantum_of(state, [datum])
            (result,) = run_micro_batch(base, [quantum])
            if result.failure is None:
                assert quantum.scratch is not None
                commit_scratch(state, quantum.scratch)
        adamw_step(state, adam)
        return state.weights.flat

    assert torch.equal(train([bad, good, bad]), train([good]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_huge_finite_signals_succeed_alone_and_beside_others(base: BaseModel, loss: str, sign: float) -> None:
    rng = np.random.default_rng(3)
    huge = make_datum(rng, 17, loss)
    name = "weights" if loss == "cross_entropy" else "advantages"
    huge.inputs[name][::3] = sign * 1e30  # type: ignore[index]
    tenant = quantum_of(make_state(base, LoraSpec(rank=4, seed=3)), [huge], loss)
    neighbour = quantum_of(make_state(base, LoraSpec(rank=2, seed=4)), [make_datum(rng, 40, "ppo")], "ppo")
    results = run_micro_batch(base, [tenant, neighbour])
    for quantum, result in zip((tenant, neighbour), results, strict=True):
        assert_unharmed(base, quantum, result)
    assert abs(results[0].metrics["loss:sum"]) > 1e28
    assert tenant.scratch is not None
    # The pass is sound, but no step could take its gradient; clipped tokens have none.
    norm = float(torch.linalg.vector_norm(tenant.scratch.flat.double()))
    if norm > MAX_GRAD_NORM:
        with pytest.raises(NonFiniteResult, match=r"norm .* is not finite or over"):
            commit_scratch(tenant.state, tenant.scratch)
        assert tenant.state.grads is None
    else:
        commit_scratch(tenant.state, tenant.scratch)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"dro"}))
def test_a_request_without_any_signal_succeeds_with_a_zero_gradient(base: BaseModel, loss: str) -> None:
    datum = make_datum(np.random.default_rng(4), 25, loss, idle=1.0)
    quantum = quantum_of(make_state(base, LoraSpec(rank=4, seed=0)), [datum], loss)
    (result,) = run_micro_batch(base, [quantum])
    assert result.failure is None
    assert result.metrics["loss:sum"] == 0
    assert quantum.scratch is not None
    assert not quantum.scratch.flat.any()


def test_negative_and_fractional_weights_scale_the_gradient(base: BaseModel) -> None:
    datum = make_datum(np.random.default_rng(5), 30, idle=0.0)
    datum.inputs["weights"][:] = 1  # type: ignore[index]
    scaled = Datum(tokens=datum.tokens, inputs={**datum.inputs, "weights": datum.inputs["weights"] * np.float32(-0.25)})
    state = make_state(base, LoraSpec(rank=4, seed=0))
    one, other = quantum_of(state, [datum]), quantum_of(state, [scaled])
    run_micro_batch(base, [one, other])
    assert one.scratch is not None
    assert other.scratch is not None
    # A power of two, so nothing rounds differently.
    assert torch.equal(one.scratch.flat * -0.25, other.scratch.flat)


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_per_token_clips_equal_the_same_setting(base: BaseModel, loss: str) -> None:
    datum = make_datum(np.random.default_rng(6), 30, loss)
    bounds = {"clip_low_threshold": 0.25, "clip_high_threshold": 0.75}
    per_token = {name: np.full(30, value, dtype=np.float32) for name, value in bounds.items()}
    state = make_state(base, LoraSpec(rank=4, seed=0))
    by_setting = quantum_of(state, [datum], resolve_loss(loss, bounds))
    by_tensor = quantum_of(state, [Datum(datum.tokens, {**datum.inputs, **per_token})], loss)
    default = quantum_of(state, [datum], loss)
    results = run_micro_batch(base, [by_setting, by_tensor, default])
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics != results[2].metrics
    assert by_setting.scratch is not None
    assert by_tensor.scratch is not None
    assert torch.equal(by_setting.scratch.flat, by_tensor.scratch.flat)


def test_an_absent_sequence_mask_counts_the_tokens_with_an_advantage(base: BaseModel) -> None:
    rng = np.random.default_rng(7)
    masked, bare = make_datum(rng, 30, "gspo"), make_datum(rng, 22, "gspo")
    mask = (masked.inputs["advantages"] != 0).astype(np.float32)
    explicit = Datum(masked.tokens, {**masked.inputs, "sequence_ratio_mask": mask})
    everything = Datum(masked.tokens, {**masked.inputs, "sequence_ratio_mask": np.ones(30, dtype=np.float32)})
    state = make_state(base, LoraSpec(rank=4, seed=0))
    # One quantum may hold datums with and without a mask.
    results = run_micro_batch(base, [quantum_of(state, [d, bare], "gspo") for d in (masked, explicit, everything)])
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics["loss:sum"] != results[2].metrics["loss:sum"]


@dataclass(frozen=True)
class Tenant:
    """One run's request in a mixed pass; `spoiled` says whether it must fail."""

    quantum: QuantumInput
    spoiled: bool


@st.composite
def tenants(draw: st.DrawFn, base: BaseModel) -> list[Tenant]:
    made = []
    for index in range(draw(st.integers(1, 5))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        loss = draw(st.sampled_from(sorted(LOSSES)))
        lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
        columns = draw(st.sampled_from([None, None, 1, 3])) if LOSSES[loss].allows_target_columns else None
        idle = draw(st.sampled_from([0.0, 0.4, 1.0]))
        datums = [make_datum(rng, length, loss, columns=columns, idle=idle) for length in lengths]
        spoiled = draw(st.booleans())
        if spoiled:
            datum = datums[draw(st.integers(0, len(datums) - 1))]
            name = draw(st.sampled_from(sorted(set(datum.inputs) - {"target_tokens"})))
            position = draw(st.integers(0, datum.num_tokens - 1))
            datum.inputs[name][position] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))  # type: ignore[index]
            # A sampling logprob counts only where there is an advantage; infinite ones may be clipped away.
            if name == "logprobs":
                datum.inputs[name][position] = np.nan  # type: ignore[index]
                datum.inputs["advantages"][position] = 1.0  # type: ignore[index]
            elif loss == "stable_reinforce":
                datum.inputs["sampling_logprobs"][position] = np.nan  # type: ignore[index]
                datum.inputs["sampled_runs"][position] = 1.0  # type: ignore[index]
        spec = LoraSpec(
            rank=draw(st.integers(1, 9)), seed=index, train_mlp=draw(st.booleans()), train_unembed=draw(st.booleans())
        )
        state = make_state(base, spec)
        if draw(st.integers(0, 9)) == 0:
            # A run whose own weights are gone.
            state.weights.flat.fill_(np.nan)
            spoiled = True
        made.append(Tenant(quantum_of(state, datums, loss), spoiled))
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_tenants_do_not_mix(base: BaseModel, data: st.DataObject) -> None:
    pack = data.draw(tenants(base))
    weights_before = [tenant.quantum.state.weights.flat.clone() for tenant in pack]
    results = run_micro_batch(base, [tenant.quantum for tenant in pack])
    for tenant, result, before in zip(pack, results, weights_before, strict=True):
        state = tenant.quantum.state
        torch.testing.assert_close(state.weights.flat, before, rtol=0, atol=0, equal_nan=True)
        assert state.grads is None
        assert (result.failure is not None) == tenant.spoiled
        if not tenant.spoiled:
            assert_unharmed(base, tenant.quantum, result)


@pytest.mark.parametrize("name", ["tokens", "target_tokens"])
@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_an_id_outside_the_vocabulary_never_reaches_the_device(base: BaseModel, name: str, token: int) -> None:
    # Admission refuses it (tests/wire); should it come all the same, the pass breaks before anything ran, and the
    # worker retries the others without it (tests/worker).
    datum = make_datum(np.random.default_rng(8), 6)
    if name == "tokens":
        datum.tokens[2] = token
    else:
        datum.inputs["target_tokens"][2] = token  # type: ignore[index]
    state = make_state(base, LoraSpec(rank=1, seed=0))
    with pytest.raises(AssertionError, match="checked at admission"):
        run_micro_batch(base, [quantum_of(state, [datum])])
    assert state.grads is None
