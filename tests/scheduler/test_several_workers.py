"""A pool with several workers: tenants spread and move, deaths concern one worker, samples find the right one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scheduler_support import POOL, SESSION, Cluster

from treadle.blobs import BlobStore
from treadle.domain.commands import CommandKind, CommandOutcome
from treadle.domain.ids import BlobKey, ModelId, RequestId, TenantId
from treadle.domain.ops import CreateModelOp, LoraSpec, PassOp
from treadle.domain.outcome import CycleOutcome, SampleOutcome
from treadle.domain.plan import CycleWork, SampleWork
from treadle.domain.records import ModelRecord, NewRequest
from treadle.domain.roles import Role, Scale
from treadle.domain.states import ModelState
from treadle.errors import StoreUnavailable
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.scheduler import committing, cycle_loop, placement, quarantine, slot
from treadle.scheduler.cycle_loop import CycleLoop
from treadle.store.audit import Author
from treadle.testing.builders import datum, pass_op, sample_op, step_op

NUM_TENANTS = 6
NUM_STEPS = 5


def tenant(index: int) -> TenantId:
    return TenantId(f"tenant-{index}")


def run_of(index: int) -> ModelId:
    return ModelId(f"session:train:{index}")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0,))


async def create(cluster: Cluster, index: int) -> RequestId:
    """A run of a tenant of its own."""
    op = CreateModelOp(run_of(index), base_model=POOL, lora=LoraSpec(rank=8, seed=7))
    now = cluster.clock.now()
    record = ModelRecord(
        model_id=op.model_id,
        session_id=SESSION,
        tenant_id=tenant(index),
        pool=POOL,
        base_model=POOL,
        revision="fake",
        lora=op.lora,
        state=ModelState.CREATING,
        next_seq_id=0,
        created_at=now,
        last_request_at=now,
    )
    return await cluster.store.models.create(record, replace(request_of(op, 0, index), quantum_tokens=()))


def request_of(op, seq_id: int, index: int) -> NewRequest:  # type: ignore[no-untyped-def]
    from scheduler_support import _request

    return replace(_request(op), tenant_id=tenant(index))


async def submit(cluster: Cluster, index: int, *ops) -> list[RequestId]:  # type: ignore[no-untyped-def]
    return [await cluster.store.requests.enqueue(request_of(op, op.seq_id, index)) for op in ops]


async def submit_large(cluster: Cluster, index: int, op: PassOp) -> RequestId:
    """With its payload in a blob."""
    request = request_of(op, op.seq_id, index)
    key = BlobKey(f"payloads/large-{index}")
    cluster.blobs.write(key, request.payload)
    return await cluster.store.requests.enqueue(replace(request, payload=b"", payload_key=key))


async def train(cluster: Cluster, index: int, *, pause: Callable[[], float] = lambda: 0.0) -> list[bytes]:
    """A tenant's whole training: what every request of it gave."""
    await cluster.result(await create(cluster, index))
    results = []
    run = run_of(index)
    for step in range(NUM_STEPS):
        seq_id = 1 + 2 * step
        batch = [datum(seed=index + step), datum(seed=100 + index)]
        ids = await submit(
            cluster, index, pass_op(seq_id, model_id=run, datums=batch), step_op(seq_id + 1, model_id=run)
        )
        results += [await cluster.result(request_id) for request_id in ids]
        await asyncio.sleep(pause())
    last = pass_op(1 + 2 * NUM_STEPS, model_id=run, datums=[datum(seed=0)], forward_only=True)
    results += [await cluster.result(request_id) for request_id in await submit(cluster, index, last)]
    return results


class Watched(FakeExecutor):
    """Of its pool: that a run is never with two workers at once, and comes to another one only by a restore."""

    busy: ClassVar[dict[ModelId, object]] = {}
    held_by: ClassVar[dict[ModelId, object]] = {}
    # A loop takes an exception for bad luck, and tries again.
    problems: ClassVar[list[str]] = []

    async def run_cycle(self, work: CycleWork) -> CycleOutcome:
        runs = {item.planned.model_id for item in work.items}
        fresh = {item.model_id for item in work.restores} | {
            item.planned.model_id for item in work.items if item.starts_from is None
        }
        for run in runs:
            if run in self.busy:
                self.problems.append(f"{run} is with two workers")
            if run not in fresh and self.held_by.get(run) is not self:
                self.problems.append(f"{run} came without a restore")
            self.busy[run] = self.held_by[run] = self
        try:
            return await super().run_cycle(work)
        finally:
            for run in runs:
                self.busy.pop(run, None)


@pytest.fixture
def watched(cluster: Cluster) -> Iterator[None]:
    def make(blobs: BlobStore) -> FakeExecutor:
        return Watched(blobs, faults=cluster.faults)

    Watched.busy, Watched.held_by, Watched.problems = {}, {}, []
    cluster.new_worker = make
    yield
    assert Watched.held_by, "nobody was watched"
    assert Watched.problems == []


