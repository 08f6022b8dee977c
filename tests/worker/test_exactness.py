"""Fifty steps of one run, bit for bit the same however the server's day went.

The run is trained alone once; every other test trains it again under one more circumstance and compares its losses,
log-probabilities, weights, moments and open gradient with tolerance 0. Each circumstance is shown to have happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import worker_support
from numpy.typing import NDArray
from worker_support import Driver, MemoryBlobs, create, item, metrics_of, model_id, new_driver

from treadle.domain.ids import ModelId
from treadle.domain.losses import LOSSES, resolve_loss
from treadle.domain.ops import AdamParams, Datum, LoraSpec, OptimStepOp, PassOp, UnloadModelOp
from treadle.domain.outcome import OpOutcome, PassResult
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.quanta import cut_quanta
from treadle.worker import open_pass

NUM_STEPS = 50
# Tokens of a quantum here, so that almost every request has several; and when the run sends a long one.
QUANTUM = 32
LARGE_AT = 24
WATCHED = model_id(0)
SPEC = LoraSpec(rank=8, seed=11)
ADAM = AdamParams(learning_rate=3e-3, weight_decay=0.01, grad_clip_norm=5.0)
NEIGHBOUR_RANKS = (1, 2, 5, 8, 12, 16, 32)


@dataclass
class Trace:
    """All that a client and a checkpoint see of one run."""

    metrics: list[Mapping[str, float]] = field(default_factory=list)
    logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    snapshot: bytes = b""

    def take(self, outcome: OpOutcome) -> None:
        assert outcome.failure is None, outcome.failure
        self.metrics.append(metrics_of(outcome))
        if isinstance(outcome.result, PassResult):
            self.logprobs.extend(outcome.result.logprobs)


@dataclass(frozen=True)
class StepOps:
    """One step of a run: two passes of different losses, and the step."""

    first: PassOp
    second: PassOp
    step: OptimStepOp


def sequences(rng: np.random.Generator, lengths: Sequence[int], loss: str) -> tuple[Datum, ...]:
    made = []
    for length in lengths:
        row = rng.integers(10, 900, length + 1)
        inputs: dict[str, NDArray[np.generic]] = {"target_tokens": row[1:].astype(np.int64)}
        if loss == "cross_entropy":
            inputs["weights"] = rng.random(length).astype(np.float32)
        else:
            inputs["advantages"] = rng.normal(size=length).astype(np.float32)
        if loss == "stable_reinforce":
            inputs["sampling_logprobs"] = rng.normal(-4, 1, length).astype(np.float32)
            inputs["sampled_runs"] = (1 + np.arange(length) // 5).astype(np.float32)
        elif loss != "cross_entropy":
            inputs["logprobs"] = rng.normal(-4, 1, length).astype(np.float32)
        made.append(Datum(row[:-1].astype(np.int32), inputs))
    return tuple(made)


def steps_of(run: ModelId, *, seed: int, losses: Sequence[str], large: bool, adam: AdamParams = ADAM) -> list[StepOps]:
    """The same requests every time they are asked for."""
    rng = np.random.default_rng(seed)
    steps = []
    for index in range(NUM_STEPS):
        seq_id = 3 * index
        is_large = large and index == LARGE_AT
        lengths = [700, 900, 600] if is_large else [int(n) for n in rng.integers(1, 33, 3)]
        passes = [
            PassOp(
                run,
                seq_id + number,
                sequences(rng, lengths if number == 1 else [9], loss),
                resolve_loss(loss, {}),
                False,
            )
            for number, loss in zip((1, 2), losses, strict=True)
        ]
        steps.append(StepOps(passes[0], passes[1], OptimStepOp(run, seq_id + 3, adam)))
    return steps


def watched_steps() -> list[StepOps]:
    return steps_of(WATCHED, seed=5, losses=("cross_entropy", "ppo"), large=True)


def train(driver: Driver, trace: Trace, *, steps: Sequence[StepOps], incarnation: int = 1) -> None:
    """Each step in one cycle of its own."""
    for step in steps:
        for outcome in run_step(driver, step, incarnation=incarnation):
            trace.take(outcome)


def run_step(driver: Driver, step: StepOps, *, incarnation: int = 1) -> Sequence[OpOutcome]:
    ops = (step.first, step.second, step.step)
    starts = [StateTag(op.model_id, incarnation, op.seq_id - 1) for op in ops]
    return driver.run([item(op, starts_from=tag) for op, tag in zip(ops, starts, strict=True)]).outcomes


def finish(driver: Driver, trace: Trace, *, incarnation: int = 1) -> Trace:
    """Leave a gradient open, so that it is compared too, and take the whole state."""
    open_pass = PassOp(
        WATCHED, 3 * NUM_STEPS + 1, sequences(np.random.default_rng(9), [20], "ppo"), resolve_loss("ppo", {}), False
    )
    tag = StateTag(WATCHED, incarnation, 3 * NUM_STEPS)
    (outcome,) = driver.run([item(open_pass, starts_from=tag)]).outcomes
    trace.take(outcome)
    trace.snapshot = snapshot(driver, StateTag(WATCHED, incarnation, open_pass.seq_id))
    return trace


def snapshot(driver: Driver, tag: StateTag) -> bytes:
    data = driver.worker.encode_snapshot(tag, with_open_gradient=True)
    assert data is not None
    return data


def assert_same(trace: Trace, reference: Trace) -> None:
    assert trace.metrics == reference.metrics
    for ours, theirs in zip(trace.logprobs, reference.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert trace.snapshot == reference.snapshot


@pytest.fixture(scope="module", autouse=True)
def _small_quanta() -> Iterator[None]:
    def cut(datum_tokens: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return cut_quanta(datum_tokens, limit=QUANTUM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pass, "cut_quanta", cut)
        patch.setattr(worker_support, "cut_quanta", cut)
        yield


@pytest.fixture(scope="module")
def alone(_small_quanta: None) -> Trace:
    """The undisturbed run."""
    driver = new_driver(MemoryBlobs())
    driver.run_ops(create_watched())
    trace = Trace()
    train(driver, trace, steps=watched_steps())
    losses = [metrics["loss:sum"] for metrics in trace.metrics if "loss:sum" in metrics]
    assert len(set(losses)) > NUM_STEPS, "a run whose numbers do not move proves nothing"
    return finish(driver, trace)


def create_watched() -> Any:
    return create(WATCHED, rank=SPEC.rank, seed=SPEC.seed)


def test_among_seven_others_of_other_ranks_and_losses(alone: Trace, make_driver: Callable[..., Driver]) -> None:
    driver = make_driver()
    driver.run_ops(create_watched())
    others = neighbours(driver)
    trace = Trace()
    for step, *theirs in zip(watched_steps(), *others, strict=True):
        # The watched run's place in the plan moves from cycle to cycle.
        ops = [op for one in theirs for op in (one.first, one.second, one.step)]
        place = 3 * (step.step.seq_id // 3 % len(theirs))
        ops[place:place] = [step.first, step.second, step.step]
        for op, outcome in zip(ops, driver.run([item(op) for op in ops]).outcomes, strict=True):
            assert outcome.failure is None
            if op.model_id == WATCHED:
                trace.take(outcome)
    assert_same(finish(driver, trace), alone)


def neighbours(driver: Driver) -> list[list[StepOps]]:
    """Seven other runs, created, and their steps: all losses occur."""
    names = sorted(LOSSES)
    steps = []
    for index, rank in enumerate(NEIGHBOUR_RANKS):
        run = model_id(index + 1)
        driver.run_ops(create(run, rank=rank, seed=100 + index))
        losses = (names[index % len(names)], names[(index + 2) % len(names)])
        # Settings of their own: some that share the optimiser's call with ours, none that are ours.
        adam = AdamParams(learning_rate=1e-3 * (index + 1), beta1=0.8, weight_decay=0.1 * (index % 2))
        steps.append(steps_of(run, seed=200 + index, losses=losses, large=False, adam=adam))
    return steps


def test_short_requests_of_odd_lengths(make_driver: Callable[..., Driver]) -> None:
    """A few rows are computed by other code than many, and so are the last rows of many: alone and in company."""
    lengths = (1, 2, 3, 5, 7, 9, 11, 13, 17, 23)
    rng = np.random.default_rng(3)
    steps = [
        [
            PassOp(
                run, 2 * index + 1, sequences(rng, [length], "cross_entropy"), resolve_loss("cross_entropy", {}), False
            )
            for index, length in enumerate(np.roll(lengths, 3 * place))
        ]
        for place, run in enumerate((WATCHED, model_id(1), model_id(2)))
    ]

    def run_all(companions: Sequence[Sequence[PassOp]]) -> Trace:
        driver, trace = make_driver(), Trace()
        runs = [WATCHED, *(passes[0].model_id for passes in companions)]
        driver.run_ops(*(create(run, rank=SPEC.rank, seed=SPEC.seed + place) for place, run in enumerate(runs)))
        for passes in zip(*companions, steps[0], strict=True):
            ops = [*passes, *(OptimStepOp(one.model_id, one.seq_id + 1, ADAM) for one in passes)]
            for op, outcome in zip(ops, driver.run_ops(*ops), strict=True):
                if op.model_id == WATCHED:
                    trace.take(outcome)
        trace.snapshot = snapshot(driver, StateTag(WATCHED, 1, 2 * len(lengths)))
        return trace

    assert_same(run_all(steps[1:]), run_all([]))


def test_with_requests_split_over_cycles(alone: Trace, make_driver: Callable[..., Driver]) -> None:
    driver = make_driver()
    driver.run_ops(create_watched())
    trace = Trace()
    num_split = 0
    for step in watched_steps():
        num_quanta = len(open_pass.cut_quanta([datum.num_tokens for datum in step.first.datums]))
        for start in range(num_quanta):
            (outcome,) = driver.run([item(step.first, quanta=(start, start + 1))]).outcomes
            num_split += outcome.is_partial
        trace.take(outcome)
        for op in (step.second, step.step):
            (outcome,) = driver.run([item(op)]).outcomes
            trace.take(outcome)
    assert num_split >= NUM_STEPS
    assert_same(finish(driver, trace), alone)


class BreakingKernel:
    """The worker's kernel, out of memory at chosen calls, `add` of forwards and `add_grads` of backwards."""

    def __init__(self, kernel: Any) -> None:
        self.name = kernel.name
        self.num_broken = {"add": 0, "add_grads": 0}
        self._kernel = kernel
        self._calls_left = dict.fromkeys(self.num_broken, 0)

    def break_at(self, call: str, *, num_calls: int) -> None:
        """Run out of memory once, at that call from now."""
        self._calls_left = {**dict.fromkeys(self.num_broken, 0), call: num_calls}

    def _tick(self, call: str) -> None:
        self._calls_left[call] -= 1
        if self._calls_left[call] == 0:
            self.num_broken[call] += 1
            raise torch.OutOfMemoryError("no memory left, says the test")

    def add(self, *args: Any) -> object:
        self._tick("add")
        return self._kernel.add(*args)

    def add_grads(self, *args: Any) -> None:
        # Only then, so that some of the gradient is written.
        self._kernel.add_grads(*args)
        self._tick("add_grads")


