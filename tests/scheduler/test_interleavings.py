"""The ten interleavings of recovery: each found a hole in an earlier design, and each is a test here.

Every one ends with the numbers of an undisturbed run, which the run OTHER makes in the same pool with the same data.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from scheduler_support import SETTINGS, Cluster

from treadle.blobs import BlobStore
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, SamplingSessionId, TinkerPath
from treadle.domain.ops import LoadWeightsOp, LoraSpec, PassOp, SaveForSamplerOp, SaveWeightsOp
from treadle.domain.outcome import CycleOutcome, Failure
from treadle.domain.plan import CycleWork
from treadle.domain.records import SnapshotRecord
from treadle.domain.states import Category, ModelState
from treadle.executor.fake import FakeExecutor
from treadle.executor.faults import Fault, Moment, PlannedFault
from treadle.scheduler import slot, snapshots
from treadle.testing.builders import datum, pass_op, sample_op, step_op

RUN = ModelId("session:train:0")
OTHER = ModelId("session:train:1")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead workers are replaced without a pause."""
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0,))


@pytest.fixture
async def eager(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A pool that writes a snapshot behind every commit that allows one."""
    monkeypatch.setattr(snapshots, "BUDGET_SHARE", 1e9)
    monkeypatch.setattr(snapshots, "FIXED_COST_S", 0.0)
    await cluster.restart()
    return cluster


def backward(seq_id: int, *, run: ModelId = RUN) -> PassOp:
    return pass_op(seq_id, model_id=run, datums=[datum(seed=seq_id)])


async def weights(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    """What the run's present weights give on one fixed datum: the weights themselves, as far as anybody can see."""
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


async def both(cluster: Cluster) -> None:
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))


async def step_metrics(cluster: Cluster, request_id: RequestId) -> dict[str, float]:
    metrics: dict[str, float] = json.loads(await cluster.result(request_id))["metrics"]
    return metrics


async def newest(cluster: Cluster, run: ModelId = RUN) -> tuple[SnapshotRecord, ...]:
    return await cluster.store.snapshots.newest(run)


async def registered_at(cluster: Cluster, seq_id: int, run: ModelId = RUN) -> SnapshotRecord:
    """The run's newest snapshot, as soon as it is the one behind `seq_id`."""
    async with asyncio.timeout(20):
        while (found := await newest(cluster, run))[0].seq_id != seq_id:  # noqa: ASYNC110 (nobody is told of a snapshot)
            await asyncio.sleep(0.005)
    return found[0]


async def test_1_a_snapshot_that_was_never_registered_is_no_state(eager: Cluster) -> None:
    """It is durable, but its worker dies before anybody hears of it: older state, and what is behind it runs again."""
    await both(eager)
    eager.faults.plan(PlannedFault(Moment.SNAPSHOT_DURABLE, Fault.DEATH, RUN))
    for run in (RUN, OTHER):
        await eager.run(backward(1, run=run), step_op(2, model_id=run))
    (stepped,) = (await eager.submit(backward(3), step_op(4)))[1:]
    assert (await step_metrics(eager, stepped))["num_steps"] == 2
    assert eager.faults.num_left == 0
    await eager.run(backward(3, run=OTHER), step_op(4, model_id=OTHER))
    assert await weights(eager, 5) == await weights(eager, 5, run=OTHER)


@pytest.mark.parametrize("moment", [Moment.CYCLE_TAKEN, Moment.OP_DONE, Moment.CYCLE_DONE])
async def test_1_a_step_that_was_applied_and_not_committed_is_applied_once(cluster: Cluster, moment: Moment) -> None:
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run))
    cluster.faults.plan(PlannedFault(moment, Fault.DEATH, RUN))
    passed, stepped = await cluster.submit(backward(3), step_op(4))
    undisturbed, _ = await cluster.run(backward(3, run=OTHER), step_op(4, model_id=OTHER))
    assert await cluster.result(passed) == undisturbed
    assert (await step_metrics(cluster, stepped))["num_steps"] == 2
    assert await weights(cluster, 5) == await weights(cluster, 5, run=OTHER)
    assert cluster.faults.num_left == 0


class Held(FakeExecutor):
    """Its first cycle with a step waits for `go`, after it ran."""

    reached = asyncio.Event()
    go = asyncio.Event()

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        if any(item.planned.request_id == f"{RUN}:4" for item in work.items):
            type(self).reached.set()
            await type(self).go.wait()
        return outcome


