"""adamw_step against torch.optim.AdamW, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_builders import make_datums, make_state, quantum_of

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine.adapter import AdapterArena, TrainingState
from treadle.engine.base_model import BaseModel
from treadle.engine.optim import adamw_step
from treadle.engine.passes import commit_scratch, run_micro_batch
from treadle.errors import NoGradient, NonFiniteResult

NUM_STEPS = 25


def with_gradient(state: TrainingState, values: torch.Tensor) -> None:
    commit_scratch(state, AdapterArena(state.layout, values))


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(learning_rate=1e-2),
        AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.5),
        AdamParams(learning_rate=0.0, weight_decay=0.1),
    ],
    ids=["defaults", "all six", "no learning rate"],
)
@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_torch(base: BaseModel, adam: AdamParams, fused: bool) -> None:
    state = make_state(base, LoraSpec(rank=4, seed=0))
    reference = torch.nn.Parameter(state.weights.flat.clone())
    optimizer = torch.optim.AdamW(
        [reference],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        fused=fused,
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(NUM_STEPS):
        gradient = torch.randn(reference.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        with_gradient(state, gradient.clone())
        reference.grad = gradient
        norm = float(gradient.norm())
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([reference], adam.grad_clip_norm)
        before = reference.detach().clone()
        optimizer.step()
        metrics = adamw_step(state, adam)
        # Unfused torch orders the same arithmetic differently.
        torch.testing.assert_close(state.weights.flat, reference.detach(), rtol=0 if fused else 1e-5, atol=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["update_norm"] == pytest.approx((reference.detach() - before).norm().item(), rel=1e-3, abs=1e-12)
        assert metrics["step"] == step + 1
        assert metrics["learning_rate"] == adam.learning_rate
    if fused and not adam.grad_clip_norm:
        assert torch.equal(state.weights.flat, reference.detach())


def test_clipping_is_off_at_zero_and_idle_below_the_limit(base: BaseModel) -> None:
    gradient = torch.full((make_state(base, LoraSpec(rank=1, seed=0)).layout.num_elements,), 1e-3)
    after = []
    for clip in (0.0, 1e6):
        state = make_state(base, LoraSpec(rank=1, seed=0))
        with_gradient(state, gradient.clone())
        adamw_step(state, AdamParams(learning_rate=1e-2, grad_clip_norm=clip))
        after.append(state.weights.flat)
    assert torch.equal(*after)


def test_step_consumes_the_gradient(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    quantum = quantum_of(state, make_datums(np.random.default_rng(0), [12]))
    run_micro_batch(base, [quantum])
    assert quantum.scratch is not None
    commit_scratch(state, quantum.scratch)
    assert (state.num_open_passes, state.step) == (1, 0)
    metrics = adamw_step(state, AdamParams())
    assert (state.num_open_passes, state.step) == (0, 1)
    assert state.grads is None
    assert all(math.isfinite(value) for value in metrics.values())
    with pytest.raises(NoGradient):
        adamw_step(state, AdamParams())


def test_alignment_gaps_of_the_arena_stay_zero(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=3, seed=0))
    used = torch.zeros(state.layout.num_elements, dtype=torch.bool)
    for place in state.layout.places:
        used[place.offset : place.offset + place.shape[0] * place.shape[1]] = True
    quantum = quantum_of(state, make_datums(np.random.default_rng(0), [40]))
    run_micro_batch(base, [quantum])
    assert quantum.scratch is not None
    assert not quantum.scratch.flat[~used].any()
    commit_scratch(state, quantum.scratch)
    adamw_step(state, AdamParams(weight_decay=0.1))
    assert not state.weights.flat[~used].any()
    assert int(used.sum()) == state.layout.num_parameters


@pytest.mark.parametrize(
    ("adam", "gradient", "message"),
    [
        (AdamParams(learning_rate=3e38), 1.0, "learning_rate"),
        (AdamParams(eps=0.0), 0.0, "eps"),
        (AdamParams(), 1e19, "gradient norm"),
    ],
)
def test_step_that_would_not_be_finite_changes_nothing(
    base: BaseModel, adam: AdamParams, gradient: float, message: str
) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    with_gradient(state, torch.full_like(state.weights.flat, 0.5))
    adamw_step(state, AdamParams())
    with_gradient(state, torch.full_like(state.weights.flat, gradient))
    if gradient == 0.0:
        state.exp_avg_sq.zero_()
        state.exp_avg.zero_()
    kept = [tensor.clone() for tensor in (state.weights.flat, state.exp_avg, state.exp_avg_sq)]
    with pytest.raises(NonFiniteResult, match=message):
        adamw_step(state, adam)
    for tensor, before in zip((state.weights.flat, state.exp_avg, state.exp_avg_sq), kept, strict=True):
        assert torch.equal(tensor, before)
    assert (state.step, state.num_open_passes) == (1, 1)


def test_gradient_that_is_not_finite_is_refused_at_commit(base: BaseModel) -> None:
    state = make_state(base, LoraSpec(rank=2, seed=0))
    with_gradient(state, torch.full_like(state.weights.flat, 3e38))
    for poison in (torch.nan, torch.inf, 3e38):
        with pytest.raises(NonFiniteResult, match="gradient"):
            with_gradient(state, torch.full_like(state.weights.flat, poison))
    assert state.num_open_passes == 1
    assert state.grads is not None
    assert bool((state.grads.flat == 3e38).all())
