"""What a recovery does beside the ten interleavings: transient trouble, broken logs, counts, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest
from scheduler_support import POOL, TENANT, Cluster

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, TinkerPath
from treadle.domain.ops import PassOp, SaveWeightsOp
from treadle.domain.outcome import CycleOutcome, Failure
from treadle.domain.plan import CycleWork
from treadle.domain.records import FinishedCycle, LeaseRecord
from treadle.domain.states import Category, ModelState
from treadle.errors import ServerError, StoreUnavailable
from treadle.executor.fake import DEFAULT_FACTS, FakeExecutor
from treadle.executor.faults import Fault, Moment, PlannedFault
from treadle.scheduler import cycle_loop, quarantine, replay, sampling_loop, slot
from treadle.store.tables import payloads
from treadle.testing.builders import datum, pass_op, sample_op, step_op

RUN = ModelId("session:train:0")
OTHER = ModelId("session:train:1")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead workers are replaced, and runs tried again, without a pause."""
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0,))
    monkeypatch.setattr(replay, "FIRST_PAUSE_S", 0.001)


def backward(seq_id: int, *, run: ModelId = RUN) -> PassOp:
    return pass_op(seq_id, model_id=run, datums=[datum(seed=seq_id)])


async def weights(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


async def both(cluster: Cluster) -> None:
    """Two runs with the same two steps behind them."""
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
        await cluster.run(backward(1, run=run), step_op(2, model_id=run), backward(3, run=run))


async def test_a_restore_that_fails_for_now_is_tried_until_it_works(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await both(cluster)
    cluster.faults.plan(PlannedFault(Moment.RESTORE_TAKEN, Fault.FAILED, RUN, times=5))
    await cluster.restart()
    # The others go on meanwhile.
    await cluster.run(step_op(4, model_id=OTHER))
    await cluster.run(step_op(4))
    assert cluster.faults.num_left == 0
    assert [record.getMessage() for record in caplog.records].count("run is restored again") == 5
    assert await weights(cluster, 5) == await weights(cluster, 5, run=OTHER)
    assert (await cluster.model(RUN)).state is ModelState.READY


async def test_a_run_waits_for_a_payload_that_cannot_be_read_now(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await both(cluster)
    (passed, key) = await cluster.submit_large(backward(4))
    await cluster.result(passed)
    await cluster.run(backward(4, run=OTHER))
    await cluster.crash()
    real, left = cluster.blobs.read, [StoreUnavailable("the disk does not answer")] * 3

    def read(wanted: str) -> bytes:
        if wanted == key and left:
            raise left.pop()
        return real(wanted)

    monkeypatch.setattr(cluster.blobs, "read", read)
    cluster.start()
    await cluster.run(step_op(5), step_op(5, model_id=OTHER))
    assert not left
    assert await weights(cluster, 6) == await weights(cluster, 6, run=OTHER)


async def test_a_queued_op_waits_for_a_blob_store_that_is_away(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await both(cluster)
    real, left = cluster.blobs.read, [StoreUnavailable("the disk does not answer")] * 3

    def read(wanted: str) -> bytes:
        if left:
            raise left.pop()
        return real(wanted)

    monkeypatch.setattr(cluster.blobs, "read", read)
    passed, _ = await cluster.submit_large(backward(4))
    await cluster.result(passed)
    assert not left
    assert (await cluster.model(RUN)).incarnation == 1


@pytest.mark.parametrize("is_large", [True, False])
async def test_a_committed_op_whose_payload_is_gone_ends_its_run(cluster: Cluster, is_large: bool) -> None:
    await both(cluster)
    await cluster.run(SaveWeightsOp(RUN, 4, name="safe"))
    if is_large:
        passed, key = await cluster.submit_large(backward(5))
        await cluster.result(passed)
        cluster.blobs.delete(key)
    else:
        await cluster.run(backward(5))
        await cluster.store._writer.run(lambda conn: conn.execute(payloads.delete()))
    await cluster.restart()
    (lost,) = await cluster.submit(step_op(6))
    failure = await cluster.failure(lost)
    assert failure.category is Category.SERVER
    assert "request 5 of its log is gone" in failure.message
    assert str(TinkerPath(RUN, CheckpointKind.TRAINING, "safe")) in failure.message
    assert (await cluster.model(RUN)).state is ModelState.LOST
    await cluster.result(await cluster.create(ModelId("session:train:2")))


class BadMemory(FakeExecutor):
    """Request 1 of RUN fails when it is run again, so many times."""

    num_failures = 0

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        outcome = await super().run_cycle(work)
        cls = type(self)
        if not cls.num_failures or not any(one.request_id == f"{RUN}:1" for one in outcome.outcomes):
            return outcome
        cls.num_failures -= 1
        failure = Failure("out of memory", Category.SERVER)
        ends = tuple(
            replace(one, result=None, encoded=None, failure=failure) if one.request_id == f"{RUN}:1" else one
            for one in outcome.outcomes
        )
        return replace(outcome, outcomes=ends)


async def test_a_committed_op_that_fails_in_a_replay_is_never_booked_as_failed(cluster: Cluster) -> None:
    await both(cluster)
    await cluster.crash()
    BadMemory.num_failures = 2
    cluster.new_worker = BadMemory
    cluster.start()
    await cluster.run(step_op(4), step_op(4, model_id=OTHER))
    assert BadMemory.num_failures == 0
    assert await weights(cluster, 5) == await weights(cluster, 5, run=OTHER)


async def test_a_run_that_cannot_be_replayed_to_its_outcomes_is_lost(cluster: Cluster) -> None:
    await both(cluster)
    expected = await weights(cluster, 4, run=OTHER)
    before = await cluster.store.requests.future(f"{RUN}:1")  # type: ignore[arg-type]
    await cluster.crash()
    BadMemory.num_failures = 3
    cluster.new_worker = BadMemory
    cluster.start()
    (lost,) = await cluster.submit(step_op(4))
    message = (await cluster.failure(lost)).message
    assert "request 1 succeeded before and failed" in message
    assert "out of memory" in message
    assert await cluster.store.requests.future(f"{RUN}:1") == before  # type: ignore[arg-type]
    assert await weights(cluster, 5, run=OTHER) == expected


async def test_a_step_reports_the_same_skipped_passes_after_a_death(cluster: Cluster) -> None:
    await both(cluster)
    too_large = pass_op(4, datums=[replace(datum(), tokens=datum().tokens + DEFAULT_FACTS.vocab_size)])
    (failed,) = await cluster.submit(too_large)
    await cluster.failure(failed)
    await cluster.refuse(RUN, 5)
    await cluster.restart()
    (stepped,) = await cluster.run(step_op(6))
    assert json.loads(stepped)["metrics"]["skipped_passes"] == 2
    await cluster.restart()
    (_, again) = await cluster.run(backward(7), step_op(8))
    assert json.loads(again)["metrics"]["skipped_passes"] == 0


async def test_a_log_longer_than_one_page_is_replayed_whole(cluster: Cluster) -> None:
    num_passes = 150
    for run in (RUN, OTHER):
        await cluster.result(await cluster.create(run))
        await cluster.submit(*(backward(seq_id, run=run) for seq_id in range(1, num_passes + 1)))
        await cluster.run(backward(num_passes + 1, run=run))
    cluster.worker.die("killed")
    await cluster.run(step_op(num_passes + 2), step_op(num_passes + 2, model_id=OTHER))
    await cluster.restart()
    seq_id = num_passes + 3
    assert await weights(cluster, seq_id) == await weights(cluster, seq_id, run=OTHER)


async def test_a_replay_counts_no_usage_and_logs_nothing_twice(cluster: Cluster) -> None:
    await both(cluster)
    used = await cluster.store.cycles.trained_tokens(TENANT)
    await cluster.restart()
    await cluster.run(step_op(4))
    assert await cluster.store.cycles.trained_tokens(TENANT) == used
    assert [entry.seq_id for entry in await cluster.store.run_log.read(RUN, 100)] == [1, 2, 3, 4]


async def test_the_run_log_says_where_the_time_went(cluster: Cluster) -> None:
    await cluster.result(await cluster.create(RUN))
    await cluster.crash()
    passed, stepped = await cluster.submit(backward(1), step_op(2))
    cluster.clock.advance(7.0)
    cluster.start()
    await cluster.result(passed)
    await cluster.result(stepped)
    first, second = await cluster.store.run_log.read(RUN, 10)
    assert (first.queued_s, first.run_s) == (pytest.approx(7.0), pytest.approx(0.0))
    assert first.cycle == second.cycle > 0


async def test_a_recovery_is_told_and_measured(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="treadle")
    await both(cluster)
    caplog.clear()
    cluster.worker.die("killed by a test")
    await cluster.run(step_op(4), step_op(4, model_id=OTHER))
    lines = [(record.getMessage(), record.treadle_fields) for record in caplog.records]  # type: ignore[attr-defined]
    told = {message: fields for message, fields in lines if message.startswith(("recovery", "run restored"))}
    started = told["recovery started"]
    assert (started["pool"], started["reason"]) == (POOL, "killed by a test")
    assert started["runs"] in (1, 2), "as many as had something queued by then"
    assert told["run restored"]["snapshot_seq"] == 0
    assert told["run restored"]["ops_to_replay"] == 3
    assert told["recovery finished"]["seconds"] >= 0
    replayed = {(f["model_id"], f["seq_id"]) for _, f in lines if f.get("phase") == "replayed"}
    assert replayed == {(run, seq_id) for run in (RUN, OTHER) for seq_id in (1, 2, 3)}
    metrics = cluster.runner._metrics.registry
    assert metrics.get_sample_value("treadle_restores_total", {"pool": POOL}) == 2
    assert metrics.get_sample_value("treadle_replayed_ops_total", {"pool": POOL}) == 6
    assert metrics.get_sample_value("treadle_recovery_seconds_count", {"pool": POOL}) == 1


class Recording(FakeExecutor):
    """Notes the requests of each cycle."""

    cycles: list[list[str]]

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        type(self).cycles.append([item.planned.request_id for item in work.items])
        return await super().run_cycle(work)


async def test_a_new_leader_runs_what_was_in_flight_one_at_a_time(cluster: Cluster) -> None:
    await both(cluster)
    cluster.faults.plan(PlannedFault(Moment.CYCLE_DONE, Fault.HANG))
    await cluster.crash()
    in_flight = await cluster.submit(backward(4), step_op(5), backward(4, run=OTHER), step_op(5, model_id=OTHER))
    cluster.start()
    async with asyncio.timeout(20):
        while cluster.faults.num_left:  # noqa: ASYNC110 (a hang tells nobody)
            await asyncio.sleep(0.005)
    booked = await cluster.store.leases.in_flight(POOL)
    assert len(booked) > 1
    await cluster.crash()
    Recording.cycles = []
    cluster.new_worker = Recording
    cluster.start()
    for request_id in in_flight:
        await cluster.result(request_id)
    for cycle in Recording.cycles:
        assert len(cycle) == 1 or not set(cycle) & set(booked)


class HangsInStepFour(FakeExecutor):
    """Never ends a cycle with one request in it, so that its server can be killed there."""

    num_taken: int

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        if any(item.planned.request_id == f"{RUN}:4" for item in work.items):
            type(self).num_taken += 1
            await asyncio.Event().wait()
        return await super().run_cycle(work)


async def test_a_request_that_takes_its_server_along_is_given_up_at_last(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the pool would start with it for ever, and nobody else would get anything."""
    monkeypatch.setattr(quarantine, "MAX_LEADER_ENDS", 3)
    await both(cluster)
    HangsInStepFour.num_taken = 0
    cluster.new_worker = HangsInStepFour
    await cluster.restart()
    (poison,) = await cluster.submit(step_op(4))
    for num_taken in (1, 2, 3):
        async with asyncio.timeout(20):
            while HangsInStepFour.num_taken < num_taken:  # noqa: ASYNC110 (a hang tells nobody)
                await asyncio.sleep(0.005)
        await cluster.restart()
    assert "server ended 3 times" in (await cluster.failure(poison)).message
    await cluster.run(step_op(5), step_op(4, model_id=OTHER))


async def test_a_commit_whose_answer_was_lost_is_not_made_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycle_loop, "ERROR_PAUSE_S", 0.0)
    await both(cluster)
    real, errors = cluster.store.cycles.finish, [ServerError("the answer was lost")]

    async def finish(lease: LeaseRecord, cycle: FinishedCycle, **_: object) -> tuple[BlobKey, ...]:
        unused = await real(lease, cycle)
        if errors and cycle.finished:
            raise errors.pop()
        return unused

    monkeypatch.setattr(cluster.store.cycles, "finish", finish)
    await cluster.run(step_op(4))
    assert not errors
    _, stepped = await cluster.run(backward(5), step_op(6))
    assert json.loads(stepped)["metrics"]["num_steps"] == 3
    await cluster.run(step_op(4, model_id=OTHER), backward(5, run=OTHER), step_op(6, model_id=OTHER))
    assert await weights(cluster, 7) == await weights(cluster, 7, run=OTHER)


class PoisonSample(FakeExecutor):
    """Dies of one sample."""

    def submit_samples(self, samples):  # type: ignore[no-untyped-def]
        super().submit_samples(samples)
        if any(sample.request_id.endswith(":7") for sample in samples):
            asyncio.get_running_loop().call_soon(self.die, "a sample")


async def test_a_poison_sample_is_given_up_and_nobody_else(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_loop, "POLL_S", 0.05)
    await both(cluster)
    await cluster.crash()
    samples = [await cluster.submit_sample(sample_op(seq_id, seed=seq_id)) for seq_id in range(1, 12)]
    (stepped,) = await cluster.submit(step_op(4))
    cluster.new_worker = PoisonSample
    cluster.start()
    failure = await cluster.failure(samples[6])
    assert "ended its worker 3 times" in failure.message
    for request_id in [*samples[:6], *samples[7:], stepped]:
        await cluster.result(request_id)