async def test_2_of_two_leaders_only_the_newer_one_applies_an_op(cluster: Cluster) -> None:
    Held.reached, Held.go = asyncio.Event(), asyncio.Event()
    cluster.new_worker = Held
    await cluster.restart()
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run))
    _, stepped = await cluster.submit(backward(3), step_op(4))
    await Held.reached.wait()
    old, old_task = cluster.runner, cluster._task
    old._standby._holder = "somebody else, from now on"
    cluster.new_worker = FakeExecutor
    cluster.start()
    assert (await step_metrics(cluster, stepped))["num_steps"] == 2
    Held.go.set()
    await cluster.run(backward(5), step_op(6))
    assert old._crew is None, "it stands by"
    old.drain()
    assert old_task is not None
    await old_task
    await cluster.run(backward(3, run=OTHER), step_op(4, model_id=OTHER))
    await cluster.run(backward(5, run=OTHER), step_op(6, model_id=OTHER))
    assert await weights(cluster, 7) == await weights(cluster, 7, run=OTHER)


class HalfApplied(FakeExecutor):
    """Request 3 of RUN breaks after it was half applied: the worker drops the state and says that it failed."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        broken = [one for one in outcome.outcomes if one.request_id == f"{RUN}:3"]
        if not broken:
            return outcome
        await self.evict([RUN])
        failure = Failure("internal error", Category.SERVER)
        ends = tuple(
            replace(one, result=None, encoded=None, failure=failure, tag_after=None) if one in broken else one
            for one in outcome.outcomes
        )
        return replace(outcome, outcomes=ends)


async def test_3_a_restore_is_the_roll_back_of_a_half_applied_op(cluster: Cluster) -> None:
    cluster.new_worker = HalfApplied
    await cluster.restart()
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run))
    (broken,) = await cluster.submit(backward(3))
    assert (await cluster.failure(broken)).category is Category.SERVER
    await cluster.refuse(OTHER, 3)
    stepped = [(await cluster.submit(backward(4, run=run), step_op(5, model_id=run)))[1] for run in (RUN, OTHER)]
    metrics = [await step_metrics(cluster, request_id) for request_id in stepped]
    assert metrics[0] == metrics[1]
    assert metrics[0]["skipped_passes"] == 1
    assert await weights(cluster, 6) == await weights(cluster, 6, run=OTHER)


async def test_4_snapshots_wait_for_the_step_and_open_passes_are_replayed(eager: Cluster) -> None:
    await both(eager)
    for run in (RUN, OTHER):
        await eager.run(backward(1, run=run), step_op(2, model_id=run))
        await registered_at(eager, 2, run)
        await eager.run(backward(3, run=run))
        await eager.run(backward(4, run=run))
    assert (await newest(eager))[0].seq_id == 2
    eager.worker.die("killed")
    stepped = [(await eager.submit(step_op(5, model_id=run)))[0] for run in (RUN, OTHER)]
    assert await step_metrics(eager, stepped[0]) == await step_metrics(eager, stepped[1])
    assert await weights(eager, 6) == await weights(eager, 6, run=OTHER)


async def test_4_a_gradient_that_has_grown_too_long_is_part_of_the_snapshot(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run), backward(3, run=run))
    monkeypatch.setattr(snapshots, "MAX_REPLAY_BYTES", 1)
    (loop,) = cluster.loops()
    assert loop is not None
    loop._snapshotter._budget._max_replay_bytes = 1
    await cluster.run(backward(4))
    await cluster.run(backward(4, run=OTHER))
    await registered_at(cluster, 4)
    cluster.worker.die("killed")
    await cluster.run(step_op(5), step_op(5, model_id=OTHER))
    assert await weights(cluster, 6) == await weights(cluster, 6, run=OTHER)


@pytest.mark.parametrize("with_optimizer", [True, False])
async def test_5_a_load_is_never_replayed_and_outlives_its_checkpoint(cluster: Cluster, with_optimizer: bool) -> None:
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run), SaveWeightsOp(run, 3, name="a"))
        await cluster.run(backward(4, run=run), step_op(5, model_id=run))
        path = str(TinkerPath(run, CheckpointKind.TRAINING, "a"))
        found = await cluster.store.checkpoints.find(path)
        assert found is not None
        load = LoadWeightsOp(run, 6, path, found.blob_key, LoraSpec(rank=8, seed=7), with_optimizer, False)
        await cluster.run(load, backward(7, run=run))
    path = str(TinkerPath(RUN, CheckpointKind.TRAINING, "a"))
    assert await cluster.store.checkpoints.delete(path)
    assert (await newest(cluster))[0].with_optimizer is with_optimizer
    await cluster.crash()
    cluster.start()
    stepped = [(await cluster.submit(step_op(8, model_id=run)))[0] for run in (RUN, OTHER)]
    first, second = [await step_metrics(cluster, request_id) for request_id in stepped]
    assert first == second
    assert first["num_steps"] == (2 if with_optimizer else 1)
    assert await weights(cluster, 9) == await weights(cluster, 9, run=OTHER)


async def test_6_a_version_that_was_answered_is_durable_and_never_made_again(cluster: Cluster) -> None:
    session_id = SamplingSessionId("session:sample:1")
    await both(cluster)
    await cluster.run(backward(1), step_op(2), SaveForSamplerOp(RUN, 3, sampling_session_id=session_id))
    session = await cluster.store.sampling.get(session_id)
    assert session is not None
    assert session.blob_key is not None
    op = replace(sample_op(1, seed=5, max_tokens=8), sampling_session_id=session_id, blob_key=session.blob_key)
    expected = await cluster.result(await cluster.submit_sample(op))
    num_versions = len(list(cluster.blobs.iter_keys("states/")))
    await cluster.restart()
    await cluster.run(backward(4), step_op(5))
    assert len(list(cluster.blobs.iter_keys("states/"))) == num_versions
    assert await cluster.result(await cluster.submit_sample(replace(op, seq_id=2))) == expected


async def test_7_a_run_that_was_put_away_comes_back_as_it_was(cluster: Cluster) -> None:
    """What a move will do: snapshot, register, evict, restore."""
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run), backward(3, run=run))
    (loop,) = cluster.loops()
    assert loop is not None
    loop.park_cold([RUN])
    snapshot = await registered_at(cluster, 3)
    assert snapshot.blob_key is not None
    await cluster.run(step_op(4), step_op(4, model_id=OTHER))
    assert (await cluster.model(RUN)).incarnation == 2
    assert (await cluster.model(OTHER)).incarnation == 1
    assert await weights(cluster, 5) == await weights(cluster, 5, run=OTHER)


class Poisoned(FakeExecutor):
    """Dies of one request, whoever is beside it."""

    poison = f"{RUN}:3"

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(item.planned.request_id == type(self).poison for item in work.items):
            self.die("poison")
        return await super().run_cycle(work)


async def test_8_poison_fails_alone_and_innocents_in_its_cycle_do_not(cluster: Cluster) -> None:
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run))
    await cluster.drain()
    cluster.new_worker = Poisoned
    poison, _, innocent, stepped = await cluster.submit(
        backward(3), step_op(5), backward(3, run=OTHER), step_op(4, model_id=OTHER)
    )
    (behind,) = await cluster.submit(backward(4))
    cluster.start()
    failure = await cluster.failure(poison)
    assert (failure.category, failure.message) == (Category.SERVER, "this request ended its worker 3 times")
    for request_id in (innocent, stepped, behind):
        await cluster.result(request_id)
    # It died in company, then alone as often as it takes, and never again.
    assert len(cluster.executors) <= 1 + 1 + 4 + 1


class PoisonedReplay(FakeExecutor):
    """Dies of request 1 of RUN when it is run again."""

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(restore.model_id == RUN for restore in work.restores):
            self.die("poison")
        return await super().run_cycle(work)


async def test_8_poison_in_a_replay_ends_its_run_only(cluster: Cluster) -> None:
    await both(cluster)
    await cluster.run(backward(1), SaveWeightsOp(RUN, 2, name="safe"), step_op(3))
    await cluster.run(backward(1, run=OTHER), step_op(2, model_id=OTHER))
    expected = await weights(cluster, 3, run=OTHER)
    await cluster.crash()
    cluster.new_worker = PoisonedReplay
    lost, innocent = await cluster.submit(
        backward(4), pass_op(4, model_id=OTHER, datums=[datum(seed=0)], forward_only=True)
    )
    cluster.start()
    message = (await cluster.failure(lost)).message
    assert "3 times" in message
    assert str(TinkerPath(RUN, CheckpointKind.TRAINING, "safe")) in message
    assert (await cluster.model(RUN)).state is ModelState.LOST
    assert await cluster.result(innocent) == expected


async def test_8_a_hang_is_a_death(cluster: Cluster) -> None:
    await both(cluster)
    cluster.faults.plan(PlannedFault(Moment.OP_DONE, Fault.HANG, RUN))
    (passed,) = await cluster.submit(backward(1))
    async with asyncio.timeout(20):
        while cluster.faults.num_left:  # noqa: ASYNC110 (a hang tells nobody)
            await asyncio.sleep(0.005)
    cluster.worker.die("no progress for 60 s")
    await cluster.result(passed)


class Noting(FakeExecutor):
    """Notes the parts of split passes, and dies after the first part of the first one."""

    parts: list[tuple[int, int]]
    snapshots_between: int
    has_died: bool

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        cls = type(self)
        cls.parts += [
            (item.planned.quantum_start, item.planned.quantum_stop)
            for item in work.items
            if item.planned.request_id == f"{RUN}:3"
        ]
        if any(one.is_partial for one in outcome.outcomes) and not cls.has_died:
            cls.has_died = True
            self.die("between two parts")
        return outcome

    async def snapshot(self, targets: Sequence[Any], *, with_open_gradient: bool = False) -> Any:
        # Nothing of RUN is open outside of a part, so a request for it could only come between two.
        type(self).snapshots_between += sum(tag.model_id == RUN and tag.applied_seq > 2 for tag, _ in targets)
        return await super().snapshot(targets, with_open_gradient=with_open_gradient)


async def test_9_a_split_pass_starts_again_from_its_first_part(eager: Cluster) -> None:
    Noting.parts, Noting.snapshots_between, Noting.has_died = [], 0, False
    await both(eager)
    for run in (RUN, OTHER):
        await eager.run(backward(1, run=run), step_op(2, model_id=run))
    split = [datum(num_tokens=2048, seed=index) for index in range(3)]
    (undisturbed,) = await eager.run(pass_op(3, model_id=OTHER, datums=split))
    await eager.drain()
    eager.new_worker = Noting
    eager.settings = replace(SETTINGS, budget_tokens=2048)
    eager.start()
    (passed,) = await eager.run(pass_op(3, datums=split))
    assert passed == undisturbed
    assert Noting.parts == [(0, 1), (0, 1), (1, 2), (2, 3)]
    assert Noting.snapshots_between == 0
    await eager.run(step_op(4), step_op(4, model_id=OTHER))
    assert await weights(eager, 5) == await weights(eager, 5, run=OTHER)


def damage(blobs: BlobStore, key: BlobKey | None) -> None:
    """Replace a blob by something that no worker takes for one."""
    assert key is not None
    blobs.delete(key)
    blobs.write(key, b"not a snapshot")


async def test_10_a_damaged_snapshot_falls_back_to_the_one_before(cluster: Cluster) -> None:
    await both(cluster)
    for run in (RUN, OTHER):
        await cluster.run(backward(1, run=run), step_op(2, model_id=run), SaveWeightsOp(run, 3, name="a"))
        await cluster.run(backward(4, run=run), step_op(5, model_id=run), SaveWeightsOp(run, 6, name="b"))
        await cluster.run(backward(7, run=run))
    damage(cluster.blobs, (await newest(cluster))[0].blob_key)
    await cluster.restart()
    await cluster.run(step_op(8), step_op(8, model_id=OTHER))
    assert [snapshot.seq_id for snapshot in await newest(cluster)] == [3]
    assert await weights(cluster, 9) == await weights(cluster, 9, run=OTHER)


async def test_10_with_both_snapshots_damaged_the_run_says_so(cluster: Cluster) -> None:
    await both(cluster)
    await cluster.run(backward(1), step_op(2), SaveWeightsOp(RUN, 3, name="a"))
    # From here on "a" is no snapshot any more, but a checkpoint all the same.
    cluster.clock.advance(1.0)
    await cluster.run(backward(4), step_op(5), SaveWeightsOp(RUN, 6, name="b"))
    cluster.clock.advance(1.0)
    await cluster.run(SaveWeightsOp(RUN, 7, name="c"), backward(8))
    for snapshot in await newest(cluster):
        damage(cluster.blobs, snapshot.blob_key)
    await cluster.restart()
    (first,) = await cluster.submit(step_op(9))
    failure = await cluster.failure(first)
    assert failure.category is Category.SERVER
    assert str(TinkerPath(RUN, CheckpointKind.TRAINING, "a")) in failure.message
    assert (await cluster.model(RUN)).state is ModelState.LOST
    await cluster.run(backward(1, run=OTHER))


async def test_10_a_damaged_load_never_brings_back_what_was_before_it(cluster: Cluster) -> None:
    await both(cluster)
    await cluster.run(backward(1), step_op(2), SaveWeightsOp(RUN, 3, name="a"), backward(4), step_op(5))
    found = await cluster.store.checkpoints.find(str(TinkerPath(RUN, CheckpointKind.TRAINING, "a")))
    assert found is not None
    key = BlobKey("states/copy.npz")
    cluster.blobs.write(key, cluster.blobs.read(found.blob_key))
    await cluster.run(LoadWeightsOp(RUN, 6, found.tinker_path, key, LoraSpec(rank=8, seed=7), True, False))
    await cluster.run(backward(7))
    damage(cluster.blobs, key)
    await cluster.restart()
    (passed,) = await cluster.submit(step_op(8))
    assert found.tinker_path in (await cluster.failure(passed)).message
