"""Scaling while a worker cannot come up: somebody serves every tenant and every sample all the time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from scheduler_support import POOL, Cluster
from test_several_workers import create, homes, run_of, submit, tenant, until

from treadle.domain.ids import RequestId
from treadle.domain.outcome import PoolFacts
from treadle.domain.plan import SampleWork
from treadle.domain.roles import Role, Scale
from treadle.errors import ConfigError
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.scheduler import slot
from treadle.scheduler.quarantine import DEATHS_TO_SUSPECT_A_SAMPLE
from treadle.testing.builders import pass_op, sample_op, step_op


class Worker(FakeExecutor):
    """One of a named slot. can_load: cleared while it has to wait. sampled: what it was asked for."""

    name = ""
    can_load: asyncio.Event
    cannot_load = False
    is_stuck = False

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        self.sampled: list[RequestId] = []
        if self.cannot_load:
            raise ConfigError("there is no such device")
        await self.can_load.wait()
        return await super().start(on_samples=on_samples, on_death=on_death)

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        self.sampled += [sample.request_id for sample in samples]
        if not self.is_stuck:
            super().submit_samples(samples)


class Gates:
    """Which slots' workers cannot load now, or ever, or answer no sample, and the newest worker of each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.closed: set[str] = set()
        self.broken: set[str] = set()
        self.stuck: set[str] = set()
        self.workers: dict[str, Worker] = {}

    def make(self, index: int, role: Role) -> Worker:
        worker = Worker(self._cluster.blobs)
        worker.name = slot.slot_name(index, trains=role is not Role.SAMPLING)
        worker.can_load = asyncio.Event()
        worker.cannot_load = worker.name in self.broken
        worker.is_stuck = worker.name in self.stuck
        if worker.name not in self.closed:
            worker.can_load.set()
        self.workers[worker.name] = worker
        self._cluster.executors.append(worker)
        return worker

    def open(self, name: str) -> None:
        self.closed.discard(name)
        self.workers[name].can_load.set()


@pytest.fixture
def gates(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Gates:
    monkeypatch.setattr(slot, "RESTART_PAUSES_S", (0.0, 0.01))
    gates = Gates(cluster)
    monkeypatch.setattr(cluster, "_make_executor", gates.make)
    return gates


async def lead(cluster: Cluster, workers: int, samplers: int = 0) -> None:
    await cluster.drain()
    cluster.scale = Scale(workers, samplers)
    cluster.start()
    await until(lambda: cluster.runner.status.num_workers == workers + samplers)


async def test_the_only_worker_that_is_up_leaves_when_another_one_can_do_its_work(
    cluster: Cluster, gates: Gates
) -> None:
    """Down from two to the first one, which cannot load: the second one serves, newcomers too, until it can."""
    await lead(cluster, 2)
    for index in (0, 1):
        await cluster.result(await create(cluster, index))
    [at_1] = [index for index in (0, 1) if homes(cluster)[tenant(index)] == 1]
    gates.closed.add("0")
    gates.workers["0"].die("its device is gone")
    await until(lambda: cluster.runner.status.num_workers == 1)
    cluster.runner.set_scale(Scale(1))
    for request_id in await submit(cluster, at_1, pass_op(1, model_id=run_of(at_1)), step_op(2, model_id=run_of(at_1))):
        await cluster.result(request_id)
    await cluster.result(await create(cluster, 2))
    assert homes(cluster)[tenant(2)] == 1
    assert cluster.runner.status.is_ready
    gates.open("0")
    await until(lambda: set(homes(cluster).values()) <= {0, None})
    await until(lambda: cluster.runner.status.num_workers == 1)
    ids = await submit(cluster, at_1, pass_op(3, model_id=run_of(at_1)), step_op(4, model_id=run_of(at_1)))
    for request_id in [*ids, *await submit(cluster, 2, pass_op(1, model_id=run_of(2)))]:
        await cluster.result(request_id)
    assert await cluster.store.cycles.trained_tokens(tenant(at_1)) == 2 * 8


async def test_samples_go_on_while_the_first_sampler_of_a_pool_is_loading(cluster: Cluster, gates: Gates) -> None:
    """An engine of its own takes minutes, or never loads."""
    await lead(cluster, 1)
    gates.closed.add("s0")
    cluster.runner.set_scale(Scale(1, 1))
    await until(lambda: "s0" in gates.workers)
    first = await cluster.submit_sample(sample_op(1, seed=3))
    expected = await cluster.result(first)
    assert gates.workers["0"].sampled == [first]
    assert cluster.runner.status.is_ready
    gates.open("s0")
    await until(lambda: cluster.runner.status.num_workers == 2)
    second = await cluster.submit_sample(sample_op(2, seed=3))
    assert await cluster.result(second) == expected
    assert (gates.workers["0"].sampled, gates.workers["s0"].sampled) == ([first], [second])
    # Taken away with a sample in hand, it is given to those who train.
    gates.workers["s0"].is_stuck = True
    third = await cluster.submit_sample(sample_op(3, seed=3))
    await until(lambda: third in gates.workers["s0"].sampled)
    cluster.runner.set_scale(Scale(1))
    fourth = await cluster.submit_sample(sample_op(4, seed=3))
    assert await cluster.result(fourth) == expected
    gates.workers["s0"].die("killed while it leaves")
    assert await cluster.result(third) == expected
    await until(lambda: cluster.runner.status.num_workers == 1)


async def test_a_suspect_sample_does_not_wait_for_a_worker_that_cannot_load(cluster: Cluster, gates: Gates) -> None:
    """Where it was at its deaths there may never be a worker again."""
    await lead(cluster, 1, 1)
    gates.stuck.add("s0")
    gates.workers["s0"].is_stuck = True
    request_id = await cluster.submit_sample(sample_op(1, seed=3))
    for death in range(DEATHS_TO_SUSPECT_A_SAMPLE):
        worker = gates.workers["s0"]
        await until(lambda worker=worker: request_id in worker.sampled)  # type: ignore[misc]
        if death == DEATHS_TO_SUSPECT_A_SAMPLE - 1:
            gates.broken.add("s0")
        worker.die("killed")
        await until(lambda worker=worker: gates.workers["s0"] is not worker)  # type: ignore[misc]
    cluster.runner.set_scale(Scale(1, 2))
    await cluster.result(request_id)
    assert gates.workers["s1"].sampled == [request_id]


async def test_a_sample_that_was_cancelled_while_nobody_could_do_it_leaves_nothing(cluster: Cluster) -> None:
    await cluster.result(await cluster.submit_sample(sample_op(1, seed=3)))
    crew = cluster.runner._crew
    assert crew is not None
    samplers, request_id = crew._samples._samplers, RequestId(f"{POOL}:gone")
    samplers.give_to_builtin(request_id)
    crew._samples._drop_cancelled([request_id])
    assert not samplers._for_builtin