@asynccontextmanager
async def scaled(cluster: Cluster, workers: int, samplers: int = 0):  # type: ignore[no-untyped-def]
    """The cluster with so many workers."""
    await cluster.drain()
    cluster.executors.clear()
    cluster.scale = Scale(workers, samplers)
    cluster.start()
    await until(lambda: cluster.runner.status.num_workers == workers + samplers)
    yield cluster


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.01)


def homes(cluster: Cluster) -> dict[TenantId, int | None]:
    crew = cluster.runner._crew
    assert crew is not None
    home = crew._tenancy.placement.home
    return {tenant(index): home(tenant(index)) for index in range(NUM_TENANTS)}


@pytest.fixture
async def expected(cluster: Cluster, tmp_path: Path) -> list[list[bytes]]:
    """What one worker gives, in peace."""
    from scheduler_support import Cluster as Fresh

    folder = tmp_path / "alone"
    folder.mkdir()
    alone = await Fresh.open(folder)
    alone.start()
    try:
        return [await train(alone, index) for index in range(NUM_TENANTS)]
    finally:
        await alone.close()


@pytest.mark.parametrize("seed", [1, 2])
async def test_with_deaths_of_either_of_two_workers_every_op_counts_once(
    cluster: Cluster, watched: None, expected: list[list[bytes]], seed: int
) -> None:
    rng = random.Random(seed)
    async with scaled(cluster, 2):
        training = asyncio.gather(
            *(train(cluster, index, pause=lambda: rng.random() / 100) for index in range(NUM_TENANTS))
        )
        while not training.done():
            await asyncio.sleep(rng.random() / 5)
            rng.choice(cluster.executors[-2:]).die("killed")
        assert await training == expected
        assert set(homes(cluster).values()) == {0, 1}
        for index in range(NUM_TENANTS):
            assert await cluster.store.cycles.trained_tokens(tenant(index)) == NUM_STEPS * 16
        await cluster.restart()
        assert len(await cluster.store.leases.in_flight(POOL)) < 20


async def test_scaling_up_and_down_under_load_moves_tenants_and_changes_no_number(
    cluster: Cluster, watched: None, expected: list[list[bytes]]
) -> None:
    async with scaled(cluster, 1):
        training = asyncio.gather(*(train(cluster, index, pause=lambda: 0.02) for index in range(NUM_TENANTS)))
        for workers in (3, 1, 2, 1):
            await asyncio.sleep(0.15)
            cluster.runner.set_scale(Scale(workers))
            await until(lambda workers=workers: cluster.runner.status.num_workers == workers)  # type: ignore[misc]
        assert await training == expected
        await until(lambda: set(homes(cluster).values()) == {0})
        incarnations = [(await cluster.model(run_of(index))).incarnation for index in range(NUM_TENANTS)]
        assert sum(incarnations) > NUM_TENANTS, "nobody moved"


async def test_a_dead_worker_stalls_nobody_on_another(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (1000.0,))
    async with scaled(cluster, 2):
        for index in (0, 1):
            await cluster.result(await create(cluster, index))
        where = homes(cluster)
        assert {where[tenant(0)], where[tenant(1)]} == {0, 1}
        dead = where[tenant(0)]
        assert dead is not None
        cluster.executors[dead].die("killed")
        (stuck,) = await submit(cluster, 0, pass_op(1, model_id=run_of(0)))
        for request_id in await submit(cluster, 1, pass_op(1, model_id=run_of(1)), step_op(2, model_id=run_of(1))):
            await cluster.result(request_id)
        assert (await cluster.store.requests.future(stuck)).state == "queued"  # type: ignore[union-attr]
        assert cluster.runner.status.is_ready
        # One that does not come back loses its tenants.
        monkeypatch.setattr(placement, "AWAY_S", 0.0)
        await cluster.result(stuck)


async def test_a_commit_leaves_the_note_of_what_another_worker_has(cluster: Cluster) -> None:
    """Else a new leader would not suspect it."""

    class Stuck(FakeExecutor):
        async def run_cycle(self, work: CycleWork) -> CycleOutcome:
            if any(item.planned.request_id == f"{run_of(0)}:1" for item in work.items):
                await asyncio.Event().wait()
            return await super().run_cycle(work)

    cluster.new_worker = Stuck
    async with scaled(cluster, 2):
        for index in (0, 1):
            await cluster.result(await create(cluster, index))
        (stuck,) = await submit(cluster, 0, pass_op(1, model_id=run_of(0)))
        while stuck not in await cluster.store.leases.in_flight(POOL):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for request_id in await submit(cluster, 1, pass_op(1, model_id=run_of(1)), step_op(2, model_id=run_of(1))):
            await cluster.result(request_id)
        assert await cluster.store.leases.in_flight(POOL) == (stuck,)
        await cluster.crash()
        cluster.new_worker = FakeExecutor
        cluster.start()
        await cluster.result(stuck)


