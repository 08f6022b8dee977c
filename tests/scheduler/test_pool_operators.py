"""A pool under an operator's hands: paused, resumed, drained while it loads, its runs snapshotted and evicted.

A real store and a fake worker; what an operator does at an awkward moment must cost clients time only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from prometheus_client import CollectorRegistry
from scheduler_support import PATIENCE_S, POOL, SETTINGS, TENANT, Cluster

from treadle.domain.commands import CommandKind, CommandOutcome
from treadle.domain.ids import ModelId, RequestId, TenantId
from treadle.domain.limits import COMMAND_PATIENCE_S
from treadle.domain.outcome import CycleOutcome, PoolFacts
from treadle.domain.plan import CycleWork
from treadle.domain.states import RequestState
from treadle.errors import ConfigError, WorkerDied
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.executor.faults import Fault, Moment, PlannedFault
from treadle.scheduler import pool as pool_module
from treadle.scheduler.pool import PoolRunner
from treadle.store import Store
from treadle.store.audit import Author
from treadle.telemetry.metrics import Metrics
from treadle.testing.builders import datum, pass_op, sample_op, step_op

RUN = ModelId("session:train:0")
OTHER = ModelId("session:train:1")
AUTHOR = Author(TenantId("user:ops"), "user:ops (key 1)")


def backward(seq_id: int, *, run: ModelId = RUN):  # type: ignore[no-untyped-def]
    return pass_op(seq_id, model_id=run)


async def forward(cluster: Cluster, seq_id: int, *, run: ModelId = RUN) -> bytes:
    (body,) = await cluster.run(pass_op(seq_id, model_id=run, datums=[datum(seed=0)], forward_only=True))
    return body


async def until(holds: object) -> None:
    assert callable(holds)
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 (a status has no event)
            await asyncio.sleep(0.005)


async def are_queued(cluster: Cluster, request_ids: Sequence[RequestId]) -> bool:
    found = [await cluster.store.requests.future(request_id) for request_id in request_ids]
    return all(future is not None and future.state is RequestState.QUEUED for future in found)


async def give(cluster: Cluster, kind: CommandKind, run: ModelId = RUN) -> int:
    return await cluster.store.commands.give(AUTHOR, kind, await cluster.model(run))


async def outcome(cluster: Cluster, command_id: int) -> CommandOutcome:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            command = await cluster.store.commands.get(command_id)
            assert command is not None
            if command.outcome is not None:
                return command.outcome
            await asyncio.sleep(0.01)


async def command(cluster: Cluster, kind: CommandKind, run: ModelId = RUN) -> CommandOutcome:
    return await outcome(cluster, await give(cluster, kind, run))


class Counting(FakeExecutor):
    """Notes how many cycles it was asked for and what it had to forget, and can be held in the middle of a cycle."""

    num_cycles = 0
    may_go = asyncio.Event()
    evicted: ClassVar[list[ModelId]] = []

    async def evict(self, model_ids: Collection[ModelId]) -> None:
        self.evicted += model_ids
        await super().evict(model_ids)

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        type(self).num_cycles += 1
        await self.may_go.wait()
        return await super().run_cycle(work)


@pytest.fixture
async def counted(cluster: Cluster) -> type[Counting]:
    """The class of the cluster's workers from now on."""

    class Worker(Counting):
        may_go = asyncio.Event()
        evicted: ClassVar[list[ModelId]] = []

    Worker.may_go.set()
    cluster.new_worker = Worker
    await cluster.restart()
    return Worker


async def test_a_paused_pool_plans_nothing_and_resumes_where_it_was(cluster: Cluster, counted: type[Counting]) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    cluster.runner.set_paused(True)
    before = counted.num_cycles
    queued = await cluster.submit(backward(3), step_op(4))
    sample = await cluster.submit_sample(sample_op(1, seed=3))
    # A command is carried out between cycles: once this one is, the loop has been round, and passed the queue by.
    for _ in range(3):
        assert (await command(cluster, CommandKind.SNAPSHOT)).is_done
    assert await are_queued(cluster, [*queued, sample])
    assert counted.num_cycles == before
    assert cluster.runner.status.is_ready, "a pause is no fault"
    cluster.runner.set_paused(False)
    assert json.loads(await cluster.result(queued[1]))["metrics"]["num_steps"] == 2
    await cluster.result(sample)


async def test_a_pause_in_the_middle_of_a_cycle_lets_it_end(cluster: Cluster, counted: type[Counting]) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1))
    counted.may_go.clear()
    before = counted.num_cycles
    (running,) = await cluster.submit(backward(2))
    await until(lambda: counted.num_cycles == before + 1)
    cluster.runner.set_paused(True)
    (waiting,) = await cluster.submit(step_op(3))
    counted.may_go.set()
    await cluster.result(running)
    await command(cluster, CommandKind.SNAPSHOT)
    assert await are_queued(cluster, [waiting])
    assert counted.num_cycles == before + 1
    cluster.runner.set_paused(False)
    await cluster.result(waiting)