def test_with_memory_running_out_in_between(alone: Trace, make_driver: Callable[..., Driver]) -> None:
    driver = make_driver()
    driver.run_ops(create_watched())
    others = neighbours(driver)[:2]
    base, packs = driver.worker._base, driver.worker._runner._micro_batches
    limits = packs.limits
    rng = np.random.default_rng(1)
    breaking = BreakingKernel(base.kernel)
    base.kernel = breaking  # type: ignore[assignment]
    trace = Trace()
    for index, (step, *theirs) in enumerate(zip(watched_steps(), *others, strict=True)):
        if index % 3 == 0:
            # What shortages teach is not the matter here, and would have every quantum run alone before long.
            packs.limits = limits
            breaking.break_at(("add", "add_grads")[index % 2], num_calls=int(rng.integers(1, 17)))
        ops = [op for one in (step, *theirs) for op in (one.first, one.second, one.step)]
        for op, outcome in zip(ops, driver.run([item(op) for op in ops]).outcomes, strict=True):
            assert outcome.failure is None, outcome.failure
            if op.model_id == WATCHED:
                trace.take(outcome)
    assert min(breaking.num_broken.values()) >= 8, breaking.num_broken
    base.kernel = breaking._kernel
    assert_same(finish(driver, trace), alone)


def test_in_a_slot_that_others_have_used(alone: Trace, make_driver: Callable[..., Driver]) -> None:
    driver = make_driver()
    for index in range(3):
        run = model_id(index + 1)
        driver.run_ops(create(run, rank=SPEC.rank, seed=index))
        for step in steps_of(run, seed=index, losses=("cross_entropy", "ppo"), large=False)[:2]:
            run_step(driver, step)
        # One leaves with a gradient open.
        leftover = PassOp(run, 7, sequences(np.random.default_rng(index), [30], "ppo"), resolve_loss("ppo", {}), False)
        driver.run_ops(leftover, UnloadModelOp(run, 8))
    driver.run_ops(create_watched())
    trace = Trace()
    train(driver, trace, steps=watched_steps())
    assert_same(finish(driver, trace), alone)