class Sampler(FakeExecutor):
    """Notes what it was asked to sample. is_limited: it can do nothing, and says so."""

    is_limited = False

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback):  # type: ignore[no-untyped-def]
        self.on_samples_of_slot = on_samples
        self.sampled: list[RequestId] = []
        return await super().start(on_samples=on_samples, on_death=on_death)

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        self.sampled += [sample.request_id for sample in samples]
        if self.is_limited:
            self.on_samples_of_slot([SampleOutcome(one.request_id, needs_builtin=True) for one in samples])
        else:
            super().submit_samples(samples)


async def test_samples_go_to_samplers_and_come_back_when_these_cannot(cluster: Cluster) -> None:
    roles: list[Role] = []

    def make(_index: int, role: Role) -> FakeExecutor:
        roles.append(role)
        worker = Sampler(cluster.blobs)
        cluster.executors.append(worker)
        return worker

    await cluster.drain()
    cluster.executors.clear()
    cluster.scale = Scale(1, 1)
    cluster.runner = cluster._new_runner()
    cluster.runner._make_executor = make
    running = asyncio.create_task(cluster.runner.run())
    await until(lambda: cluster.runner.status.num_workers == 2)
    assert roles == [Role.TRAINING, Role.SAMPLING]
    trainer, sampler = cluster.executors
    assert isinstance(trainer, Sampler)
    assert isinstance(sampler, Sampler)
    first = await cluster.submit_sample(sample_op(1, seed=3))
    expected = await cluster.result(first)
    assert (trainer.sampled, sampler.sampled) == ([], [first])
    sampler.is_limited = True
    second = await cluster.submit_sample(sample_op(2, seed=3))
    assert await cluster.result(second) == expected
    assert trainer.sampled == [second]
    # A sampler that dies gives its samples back, and nobody who trains notices.
    sampler.die("killed")
    third = await cluster.submit_sample(sample_op(3, seed=3))
    assert await cluster.result(third) == expected
    assert not trainer._ended.is_set()
    cluster.runner.drain()
    await running


async def test_samples_of_a_dead_worker_go_to_another(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (1000.0,))
    first = await cluster.submit_sample(sample_op(1, seed=3))
    expected = await cluster.result(first)
    async with scaled(cluster, 2):
        ids = [await cluster.submit_sample(sample_op(2 + n, seed=3)) for n in range(20)]
        await asyncio.sleep(0)
        cluster.executors[0].die("killed")
        assert [await cluster.result(request_id) for request_id in ids] == [expected] * 20


