"""A worker that outlives its leader: what a newer one's first cycle does to the older one's last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from worker_support import Driver, MemoryBlobs, create, datums, item, model_id, new_driver, passed, save, step

from treadle.domain.ids import BlobKey
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import CycleOutcome
from treadle.domain.plan import RestoreItem, StateTag
from treadle.errors import Fenced
from treadle.worker.compute import ComputeLoop
from treadle.worker.work import DecodedCycle, DecodedItem

RUN, OTHER, THIRD = model_id(0), model_id(1), model_id(2)
SPEC = LoraSpec(rank=8, seed=1)


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    """Packs of one quantum, so that a cycle has several micro-batches; two runs one step in, one untouched."""
    driver = make_driver(micro_batch_tokens=1)
    for run in (RUN, OTHER):
        driver.run_ops(create(run), passed(run, 1, datums(1, 8)), step(run, 2), save(run, 3))
    driver.run_ops(create(THIRD))
    return driver


def cycle_of(token: int, items: Sequence[DecodedItem], restores: Sequence[RestoreItem] = ()) -> DecodedCycle:
    return DecodedCycle(token, token, tuple(items), tuple(restores))


def old_items() -> list[DecodedItem]:
    return [
        *(item(passed(RUN, seq, datums(1, 8, seed=seq))) for seq in (4, 5)),
        item(passed(OTHER, 4, datums(1, 8))),
        item(step(RUN, 6)),
    ]


def finish(loop: ComputeLoop) -> CycleOutcome:
    while (outcome := loop.run_unit().cycle) is None:
        assert loop.has_work
    return outcome


@pytest.mark.parametrize("num_units", [0, 1, 2, 3, 4])
def test_a_newer_leader_ends_the_cycle_of_the_older_wherever_it_is(driver: Driver, num_units: int) -> None:
    loop = ComputeLoop(driver.worker, wake=lambda: None)
    old = cycle_of(1, old_items())
    assert loop.begin_cycle(old) is None
    for _ in range(num_units):
        assert loop.run_unit().cycle is None
    tag = StateTag(RUN, 2, 3)
    ops = [passed(RUN, seq, datums(1, 8, seed=seq)) for seq in (4, 5)]
    new = [item(op, starts_from=StateTag(RUN, 2, op.seq_id - 1)) for op in (*ops, step(RUN, 6), save(RUN, 7))]
    restore = RestoreItem(RUN, SPEC, BlobKey("states/session_train_0/3"), tag)
    assert loop.begin_cycle(cycle_of(2, new, [restore])) is old
    held = driver.worker._slots
    assert [run in held for run in (RUN, OTHER, THIRD)] == [False, False, True]
    assert not driver.worker._runner.busy_runs
    outcome = finish(loop)
    assert [one.failure for one in outcome.outcomes] == [None] * 4
    undisturbed = new_driver(MemoryBlobs())
    undisturbed.run_ops(create(RUN), passed(RUN, 1, datums(1, 8)), step(RUN, 2))
    undisturbed.run_ops(*ops, step(RUN, 6), save(RUN, 7))
    ours = driver.worker.encode_snapshot(StateTag(RUN, 2, 7), with_open_gradient=True)
    assert ours == undisturbed.worker.encode_snapshot(StateTag(RUN, 1, 7), with_open_gradient=True)


def test_an_older_leader_changes_nothing(driver: Driver) -> None:
    loop = ComputeLoop(driver.worker, wake=lambda: None)
    loop.begin_cycle(cycle_of(5, old_items()))
    loop.run_unit()
    with pytest.raises(Fenced, match="carries token 4, this worker has seen 5"):
        loop.begin_cycle(cycle_of(4, [item(create(model_id(9)))]))
    outcome = finish(loop)
    assert outcome.token == 5
    assert [one.failure for one in outcome.outcomes] == [None] * 4
    assert model_id(9) not in driver.worker._slots
