"""What a pool does when something around it breaks: the database, a blob, a worker in the middle of a split pass."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from scheduler_support import POOL, SETTINGS, Cluster

from treadle.domain.ids import BlobKey, ModelId, SamplingSessionId
from treadle.domain.ops import PassOp, SaveForSamplerOp, SaveWeightsOp, UnloadModelOp
from treadle.domain.outcome import CycleOutcome, PoolFacts, SnapshotWritten
from treadle.domain.plan import CycleWork, StateTag
from treadle.domain.records import FinishedCycle, LeaseRecord
from treadle.domain.states import Category, ModelState
from treadle.errors import ServerError, StoreUnavailable, WorkerDied
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.scheduler import committing, cycle_loop, slot
from treadle.testing.builders import datum, pass_op, sample_op, step_op

RUN = ModelId("session:train:0")
OTHER = ModelId("session:train:1")
# One quantum of the split pass per cycle.
SLOW = replace(SETTINGS, budget_tokens=2048)


def backward(seq_id: int, *, run: ModelId = RUN) -> PassOp:
    return pass_op(seq_id, model_id=run)


def split_pass(seq_id: int, *, run: ModelId = RUN) -> PassOp:
    """Three quanta, so three cycles of a SLOW pool."""
    return pass_op(seq_id, model_id=run, datums=[datum(num_tokens=2048, seed=index) for index in range(3)])


async def forward(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    """What the run's present weights give on one fixed datum."""
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


