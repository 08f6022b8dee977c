"""Whatever happened in a slot before and happens in others now: a run's numbers are those it would have alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from arena_builders import ShapesOnly, add_gradient, assert_same, make_run, numbers, random_gradient
from engine_builders import make_datums, make_state, quantum_of

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine.base_model import BaseModel
from treadle.engine.optim import adamw_step, adamw_steps
from treadle.engine.passes import run_micro_batch
from treadle.engine.state import TrainingState, commit_scratch

SETTINGS = (
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=3e-2, weight_decay=0.3, grad_clip_norm=0.1),
    AdamParams(learning_rate=1e-3, beta1=0.0, beta2=0.5, eps=1e-3),
    # Not provably finite: the step works on copies.
    AdamParams(learning_rate=1e-2, eps=1e-40),
)


class Twin:
    """A run in the shared pool, and the same run alone in fresh memory."""

    def __init__(self, shared: ShapesOnly, rank: int, seed: int) -> None:
        self.shared = make_run(shared, rank, seed)
        self.alone = make_run(ShapesOnly(), rank, seed)

    def check(self) -> None:
        assert (self.shared.step, self.shared.num_open_passes) == (self.alone.step, self.alone.num_open_passes)
        assert_same(numbers(self.shared), numbers(self.alone))

    def add(self, seed: int) -> None:
        for state in (self.shared, self.alone):
            add_gradient(state, random_gradient(state, seed))


actions = st.lists(
    st.tuples(
        st.sampled_from(["create", "pass", "failed pass", "steps", "release", "drop"]),
        st.integers(0, 2**16),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=actions)
def test_any_history_of_creates_passes_steps_and_drops(actions: list[tuple[str, int]]) -> None:
    shared = ShapesOnly()
    runs = [Twin(shared, 2, seed=0)]
    for action, number in actions:
        if action == "create" or not runs:
            runs.append(Twin(shared, 1 + number % 3, seed=number))
            continue
        run = runs[number % len(runs)]
        if action == "pass":
            run.add(number)
        elif action == "failed pass":
            scratch = run.shared.new_scratch()
            scratch.flat.fill_(torch.nan)
            scratch.release()
        elif action == "steps":
            step_all(runs, number)
        elif action == "release":
            runs.remove(run)
            run.shared.release()
        else:
            runs.remove(run)
    for run in runs:
        run.check()
        run.shared.release()
    del run
    runs.clear()
    assert shared.arenas.num_taken_bytes == 0


def step_all(runs: list[Twin], number: int) -> None:
    """All due runs in one call against each alone."""
    due = [
        (run, SETTINGS[(number + index) % len(SETTINGS)])
        for index, run in enumerate(runs)
        if run.shared.grads is not None
    ]
    together = adamw_steps([(run.shared, adam) for run, adam in due])
    assert together == [adamw_step(run.alone, adam) for run, adam in due]
    for run, _ in due:
        run.check()


def test_new_run_in_a_used_slot_equals_one_in_a_fresh_slot(base: BaseModel) -> None:
    spec, adam = LoraSpec(rank=4, seed=3), AdamParams(learning_rate=1e-2, weight_decay=0.1)
    fresh = train(base, make_state(base, spec), adam)
    used = make_state(base, LoraSpec(rank=4, seed=9))
    address = used.weights.flat.data_ptr()
    train(base, used, AdamParams(learning_rate=1.0))
    dirty = used.new_scratch()
    dirty.flat.fill_(torch.nan)
    dirty.release()
    for tensor in (used.weights.flat, used.exp_avg, used.exp_avg_sq):
        tensor.fill_(torch.nan)
    used.release()
    again = make_state(base, spec)
    assert again.weights.flat.data_ptr() == address, "or the test says nothing"
    assert_same(numbers(train(base, again, adam)), numbers(fresh))


def train(base: BaseModel, state: TrainingState, adam: AdamParams) -> TrainingState:
    for step in range(3):
        quantum = quantum_of(state, make_datums(np.random.default_rng(step), [9, 20]))
        run_micro_batch(base, [quantum])
        assert quantum.scratch is not None
        commit_scratch(state, quantum.scratch)
        adamw_step(state, adam)
    return state