async def test_a_tenant_moves_between_requests_and_not_in_the_middle_of_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient goes along; a pass that is half done ends where it began."""
    cluster.settings = replace(cluster.settings, budget_tokens=2048)
    large = [datum(1500, seed=seed) for seed in range(4)]
    results: list[list[bytes]] = []
    for moves in (False, True):
        index = int(moves)
        async with scaled(cluster, 2):
            await cluster.result(await create(cluster, index))
            run = run_of(index)
            for request_id in await submit(cluster, index, pass_op(1, model_id=run)):
                await cluster.result(request_id)
            ids = [await submit_large(cluster, index, pass_op(2, model_id=run, datums=large))]
            home = homes(cluster)[tenant(index)]
            assert home is not None
            if moves:
                [loop] = [loop for loop in cluster.loops() if loop._slot == str(home)]
                await until(lambda loop=loop, run=run: _is_half_done(loop, run))  # type: ignore[misc]
                crew = cluster.runner._crew
                assert crew is not None
                crew._tenancy.placement._tenants[tenant(index)].target = 1 - home
                loop.wake_all()
            ids += await submit(cluster, index, step_op(3, model_id=run))
            last = pass_op(4, model_id=run, datums=[datum(seed=0)], forward_only=True)
            ids += await submit(cluster, index, last)
            results.append([await cluster.result(request_id) for request_id in ids])
            assert homes(cluster)[tenant(index)] == (1 - home if moves else home)
            assert (await cluster.model(run)).incarnation == (2 if moves else 1)
    assert results[0] == results[1]


def _is_half_done(loop: CycleLoop, run: ModelId) -> bool:
    known = loop._book.known(run)
    return known is not None and known.is_half_done


async def test_a_move_that_cannot_be_stored_is_made_later(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the run stays, and is trained where it is."""
    monkeypatch.setattr(cycle_loop, "ERROR_PAUSE_S", 0.01)
    monkeypatch.setattr(committing, "COMMIT_PATIENCE_S", 0.0)
    async with scaled(cluster, 2):
        await cluster.result(await create(cluster, 0))
        for request_id in await submit(cluster, 0, pass_op(1, model_id=run_of(0)), step_op(2, model_id=run_of(0))):
            await cluster.result(request_id)
        home = homes(cluster)[tenant(0)]
        real, num_refused = cluster.store.cycles.finish, 0

        async def away(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_refused
            if num_refused < 3:
                num_refused += 1
                raise StoreUnavailable("the database is away")
            return await real(*args, **kwargs)

        monkeypatch.setattr(cluster.store.cycles, "finish", away)
        cluster.runner.set_scale(Scale(1))
        if home == 0:
            crew = cluster.runner._crew
            assert crew is not None
            crew._tenancy.placement._tenants[tenant(0)].target = None
        for request_id in await submit(cluster, 0, pass_op(3, model_id=run_of(0)), step_op(4, model_id=run_of(0))):
            await cluster.result(request_id)
        assert num_refused == 3
        await until(lambda: homes(cluster)[tenant(0)] == 0)


async def test_what_takes_its_server_along_is_found_also_while_another_worker_is_busy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no leader ends with it alone, and the pool starts for ever."""
    monkeypatch.setattr(quarantine, "MAX_LEADER_ENDS", 3)
    ended, num_ends = asyncio.Event(), 0

    class Fatal(FakeExecutor):
        async def run_cycle(self, work: CycleWork) -> CycleOutcome:
            if any(item.planned.request_id == f"{run_of(0)}:1" for item in work.items):
                await asyncio.sleep(0.02)
                ended.set()
                await asyncio.Event().wait()
            await asyncio.sleep(0.05)
            return await super().run_cycle(work)

    cluster.new_worker = Fatal
    async with scaled(cluster, 2):
        for index in (0, 1):
            await cluster.result(await create(cluster, index))
        (poison,) = await submit(cluster, 0, pass_op(1, model_id=run_of(0)))
        ids: list[RequestId] = []

        async def keep_busy() -> None:
            for seq_id in range(1, 1000):
                ids.extend(await submit(cluster, 1, pass_op(seq_id, model_id=run_of(1), forward_only=True)))
                await asyncio.sleep(0.03)

        busy = asyncio.create_task(keep_busy())
        failure = asyncio.create_task(cluster.failure(poison))
        while not failure.done():
            ending = asyncio.create_task(ended.wait())
            await asyncio.wait([ending, failure], return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if not failure.done():
                num_ends += 1
                assert num_ends < 8
                ended.clear()
                await cluster.restart()
        assert "server ended 3 times" in (await failure).message
        assert num_ends >= 3
        busy.cancel()
        await asyncio.wait([busy])
        for request_id in ids:
            await cluster.result(request_id)


async def test_commands_and_parking_reach_the_worker_that_holds_the_run(cluster: Cluster, watched: None) -> None:
    """Whichever it is, also behind a move; of a run that nobody has, the first worker answers."""
    author = Author(TenantId("user:ops"), "user:ops (key 1)")
    async with scaled(cluster, 2):
        for index in (0, 1):
            await cluster.result(await create(cluster, index))
        crew = cluster.runner._crew
        assert crew is not None

        async def command(kind: CommandKind, index: int) -> CommandOutcome:
            command_id = await cluster.store.commands.give(author, kind, await cluster.model(run_of(index)))
            while (known := await cluster.store.commands.get(command_id)) is None or known.outcome is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return known.outcome

        for seq_id in (1, 3):
            for index in (0, 1):
                ids = await submit(
                    cluster, index, pass_op(seq_id, model_id=run_of(index)), step_op(seq_id + 1, model_id=run_of(index))
                )
                for request_id in ids:
                    await cluster.result(request_id)
                assert (await command(CommandKind.SNAPSHOT, index)).is_done
                [newest, *_] = await cluster.store.snapshots.newest(run_of(index))
                assert newest.seq_id == seq_id + 1
                assert run_of(index) in cluster.runner.resident_runs()
                outcome = await command(CommandKind.EVICT, index)
                assert outcome.is_done
                assert "the worker forgot it" in outcome.message
                assert run_of(index) not in cluster.runner.resident_runs()
            for one in crew._tenancy.placement._tenants.values():
                assert one.home is not None
                one.target = 1 - one.home
            crew.wake_all()
            await until(lambda: all(one.target is None for one in crew._tenancy.placement._tenants.values()))
        for index in (0, 1):
            await cluster.result((await submit(cluster, index, pass_op(5, model_id=run_of(index))))[0])
        cluster.runner.park_cold([run_of(0), run_of(1)])
        await until(lambda: not cluster.runner.resident_runs())
        await cluster.restart()
        assert "no worker held it" in (await command(CommandKind.EVICT, 0)).message
