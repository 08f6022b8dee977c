"""Memory that runs out anywhere in a cycle costs nobody a bit, and a request only when nothing else is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import worker_support
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from worker_support import Driver, create, datums, item, model_id, passed, step

from treadle.domain.ids import ModelId
from treadle.domain.ops import LoraSpec, OptimStepOp, PassOp
from treadle.domain.outcome import CycleOutcome, PassResult
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.quanta import cut_quanta
from treadle.domain.states import Category
from treadle.engine.context import Recompute
from treadle.engine.memory import PassLimits
from treadle.worker import cycle, micro_batches, open_pass, restoring, worker
from treadle.worker.micro_batches import MicroBatches

# Small quanta, so that ops of several are cheap.
QUANTUM = 24
LIMITS = PassLimits(packed=150, none=200, selective=400, full=800)
ERRORS: dict[str, Callable[[], Exception]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "numpy": MemoryError,
}


@pytest.fixture(autouse=True)
def _small_quanta(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(datum_tokens: Sequence[int]) -> tuple[tuple[int, int], ...]:
        return cut_quanta(datum_tokens, limit=QUANTUM)

    monkeypatch.setattr(open_pass, "cut_quanta", cut)
    monkeypatch.setattr(worker_support, "cut_quanta", cut)


def packs(driver: Driver) -> MicroBatches:
    return driver.worker._runner._micro_batches


@dataclass(slots=True)
class BreakingKernel:
    """The real kernel until its n-th call: those of the forward are `add`, those of the backward `add_grads`."""

    inner: Any
    calls_left: int
    make_error: Callable[[], Exception]

    @property
    def name(self) -> str:
        return str(self.inner.name)

    def add(self, *args: Any) -> object:
        self._count()
        return self.inner.add(*args)

    def add_grads(self, dy: Tensor, *args: Any) -> None:
        self._count()
        self.inner.add_grads(dy, *args)

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.make_error()


class Shared:
    """What the examples of one property share: a worker, the undisturbed numbers, and the next free run."""

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.expected: dict[bool, list[bytes]] = {}
        self.num_runs = 0


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared()


def ops(first_run: int, *, looks: bool) -> list[PassOp | OptimStepOp]:
    """Four runs of other ranks and lengths, of one to four quanta, two passes for two of them; then their steps.

    looks: whether one of those passes is forward_only.
    """
    runs = [model_id(first_run + index) for index in range(4)]
    passes: list[PassOp | OptimStepOp] = [
        passed(runs[0], 1, datums(1, 20, seed=1)),
        passed(runs[1], 1, datums(4, 17, seed=2)),
        passed(runs[2], 1, datums(3, 9, seed=3)),
        passed(runs[2], 2, datums(2, 24, seed=4), forward_only=looks),
        passed(runs[3], 1, datums(2, 13, seed=5)),
        passed(runs[3], 2, datums(2, 11, seed=6)),
    ]
    return [*passes, *(step(run, 2 if index < 2 else 3) for index, run in enumerate(runs))]


def run_all(driver: Driver, first_run: int, *, looks: bool) -> CycleOutcome:
    driver.run_ops(*(create(model_id(first_run + index), rank=2 + 3 * index, seed=index) for index in range(4)))
    return driver.run([item(op) for op in ops(first_run, looks=looks)])


def numbers(driver: Driver, first_run: int, outcome: CycleOutcome) -> list[bytes]:
    """All results and weights, as bits; the runs are forgotten."""
    found: list[bytes] = []
    for one in outcome.outcomes:
        assert one.failure is None, one.failure
        if isinstance(one.result, PassResult):
            found += [array.tobytes() for array in one.result.logprobs]
    runs = [model_id(first_run + index) for index in range(4)]
    found += [driver.worker._slots.state(run).weights.flat.numpy().tobytes() for run in runs]
    driver.worker.evict(runs)
    return found


# A forward and its backward are 32 kernel calls on this model. A lone quantum has four tries, one that only looks and
# has nothing to recompute has two.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strikes_at=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    kind=st.sampled_from(sorted(ERRORS)),
    packed=st.integers(1, 200),
    looks=st.booleans(),
)
def test_wherever_memory_runs_out_the_bits_are_those_of_an_undisturbed_run(
    make_driver: Callable[..., Driver], shared: Shared, strikes_at: list[int], kind: str, packed: int, looks: bool
) -> None:
    if shared.driver is None:
        shared.driver = make_driver()
        packs(shared.driver).limits = LIMITS
        for index in (False, True):
            shared.expected[index] = numbers(shared.driver, 0, run_all(shared.driver, 0, looks=index))
    driver = shared.driver
    shared.num_runs += 4
    packs(driver).limits = PassLimits(packed=packed, none=200, selective=400, full=800)
    base = driver.worker._base
    real = base.kernel
    kernel: Any = real
    for calls in strikes_at[: 1 if looks else None]:
        kernel = BreakingKernel(kernel, calls, ERRORS[kind])
    base.kernel = kernel
    try:
        outcome = run_all(driver, shared.num_runs, looks=looks)
    finally:
        base.kernel = real
    is_same = numbers(driver, shared.num_runs, outcome) == shared.expected[looks]
    assert is_same, "bits differ"


@dataclass(slots=True)
class SmallDevice:
    """run_micro_batch on a device that holds so many tokens per mode; every try is written down."""

    real: Callable[..., Any]
    holds: dict[Recompute, int]
    tries: list[tuple[int, int, Recompute, bool]]

    def __call__(self, base: Any, quanta: Sequence[Any], *, recompute: Recompute) -> Any:
        num_tokens = sum(datum.num_tokens for quantum in quanta for datum in quantum.datums)
        fits = num_tokens <= self.holds[recompute]
        self.tries.append((len(quanta), num_tokens, recompute, fits))
        results = self.real(base, quanta, recompute=recompute)
        if not fits:
            raise MemoryError("after the backward has written its gradients")
        return results


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> SmallDevice:
    holds = {Recompute.NONE: 30, Recompute.SELECTIVE: 45, Recompute.FULL: 60}
    device = SmallDevice(micro_batches.run_micro_batch, holds, [])
    monkeypatch.setattr(micro_batches, "run_micro_batch", device)
    return device


def weights_of(driver: Driver, run: ModelId) -> bytes:
    return driver.worker._slots.state(run).weights.flat.numpy().tobytes()


def test_packs_are_halved_and_lone_quanta_recompute_until_only_the_too_large_request_fails(
    driver: Driver, make_driver: Callable[..., Driver], small_device: SmallDevice
) -> None:
    packs(driver).limits = LIMITS
    runs = [model_id(index) for index in range(5)]
    # One datum each: 20 and 25 fit as they are, 40 and 50 with recompute, 70 not at all.
    lengths = (20, 40, 70, 50, 25)
    driver.run_ops(*(create(run) for run in runs))
    items = [item(passed(run, 1, datums(1, length))) for run, length in zip(runs, lengths, strict=True)]
    outcomes = driver.run([*items, *(item(step(run, 2)) for run in runs)]).outcomes
    failures = {length: one.failure for length, one in zip(lengths, outcomes, strict=False) if one.failure is not None}
    assert set(failures) == {70}
    assert failures[70].category is Category.SERVER
    assert "out of memory: 70 tokens" in failures[70].message
    # The quantum of 40 has already taught the worker that 70 will not fit without recompute.
    tried = [mode for num_quanta, tokens, mode, _ in small_device.tries if (num_quanta, tokens) == (1, 70)]
    assert tried == [Recompute.SELECTIVE, Recompute.FULL, Recompute.FULL]
    assert [(tokens, mode) for _, tokens, mode, fits in small_device.tries if fits and tokens in (40, 50)] == [
        (40, Recompute.SELECTIVE),
        (50, Recompute.FULL),
    ]
    assert len(small_device.tries) < 25
    small_device.holds = dict.fromkeys(Recompute, 10_000)
    for run, length in zip(runs, lengths, strict=True):
        if length != 70:
            alone = make_driver()
            alone.run_ops(create(run), passed(run, 1, datums(1, length)), step(run, 2))
            assert weights_of(driver, run) == weights_of(alone, run)


def test_a_worker_learns_what_does_not_fit_without_giving_up_all_its_room(
    driver: Driver, small_device: SmallDevice
) -> None:
    packs(driver).limits = LIMITS
    runs = [model_id(index) for index in range(4)]
    driver.run_ops(*(create(run) for run in runs))
    num_failures = []
    for seq_id in (1, 2, 3):
        small_device.tries.clear()
        driver.run_ops(*(passed(run, seq_id, datums(1, 14)) for run in runs))
        num_failures.append(sum(not fits for *_, fits in small_device.tries))
    # 150 tokens a pack, then 75, then 37: now two of 14 share a pass, which 30 tokens have room for.
    assert num_failures == [1, 1, 0]
    assert packs(driver).limits == PassLimits(packed=37, none=200, selective=400, full=800)


def test_idle_runs_make_room_before_a_request_fails(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(parking_dir=tmp_path)
    runs = [model_id(index) for index in range(3)]
    driver.run_ops(*(create(run) for run in runs))
    slots, real = driver.worker._slots, micro_batches.run_micro_batch
    one_run = slots.resident_bytes // 3

    def crowded(base: Any, quanta: Sequence[Any], *, recompute: Recompute) -> Any:
        if slots.resident_bytes > one_run:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, quanta, recompute=recompute)

    monkeypatch.setattr(micro_batches, "run_micro_batch", crowded)
    driver.run_ops(passed(runs[1], 1, datums(1, 8)))
    assert slots.resident_bytes > 0
    driver.run_ops(step(runs[1], 2), passed(runs[2], 1, datums(1, 8)))


def test_an_op_in_parts_starts_again_from_its_first_quantum(
    driver: Driver, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model_id()
    op = passed(run, 1, datums(4, 20))
    driver.run_ops(create(run))
    driver.run([item(op, quanta=(0, 3))])
    real, tries = micro_batches.run_micro_batch, []

    def breaking_once(base: Any, quanta: Sequence[Any], *, recompute: Recompute) -> Any:
        results = real(base, quanta, recompute=recompute)
        tries.append(len(quanta))
        if len(tries) == 1:
            raise MemoryError
        return results

    monkeypatch.setattr(micro_batches, "run_micro_batch", breaking_once)
    last, _ = driver.run([item(op, quanta=(3, 4)), item(step(run, 2))]).outcomes
    assert tries[0] == 1
    assert sum(tries[1:]) == 4
    whole = make_driver()
    whole.run_ops(create(run), op, step(run, 2))
    assert isinstance(last.result, PassResult)
    assert len(last.result.logprobs) == 4
    assert weights_of(driver, run) == weights_of(whole, run)


def test_a_forward_only_pass_that_does_not_fit_fails_without_lowering_limits(
    driver: Driver, small_device: SmallDevice
) -> None:
    run = model_id()
    packs(driver).limits = LIMITS
    driver.run_ops(create(run))
    one, other = driver.run(
        [
            item(passed(run, 1, datums(1, 90), forward_only=True)),
            item(passed(run, 2, datums(1, 20), forward_only=True)),
        ]
    ).outcomes
    assert one.failure is not None
    assert one.failure.category is Category.SERVER
    assert other.failure is None
    assert packs(driver).limits.none == LIMITS.none


def test_a_datum_longer_than_memory_holds_is_refused_before_it_runs(driver: Driver) -> None:
    run = model_id()
    packs(driver).limits = PassLimits(packed=16, none=16, selective=32, full=64)
    driver.run_ops(create(run))
    data = (*datums(1, 10), *datums(1, 65))
    refused, taken, looked, stepped = driver.run(
        [
            item(passed(run, 1, data)),
            item(passed(run, 2, datums(1, 64))),
            item(passed(run, 3, datums(1, 65), forward_only=True)),
            item(step(run, 4)),
        ]
    ).outcomes
    assert refused.failure is not None
    assert refused.failure.category is Category.USER
    assert "datum 1 has 65 tokens" in refused.failure.message
    assert "64" in refused.failure.message
    assert taken.failure is None
    assert looked.failure is None, "what keeps nothing is not bound by what a recorded pass keeps"
    assert worker_support.metrics_of(stepped)["skipped_passes"] == 1


def test_a_request_that_breaks_otherwise_lowers_no_limit(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    run = model_id()
    limits = packs(driver).limits
    driver.run_ops(create(run))

    def breaking(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(micro_batches, "run_micro_batch", breaking)
    (outcome,) = driver.run([item(passed(run, 1, datums(2, 20)))]).outcomes
    assert outcome.failure is not None
    assert "internal error" in outcome.failure.message
    assert packs(driver).limits == limits


class BrokenSampler:
    has_work = True

    def step(self, _max_s: float) -> None:
        raise lost_device()


def lost_device(*_args: Any, **_kwargs: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def run_pass(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "run_micro_batch", lost_device)
    driver.run([item(passed(model_id(), 2, datums(1, 8)))])


def run_create(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle, "new_training_state", lost_device)
    driver.run([item(create(model_id(1)))])


def run_step(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle, "adamw_steps", lost_device)
    driver.run([item(step(model_id(), 2))])


def run_restore(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "new_training_state", lost_device)
    driver.run([], restores=[RestoreItem(model_id(), LoraSpec(4, 9), None, StateTag(model_id(), 2, 0))])


def run_snapshot(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "encode_state", lost_device)
    driver.snapshot(StateTag(model_id(), 1, 1), "key")


def run_sample(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.worker._sampler, "_inner", BrokenSampler())
    driver.worker.sample_step(0.0)


@pytest.mark.parametrize("run_into", [run_pass, run_create, run_step, run_restore, run_snapshot, run_sample])
def test_a_lost_device_ends_the_worker(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, run_into: Callable[[Driver, pytest.MonkeyPatch], None]
) -> None:
    """An error that stays must not be booked as one request's: every later request would fail too."""
    driver.run_ops(create(model_id()), passed(model_id(), 1, datums(1, 8)))
    with pytest.raises(torch.AcceleratorError):
        run_into(driver, monkeypatch)