async def test_a_pause_outlives_its_leader(cluster: Cluster, counted: type[Counting]) -> None:
    """The next one is told before it leads, as servers tell their runners."""
    await cluster.create(RUN)
    await cluster.run(backward(1))
    cluster.runner.set_paused(True)
    await cluster.crash()
    (queued,) = await cluster.submit(step_op(2))
    before = counted.num_cycles
    cluster.start()
    cluster.runner.set_paused(True)
    await cluster.runner.loaded.wait()
    assert not (await command(cluster, CommandKind.SNAPSHOT)).is_done, "nothing was restored, so nothing is held"
    assert await are_queued(cluster, [queued])
    assert counted.num_cycles == before
    cluster.runner.set_paused(False)
    await cluster.result(queued)


async def test_an_evicted_run_goes_on_bit_exact(cluster: Cluster, counted: type[Counting]) -> None:
    """Also with an open gradient, and whatever it had left to replay."""
    await cluster.create(RUN)
    await cluster.create(OTHER)
    for seq_id in (1, 3, 5):
        await cluster.run(backward(seq_id), step_op(seq_id + 1))
        await cluster.run(backward(seq_id, run=OTHER), step_op(seq_id + 1, model_id=OTHER))
    await cluster.run(backward(7), backward(7, run=OTHER))
    ended = await command(cluster, CommandKind.EVICT)
    assert ended.is_done
    assert "7" in ended.message
    assert set(cluster.runner.resident_runs()) == {OTHER}
    assert counted.evicted == [RUN]
    [snapshot, *_] = await cluster.store.snapshots.newest(RUN)
    assert snapshot.seq_id == 7
    again = await command(cluster, CommandKind.EVICT)
    assert again.is_done
    assert "no worker held it" in again.message
    await cluster.run(step_op(8), step_op(8, model_id=OTHER))
    assert await forward(cluster, 9) == await forward(cluster, 9, run=OTHER)
    assert (await cluster.model(RUN)).incarnation == 2
    assert (await cluster.model(OTHER)).incarnation == 1


async def test_a_snapshot_is_registered_and_a_second_one_finds_it(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    assert (await command(cluster, CommandKind.SNAPSHOT)).is_done
    [snapshot, *_] = await cluster.store.snapshots.newest(RUN)
    assert snapshot.seq_id == 2
    again = await command(cluster, CommandKind.SNAPSHOT)
    assert again.is_done
    assert (await cluster.store.snapshots.newest(RUN))[0] == snapshot
    assert set(cluster.runner.resident_runs()) == {RUN}


async def test_a_command_whose_leader_dies_is_done_by_the_next(cluster: Cluster) -> None:
    """It dies once the state is durable and before anybody knows; the worker that comes holds nothing."""
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    expected = await forward(cluster, 3)
    cluster.faults.plan(PlannedFault(Moment.SNAPSHOT_DURABLE, Fault.HANG, RUN))
    command_id = await give(cluster, CommandKind.EVICT)
    await until(lambda: cluster.faults.num_left == 0)
    await cluster.crash()
    still = await cluster.store.commands.get(command_id)
    assert still is not None
    assert still.outcome is None
    cluster.start()
    assert (await outcome(cluster, command_id)).is_done
    assert await forward(cluster, 4) == expected


async def test_a_command_survives_the_death_of_its_worker(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    cluster.faults.plan(PlannedFault(Moment.SNAPSHOT_TAKEN, Fault.DEATH, RUN))
    ended = await command(cluster, CommandKind.SNAPSHOT)
    # The worker that held it is gone: the operator is told, and the run is as safe as it was.
    assert not ended.is_done
    assert "no worker holds it" in ended.message
    await cluster.run(backward(3), step_op(4))
    assert (await command(cluster, CommandKind.SNAPSHOT)).is_done
    assert cluster.runner.status.num_deaths == 1


async def test_a_snapshot_that_cannot_be_written_leaves_the_run_where_it_is(cluster: Cluster) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1), step_op(2))
    cluster.faults.plan(PlannedFault(Moment.SNAPSHOT_TAKEN, Fault.FAILED, RUN, times=2))
    ended = await command(cluster, CommandKind.EVICT)
    assert not ended.is_done
    assert "could not be written" in ended.message
    assert set(cluster.runner.resident_runs()) == {RUN}
    await cluster.run(backward(3), step_op(4))


async def test_a_run_without_a_state_is_refused_with_its_state(cluster: Cluster) -> None:
    await cluster.drain()
    await cluster.create(RUN)
    command_id = await give(cluster, CommandKind.EVICT)
    cluster.start()
    # Else it may have been created by the time at which the command is read.
    cluster.runner.set_paused(True)
    ended = await outcome(cluster, command_id)
    assert ended.is_done is False
    assert "creating" in ended.message


