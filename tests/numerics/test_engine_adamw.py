"""adamw_steps against torch.optim.AdamW, alone and in company, and what it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from arena_builders import ShapesOnly, add_gradient, assert_same, make_run, numbers, random_gradient
from engine_builders import make_datums, make_state, quantum_of

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine import optim
from treadle.engine.adapter import AdapterArena
from treadle.engine.base_model import BaseModel
from treadle.engine.optim import adamw_step, adamw_steps
from treadle.engine.passes import run_micro_batch
from treadle.engine.state import MAX_GRAD_NORM, Magnitudes, TrainingState, commit_scratch
from treadle.errors import NoGradient, NonFiniteResult

NUM_STEPS = 50
# Every branch of a step: plain, all settings, no learning rate, clipping alone, unproven (copies), huge.
SETTINGS = {
    "defaults": AdamParams(learning_rate=1e-2),
    "all six": AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.5),
    "no learning rate": AdamParams(learning_rate=0.0, weight_decay=0.1),
    "clipped": AdamParams(learning_rate=1e-2, grad_clip_norm=1e-3),
    "no momentum": AdamParams(learning_rate=1e-2, beta1=0.0, beta2=0.0),
    "no eps": AdamParams(learning_rate=1e-2, eps=0.0),
    "huge learning rate": AdamParams(learning_rate=1e12),
}


def torch_adamw(parameter: torch.nn.Parameter, adam: AdamParams, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        fused=fused,
    )


@pytest.mark.parametrize("adam", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_torch(adam: AdamParams, fused: bool) -> None:
    state = make_run(ShapesOnly(), 4, seed=0)
    reference = torch.nn.Parameter(state.weights.flat.clone())
    optimizer = torch_adamw(reference, adam, fused=fused)
    for step in range(NUM_STEPS):
        gradient = random_gradient(state, step, size=10.0 ** (step % 5 - 3))
        add_gradient(state, gradient)
        reference.grad = gradient
        norm = float(gradient.norm())
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([reference], adam.grad_clip_norm)
        before = reference.detach().clone()
        optimizer.step()
        metrics = adamw_step(state, adam)
        # Unfused torch orders the same arithmetic differently; atol is relative to the size of an update.
        torch.testing.assert_close(state.weights.flat, reference.detach(), rtol=1e-5, atol=1e-5 * adam.learning_rate)
        if fused and not adam.grad_clip_norm:
            assert torch.equal(state.weights.flat, reference.detach())
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        # The reference's change is rounded into weights of size 1, or of the learning rate.
        change = (reference.detach() - before).norm().item()
        assert metrics["update_norm"] == pytest.approx(change, rel=1e-3, abs=1e-12)
        assert metrics["num_steps"] == step + 1
        assert metrics["learning_rate"] == adam.learning_rate


def test_clipping_is_off_at_zero_and_idle_below_the_limit() -> None:
    after = []
    for clip in (0.0, 1e6):
        state = make_run(ShapesOnly(), 1, seed=0)
        add_gradient(state, random_gradient(state, 0))
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
        used[place.offset : place.offset + place.num_elements] = True
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
        (AdamParams(learning_rate=1e30), 1.0, "learning_rate"),
        (AdamParams(learning_rate=math.inf), 1.0, "learning_rate"),
        (AdamParams(learning_rate=1e30, weight_decay=1e30), 1.0, "learning_rate"),
        (AdamParams(eps=0.0), 0.0, "eps"),
        # Not zero, but zero in float32.
        (AdamParams(eps=1e-60), 0.0, "eps"),
    ],
)
def test_step_that_would_not_be_finite_changes_nothing(adam: AdamParams, gradient: float, message: str) -> None:
    state, neighbour, alone = (make_run(ShapesOnly(), 2, seed=0) for _ in range(3))
    for run in (state, neighbour, alone):
        add_gradient(run, torch.full_like(run.weights.flat, 0.5))
        adamw_step(run, AdamParams())
    add_gradient(state, torch.full_like(state.weights.flat, gradient))
    for run in (neighbour, alone):
        add_gradient(run, torch.full_like(run.weights.flat, 0.25))
    if gradient == 0.0:
        state.exp_avg_sq.zero_()
        state.exp_avg.zero_()
    kept = numbers(state)
    refusal, metrics = adamw_steps([(state, adam), (neighbour, AdamParams())])
    assert isinstance(refusal, NonFiniteResult)
    assert message in refusal.message
    assert_same(numbers(state), kept)
    assert (state.step, state.num_open_passes) == (1, 1)
    assert metrics == adamw_step(alone, AdamParams())
    assert_same(numbers(neighbour), numbers(alone))
    with pytest.raises(NonFiniteResult, match=message):
        adamw_step(state, adam)
    assert_same(numbers(state), kept)


def test_run_goes_on_after_a_refused_step() -> None:
    state, alone = (make_run(ShapesOnly(), 2, seed=0) for _ in range(2))
    for run in (state, alone):
        add_gradient(run, random_gradient(run, 0))
    with pytest.raises(NonFiniteResult):
        adamw_step(state, AdamParams(learning_rate=1e38))
    for run in (state, alone):
        for step in range(3):
            adamw_step(run, AdamParams(learning_rate=1e-2))
            add_gradient(run, random_gradient(run, step))
    assert_same(numbers(state), numbers(alone))


def test_runs_without_a_gradient_are_refused_alone() -> None:
    base = ShapesOnly()
    states = [make_run(base, rank, seed=0) for rank in (1, 2, 3)]
    add_gradient(states[1], random_gradient(states[1], 0))
    results = adamw_steps([(state, AdamParams()) for state in states])
    assert [type(result) for result in results] == [NoGradient, dict, NoGradient]
    assert [state.step for state in states] == [0, 1, 0]
    assert adamw_steps([]) == []


def test_run_steps_once_per_call() -> None:
    state = make_run(ShapesOnly(), 1, seed=0)
    with pytest.raises(AssertionError, match="one step per call"):
        adamw_steps([(state, AdamParams()), (state, AdamParams())])


@pytest.mark.parametrize("together", [False, True], ids=["in pieces", "together"])
def test_company_order_and_slot_change_no_bit(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    # The way of other devices, on a CPU: it must give the same bits as the pieces.
    if together:
        monkeypatch.setattr(optim, "_update", lambda steps: optim._update_together(steps, max_bytes=4_000))
    else:
        monkeypatch.setattr(optim, "_PIECE", 48)
    shared = ShapesOnly()
    make_run(shared, 3, seed=99)
    cases = [(rank, adam) for rank in (1, 3, 8) for adam in SETTINGS.values()]
    runs = [make_run(shared, rank, seed=index) for index, (rank, _) in enumerate(cases)]
    due = [(run, adam) for run, (_, adam) in zip(runs, cases, strict=True)]
    order = list(range(len(cases)))
    for step in range(4):
        for index, (run, _) in enumerate(due):
            add_gradient(run, random_gradient(run, 1_000 * step + index))
        order = order[5:] + order[:5]
        results = adamw_steps([due[index] for index in order])
        assert all(isinstance(result, dict) for result in results)
    monkeypatch.undo()
    for index, (run, adam) in enumerate(due):
        alone = make_run(ShapesOnly(), run.spec.rank, seed=index)
        for step in range(4):
            add_gradient(alone, random_gradient(alone, 1_000 * step + index))
            adamw_step(alone, adam)
        assert_same(numbers(run), numbers(alone))


def test_update_norms_agree_between_pieces_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[Sequence[float]] = []
    for update in (
        lambda steps: optim._update_in_pieces(steps, piece=64),
        lambda steps: optim._update_together(steps, max_bytes=2**20),
    ):
        monkeypatch.setattr(optim, "_update", update)
        due = [(make_run(ShapesOnly(), 5, seed=0), adam) for adam in SETTINGS.values()]
        for state, _ in due:
            add_gradient(state, random_gradient(state, 0))
        norms.append([result["update_norm"] for result in adamw_steps(due) if isinstance(result, dict)])
    # In pieces an update is measured before it is rounded into the weights.
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_steps_on_copies_have_the_same_bits() -> None:
    proven, unproven = (make_run(ShapesOnly(), 4, seed=0) for _ in range(2))
    for step in range(3):
        for run in (proven, unproven):
            add_gradient(run, random_gradient(run, step))
        unproven.magnitudes = Magnitudes(math.inf, math.inf, math.inf)
        assert adamw_step(proven, AdamParams()) == adamw_step(unproven, AdamParams())
    assert_same(numbers(proven), numbers(unproven))


def powers(low: int, high: int) -> st.SearchStrategy[float]:
    """0 and powers of ten of every size: rounding and overflow live at the ends."""
    return st.one_of(st.just(0.0), st.integers(low, high).map(lambda exponent: 10.0**exponent))


adams = st.builds(
    AdamParams,
    learning_rate=powers(-45, 45),
    beta1=st.sampled_from([0.0, 0.5, 0.9, 0.999999, 1 - 1e-16]),
    beta2=st.sampled_from([0.0, 0.5, 0.95, 0.999999, 1 - 1e-16]),
    eps=powers(-60, 40),
    weight_decay=powers(-10, 45),
    grad_clip_norm=powers(-30, 30),
)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(st.tuples(adams, powers(-45, 16), st.booleans()), min_size=1, max_size=6))
def test_whatever_the_settings_a_run_stays_finite_and_within_its_bounds(
    steps: list[tuple[AdamParams, float, bool]],
) -> None:
    state = make_run(ShapesOnly(), 1, seed=0)
    for index, (adam, size, forget) in enumerate(steps):
        if state.grads is None:
            add_gradient(state, random_gradient(state, index, size=size))
        if forget:
            state.magnitudes = None
        before, num_steps = numbers(state), state.step
        (result,) = adamw_steps([(state, adam)])
        if isinstance(result, dict):
            assert all(math.isfinite(value) for value in result.values())
            assert all(bool(tensor.isfinite().all()) for tensor in numbers(state))
            assert state.grads is None
        else:
            assert isinstance(result, NonFiniteResult)
            assert_same(numbers(state), before)
            assert state.step == num_steps
            state.drop_gradient()
        if (bounds := state.magnitudes) is not None:
            # Bounds are of exact arithmetic; a float32 may round above them.
            slack = 1 + 1e-5
            assert float(state.weights.flat.abs().max()) <= bounds.weights * slack
            assert float(state.exp_avg.abs().max()) <= bounds.exp_avg * slack
            assert float(state.exp_avg_sq.abs().max()) <= bounds.exp_avg_sq * slack


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -1.0])
def test_broken_second_moment_is_found_before_it_spreads(broken: float) -> None:
    state = make_run(ShapesOnly(), 2, seed=0)
    add_gradient(state, random_gradient(state, 0, size=1e-3))
    state.exp_avg_sq[3] = broken
    state.magnitudes = None
    before = numbers(state)
    if broken == torch.inf:
        # An infinite second moment is a step of zero there: finite, and the tensor stays as infinite as it was.
        assert isinstance(adamw_step(state, AdamParams()), dict)
        return
    with pytest.raises(NonFiniteResult):
        adamw_step(state, AdamParams())
    assert_same(numbers(state), before)


def test_gradient_that_no_step_could_take_is_refused_at_commit() -> None:
    state = make_run(ShapesOnly(), 2, seed=0)
    largest = MAX_GRAD_NORM / math.sqrt(state.layout.num_elements)
    commit_scratch(state, AdapterArena(state.layout, torch.full_like(state.weights.flat, 0.9 * largest)))
    for poison in (torch.nan, torch.inf, 3e38, 1e19, 0.2 * largest):
        with pytest.raises(NonFiniteResult, match=r"gradient of this request .* norm"):
            commit_scratch(state, AdapterArena(state.layout, torch.full_like(state.weights.flat, poison)))
    assert state.num_open_passes == 1
    assert state.grads is not None
    assert bool((state.grads.flat == torch.tensor(0.9 * largest)).all())
    assert math.isfinite(adamw_step(state, AdamParams())["update_norm"])


@pytest.mark.parametrize("gradient", [1e19, torch.nan])
def test_such_a_gradient_that_got_in_another_way_is_refused_by_the_step(gradient: float) -> None:
    state, neighbour = (make_run(ShapesOnly(), 2, seed=0) for _ in range(2))
    add_gradient(neighbour, random_gradient(neighbour, 0))
    state.grads = AdapterArena(state.layout, torch.full_like(state.weights.flat, gradient))
    refusal, metrics = adamw_steps([(state, AdamParams()), (neighbour, AdamParams())])
    assert isinstance(refusal, NonFiniteResult)
    assert "gradient norm" in refusal.message
    assert isinstance(metrics, dict)


def test_open_gradient_in_memory_of_somebody_else_is_stepped_on(base: BaseModel) -> None:
    """As files.py restores it: plain tensors, nothing known of norms and magnitudes."""
    ours = make_state(base, LoraSpec(rank=2, seed=0))
    bare = TrainingState(
        spec=ours.spec,
        weights=ours.weights.copy(),
        exp_avg=ours.exp_avg.clone(),
        exp_avg_sq=ours.exp_avg_sq.clone(),
        grads=AdapterArena(ours.layout, random_gradient(ours, 0)),
        num_open_passes=1,
    )
    add_gradient(ours, random_gradient(ours, 0))
    for step in range(3):
        assert adamw_step(ours, AdamParams()) == adamw_step(bare, AdamParams())
        for state in (ours, bare):
            add_gradient(state, random_gradient(state, step))
    assert_same(numbers(ours), numbers(bare))
    bare.release()