def break_commits(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """The next commits fail with these."""
    real, left = cluster.store.cycles.finish, list(errors)

    async def finish(lease: LeaseRecord, cycle: FinishedCycle, **_: object) -> tuple[BlobKey, ...]:
        if left:
            raise left.pop(0)
        return await real(lease, cycle)

    monkeypatch.setattr(cluster.store.cycles, "finish", finish)


async def test_a_database_that_is_away_for_a_moment_costs_nobody_its_state(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_PAUSE_S", 0.0)
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    break_commits(cluster, monkeypatch, *[StoreUnavailable("locked")] * 3)
    _, stepped = await cluster.run(backward(3), step_op(4))
    assert json.loads(stepped)["metrics"]["num_steps"] == 2
    record = await cluster.model(RUN)
    assert (record.state, record.incarnation) == (ModelState.READY, 1), "the state was not the worker's own any more"


async def test_an_outcome_that_cannot_be_stored_fails_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle_loop, "ERROR_PAUSE_S", 0.0)
    real = cluster.store.cycles.finish

    async def finish(lease: LeaseRecord, cycle: FinishedCycle, **_: object) -> tuple[BlobKey, ...]:
        if any(outcome.request_id == f"{RUN}:1" and outcome.result for outcome in cycle.finished):
            raise ServerError("the database refused a statement")
        return await real(lease, cycle)

    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
    monkeypatch.setattr(cluster.store.cycles, "finish", finish)
    guilty, innocent = await cluster.submit(backward(1), backward(1, run=OTHER))
    failure = await cluster.failure(guilty)
    assert failure.category is Category.SERVER
    assert "could not be stored" in failure.message
    await cluster.result(innocent)
    await cluster.run(backward(2), step_op(3))


async def test_a_commit_that_fails_spares_runs_that_were_not_in_its_cycle(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.create(RUN)
    await cluster.create(OTHER)
    await cluster.run(backward(1), step_op(2), SaveWeightsOp(RUN, 3, name="safe"))
    await cluster.run(backward(1, run=OTHER), step_op(2, model_id=OTHER))
    break_commits(cluster, monkeypatch, ServerError("the database refused a statement"))
    # A step behind a hole: OTHER has a line, but nothing of it is in the cycle whose commit fails.
    await cluster.submit(step_op(9, model_id=OTHER))
    await cluster.run(backward(4))
    await cluster.run(backward(3, run=OTHER))
    assert (await cluster.model(OTHER)).state is ModelState.READY


async def test_a_payload_that_is_gone_fails_its_own_request(cluster: Cluster) -> None:
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
    await cluster.drain()
    lost, key = await cluster.submit_large(backward(1))
    (innocent,) = await cluster.submit(backward(1, run=OTHER))
    cluster.blobs.delete(key)
    cluster.start()
    failure = await cluster.failure(lost)
    assert failure.category is Category.SERVER
    assert "send it again" in failure.message
    await cluster.result(innocent)
    await cluster.run(backward(2), step_op(3))


async def test_a_sample_whose_payload_is_gone_fails_alone(cluster: Cluster) -> None:
    await cluster.result(await cluster.create(RUN))
    await cluster.drain()
    lost, key = await cluster.submit_large(sample_op(1, seed=3))
    innocent = await cluster.submit_sample(sample_op(2, seed=3))
    cluster.blobs.delete(key)
    cluster.start()
    assert (await cluster.failure(lost)).category is Category.SERVER
    await cluster.result(innocent)


async def test_large_payloads_survive_a_crash_and_go_with_their_requests(cluster: Cluster) -> None:
    await cluster.result(await cluster.create(RUN))
    await cluster.run(backward(1), SaveWeightsOp(RUN, 2, name="safe"))
    await cluster.crash()
    passed, pass_key = await cluster.submit_large(backward(3))
    sampled, sample_key = await cluster.submit_large(sample_op(1, seed=3))
    cluster.start()
    await cluster.result(passed)
    await cluster.result(sampled)
    late, late_key = await cluster.submit_large(backward(4))
    await cluster.result(late)
    await cluster.run(step_op(5))
    assert cluster.blobs.exists(pass_key), "a replay from the save would need it"
    # Payloads go behind the second newest snapshot, after the commit that says so and before the loop's next cycle.
    await cluster.run(SaveWeightsOp(RUN, 6, name="second"), SaveWeightsOp(RUN, 7, name="third"))
    await cluster.drain()
    assert not [key for key in (pass_key, sample_key, late_key) if cluster.blobs.exists(key)]


async def test_of_two_saves_under_one_sampling_session_the_second_is_refused(cluster: Cluster) -> None:
    await cluster.create(RUN)
    session_id = SamplingSessionId("session:sample:1")
    first, _, second, third = await cluster.submit(
        SaveForSamplerOp(RUN, 1, sampling_session_id=session_id),
        backward(2),
        SaveForSamplerOp(RUN, 3, sampling_session_id=session_id),
        SaveForSamplerOp(RUN, 4, sampling_session_id=session_id),
    )
    await cluster.result(first)
    for refused in (second, third):
        failure = await cluster.failure(refused)
        assert failure.category is Category.USER
        assert session_id in failure.message


async def test_a_line_of_nothing_but_refused_requests_is_not_read_for_ever(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1))
    for seq_id in (2, 3):
        await cluster.refuse(RUN, seq_id)
    await _whole_cycle_of_another_run(cluster)
    assert await cluster.store.requests.heads(POOL) == []
    (stepped,) = await cluster.run(step_op(4))
    assert json.loads(stepped)["metrics"]["skipped_passes"] == 2


async def test_refused_requests_of_a_run_that_is_over_leave_the_line(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(UnloadModelOp(RUN, 1))
    await cluster.refuse(RUN, 5)
    await _whole_cycle_of_another_run(cluster)
    assert await cluster.store.requests.heads(POOL) == []


async def _whole_cycle_of_another_run(cluster: Cluster) -> None:
    """So that everything queued before has been planned once."""
    await cluster.result(await cluster.create(OTHER))
    await cluster.run(backward(1, run=OTHER), backward(2, run=OTHER))


async def test_a_run_that_is_over_is_forgotten(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), UnloadModelOp(RUN, 2))
    (late,) = await cluster.submit(backward(3))
    await cluster.failure(late)
    await _whole_cycle_of_another_run(cluster)
    (loop,) = cluster.loops()
    assert loop._book.known(RUN) is None


class Interrupted(FakeExecutor):
    """Calls `on_part` after the first part of every split pass."""

    on_part: Any = None

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        if any(one.is_partial for one in outcome.outcomes):
            type(self).on_part(self)
        return outcome


async def _slow(cluster: Cluster, worker: type[FakeExecutor]) -> None:
    await cluster.drain()
    cluster.settings, cluster.new_worker = SLOW, worker
    cluster.start()


async def test_a_drain_between_two_parts_persists_nothing_of_the_op(cluster: Cluster) -> None:
    class Draining(Interrupted):
        on_part = staticmethod(lambda _worker: cluster.runner.drain())

    for run in (RUN, OTHER):
        await cluster.create(run)
        await cluster.run(backward(1, run=run))
    (undisturbed,) = await cluster.run(split_pass(2, run=OTHER))
    expected = await forward_after_step(cluster, 3, run=OTHER)
    await _slow(cluster, Draining)
    (passed,) = await cluster.submit(split_pass(2))
    assert cluster._task is not None
    async with asyncio.timeout(20):
        await cluster._task
    assert (await cluster.store.requests.future(passed)).state == "queued"  # type: ignore[union-attr]
    record = await cluster.model(RUN)
    assert (record.next_seq_id, record.changed_seq) == (2, 1)
    cluster.settings, cluster.new_worker = SLOW, FakeExecutor
    cluster.start()
    assert await cluster.result(passed) == undisturbed
    assert await forward_after_step(cluster, 3) == expected


async def forward_after_step(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    await cluster.run(step_op(seq_id, model_id=run))
    return await forward(cluster, seq_id + 1, run=run)


async def test_a_death_between_two_parts_starts_the_op_again(cluster: Cluster) -> None:
    deaths = iter(["first part done"])

    class Dying(Interrupted):
        @staticmethod
        def on_part(worker: FakeExecutor) -> None:
            for reason in deaths:
                worker.die(reason)

    for run in (RUN, OTHER):
        await cluster.create(run)
        await cluster.run(backward(1, run=run), SaveWeightsOp(run, 2, name="open"))
    (undisturbed,) = await cluster.run(split_pass(3, run=OTHER))
    expected = await forward_after_step(cluster, 4, run=OTHER)
    await _slow(cluster, Dying)
    (again,) = await cluster.run(split_pass(3))
    assert again == undisturbed
    assert await forward_after_step(cluster, 4) == expected


class PoisonedCreation(FakeExecutor):
    """A worker that dies of making RUN."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(item.planned.request_id == f"{RUN}:0" for item in work.items):
            self.die("poison")
        return await super().run_cycle(work)


async def test_a_run_whose_creation_kills_its_worker_fails_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0,))
    cluster.new_worker = PoisonedCreation
    await cluster.restart()
    created = await cluster.create(RUN)
    assert "3 times" in (await cluster.failure(created)).message
    (behind,) = await cluster.submit(backward(1))
    await cluster.failure(behind)
    assert (await cluster.model(RUN)).state is ModelState.FAILED
    await _whole_cycle_of_another_run(cluster)


class PoisonedLater(FakeExecutor):
    """A worker that dies of any second part of a pass."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(item.planned.quantum_start > 0 for item in work.items):
            self.die("poison")
        return await super().run_cycle(work)


async def test_a_pass_that_kills_its_worker_in_a_later_part_is_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0,))
    await _slow(cluster, PoisonedLater)
    await cluster.create(RUN)
    (poison,) = await cluster.submit(split_pass(1))
    assert "3 times" in (await cluster.failure(poison)).message
    await cluster.run(backward(2))