async def test_a_run_in_the_middle_of_a_pass_is_waited_for_and_then_given_up(
    cluster: Cluster, counted: type[Counting]
) -> None:
    await cluster.create(RUN)
    await cluster.run(backward(1))
    counted.may_go.clear()
    before = counted.num_cycles
    # More than one cycle's budget.
    (long,) = await cluster.submit(pass_op(2, model_id=RUN, datums=[datum(1_500, seed=seed) for seed in range(12)]))
    await until(lambda: counted.num_cycles == before + 1)
    cluster.runner.set_paused(True)
    counted.may_go.set()
    command_id = await give(cluster, CommandKind.EVICT)
    await asyncio.sleep(0.2)
    still = await cluster.store.commands.get(command_id)
    assert still is not None
    assert still.outcome is None, "the pass may still come to its end"
    cluster.clock.advance(COMMAND_PATIENCE_S + 1)
    ended = await outcome(cluster, command_id)
    assert not ended.is_done
    assert "in the middle of a pass" in ended.message
    cluster.runner.set_paused(False)
    await cluster.result(long)


class Unloadable(FakeExecutor):
    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        raise ConfigError("no config.json there")


def added_pool(cluster: Cluster, store: Store, make_executor: object, *, holder: str = "other") -> PoolRunner:
    assert callable(make_executor)
    return PoolRunner(
        pool=POOL,
        store=store,
        blobs=cluster.blobs,
        make_executor=make_executor,
        settings=SETTINGS,
        holder=holder,
        lease_ttl_s=1000.0,
        metrics=Metrics(CollectorRegistry()),
        clock=cluster.clock.now,
        is_essential=False,
    )


async def test_an_added_model_that_cannot_be_loaded_says_why_and_is_tried_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LOAD_PAUSES_S", (0.02,))
    await cluster.drain()
    workers: list[FakeExecutor] = []

    def make(*_: object) -> FakeExecutor:
        blobs = cluster.blobs
        workers.append(Unloadable(blobs) if len(workers) < 2 else FakeExecutor(blobs))
        return workers[-1]

    runner = added_pool(cluster, cluster.store, make)
    reasons: set[str] = set()

    def is_ready() -> bool:
        reasons.add(runner.status.reason)
        return runner.status.is_ready

    running = asyncio.create_task(runner.run())
    await until(is_ready)
    assert any("could not be loaded: no config.json there" in reason for reason in reasons)
    assert len(workers) == 3
    runner.drain()
    await running


async def test_an_added_model_that_one_server_lacks_is_led_by_another(cluster: Cluster, tmp_path: Path) -> None:
    """And the one that lacks it shows that it is served."""
    await cluster.drain()
    store = await Store.open(f"sqlite:///{tmp_path / 'test.db'}", clock=cluster.clock.now)
    tries: list[FakeExecutor] = []

    def fail(*_: object) -> FakeExecutor:
        tries.append(Unloadable(cluster.blobs))
        return tries[-1]

    lacking = added_pool(cluster, cluster.store, fail, holder="lacking")
    first = asyncio.create_task(lacking.run())
    await until(lambda: "could not be loaded" in lacking.status.reason)
    having = added_pool(cluster, store, lambda *_: FakeExecutor(cluster.blobs), holder="having")
    second = asyncio.create_task(having.run())
    await until(lambda: having.status.is_ready and lacking.status.is_ready)
    assert not lacking.loaded.is_set()
    assert len(tries) == 1, "whoever could not load it leaves it to others first"
    lacking.drain()
    having.drain()
    await asyncio.gather(first, second)
    await store.close()


async def test_an_added_model_that_kills_its_worker_is_left_to_others(cluster: Cluster) -> None:
    """It may be too large for this machine's memory, and each try would take that from the other models."""

    class TooLarge(FakeExecutor):
        async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
            tries.append(self)
            raise WorkerDied("the worker was killed by signal 9")

    tries: list[FakeExecutor] = []
    await cluster.drain()
    runner = added_pool(cluster, cluster.store, lambda *_: TooLarge(cluster.blobs))
    running = asyncio.create_task(runner.run())
    await until(lambda: "could not be loaded: the worker was killed by signal 9" in runner.status.reason)
    assert await cluster.store.leases.current(POOL) is None
    assert len(tries) == 1
    runner.drain()
    await running


async def test_a_pool_of_the_settings_that_cannot_be_loaded_ends_its_server(cluster: Cluster) -> None:
    await cluster.drain()
    cluster.new_worker = Unloadable
    cluster.start()
    assert cluster._task is not None
    with pytest.raises(ConfigError, match="no config"):
        await cluster._task


async def test_a_pool_that_is_removed_while_it_loads_ends_at_once(cluster: Cluster) -> None:
    class Slow(FakeExecutor):
        async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
            await asyncio.Event().wait()
            raise AssertionError

    await cluster.drain()
    runner = added_pool(cluster, cluster.store, lambda *_: Slow(cluster.blobs))
    running = asyncio.create_task(runner.run())
    await until(lambda: "loading" in runner.status.reason)
    runner.drain()
    async with asyncio.timeout(PATIENCE_S):
        await running
    assert await cluster.store.leases.current(POOL) is None, "the next leader need not wait"
    assert TENANT