def test_after_a_restart(alone: Trace, make_driver: Callable[..., Driver], blobs: MemoryBlobs) -> None:
    """One restart between steps, one with a gradient open."""
    driver = make_driver()
    driver.run_ops(create_watched())
    trace = Trace()
    steps = watched_steps()
    train(driver, trace, steps=steps[:20])
    driver = restarted(driver, make_driver, blobs, StateTag(WATCHED, 1, 60), incarnation=2)
    train(driver, trace, steps=steps[20:30], incarnation=2)
    half = steps[30]
    (outcome,) = driver.run([item(half.first, starts_from=StateTag(WATCHED, 2, 90))]).outcomes
    trace.take(outcome)
    driver = restarted(driver, make_driver, blobs, StateTag(WATCHED, 2, 91), incarnation=3)
    for op in (half.second, half.step):
        (outcome,) = driver.run([item(op, starts_from=StateTag(WATCHED, 3, op.seq_id - 1))]).outcomes
        trace.take(outcome)
    train(driver, trace, steps=steps[31:], incarnation=3)
    assert_same(finish(driver, trace, incarnation=3), alone)


def restarted(
    driver: Driver, make_driver: Callable[..., Driver], blobs: MemoryBlobs, tag: StateTag, *, incarnation: int
) -> Driver:
    """A new worker that holds the run as the old one left it."""
    key = f"restart-{tag.applied_seq}"
    blobs.write(key, snapshot(driver, tag))
    new = make_driver()
    restore = RestoreItem(
        model_id=WATCHED,
        blob_key=key,
        lora=SPEC,
        tag=StateTag(WATCHED, incarnation, tag.applied_seq),
    )
    new.run([], restores=[restore])
    return new