async def test_a_drain_does_not_wait_for_the_next_try_to_start_a_worker(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_died = asyncio.Event()

    class StillBorn(FakeExecutor):
        async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
            has_died.set()
            raise WorkerDied("killed while loading")

    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (1000.0,))
    cluster.new_worker = StillBorn
    await cluster.restart()
    await has_died.wait()
    for _ in range(50):  # turns of the loop, until the runner has seen it, and pauses
        await asyncio.sleep(0)
    await cluster.drain()


class Unpersistable(FakeExecutor):
    async def snapshot(
        self, targets: Sequence[tuple[StateTag, str]], *, with_open_gradient: bool = False
    ) -> dict[ModelId, SnapshotWritten]:
        self.die("killed while persisting")
        return await super().snapshot(targets, with_open_gradient=with_open_gradient)


async def test_a_death_during_the_drain_is_not_a_clean_end(cluster: Cluster) -> None:
    cluster.new_worker = Unpersistable
    await cluster.restart()
    await cluster.create(RUN)
    await cluster.run(backward(1))
    with pytest.raises(WorkerDied, match="persisting"):
        await cluster.drain()


async def test_samples_that_cannot_be_stored_do_not_keep_a_drain_from_persisting(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1))

    async def finish_samples(*_args: object, **_: object) -> None:
        cluster.runner.drain()
        raise StoreUnavailable("locked")

    monkeypatch.setattr(cluster.store.cycles, "finish_samples", finish_samples)
    monkeypatch.setattr("treadle.scheduler.sampling_loop.ERROR_PAUSE_S", 0.0)
    sampled = await cluster.submit_sample(sample_op(1, seed=3))
    assert cluster._task is not None
    async with asyncio.timeout(20):
        await cluster._task
    monkeypatch.undo()
    cluster.start()
    await cluster.result(sampled)
    (newest, *_) = await cluster.store.snapshots.newest(RUN)
    assert newest.seq_id == 1
    await cluster.run(step_op(2))
