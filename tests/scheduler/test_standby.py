"""Standing by, leading, and losing the lead: two runners on one store, and processes that fight for a lease."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from scheduler_support import PATIENCE_S, POOL, SETTINGS, Cluster

from treadle.domain.ids import ModelId
from treadle.domain.states import RequestState
from treadle.executor.fake import FakeExecutor
from treadle.scheduler.holders import is_dead_here, this_process
from treadle.scheduler.lease import Standby
from treadle.scheduler.pool import PoolRunner
from treadle.store import PoolReport, Store
from treadle.telemetry.metrics import Metrics
from treadle.testing.builders import pass_op, step_op
from treadle.testing.postgres import ThrowAwayPostgres

RUN = ModelId("session:train:0")
HERE = Path(__file__).parent


async def until(holds: object) -> None:
    """Wait for a status that no event tells of."""
    assert callable(holds)
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 (a status has no event)
            await asyncio.sleep(0.005)


def second_server(cluster: Cluster, store: Store, *, holder: str) -> PoolRunner:
    return PoolRunner(
        pool=POOL,
        store=store,
        blobs=cluster.blobs,
        make_executor=lambda _index, _role: FakeExecutor(cluster.blobs),
        settings=SETTINGS,
        holder=holder,
        lease_ttl_s=1000.0,
        metrics=Metrics(CollectorRegistry()),
        clock=cluster.clock.now,
    )


async def test_a_standby_shows_what_the_leader_reports_and_leads_when_it_is_gone(
    cluster: Cluster, tmp_path: Path
) -> None:
    await cluster.result(await cluster.create(RUN))
    store = await Store.open(f"sqlite:///{tmp_path / 'test.db'}", clock=cluster.clock.now)
    other = second_server(cluster, store, holder="other")
    running = asyncio.create_task(other.run())
    async with asyncio.timeout(PATIENCE_S):
        await other.served.wait()
    assert other.status.facts == cluster.runner.status.facts
    assert not other.loaded.is_set(), "it loaded a model that it does not serve"

    await cluster.drain()
    async with asyncio.timeout(PATIENCE_S):
        await other.loaded.wait()
    await until(lambda: other.status.is_ready)
    # The clients' gateway is the other server's now: without notifications the first one would only see its own rows.
    first, cluster.store, cluster.runner = cluster.store, store, other
    await cluster.run(pass_op(1, model_id=RUN), step_op(2, model_id=RUN))
    other.drain()
    await running
    await first.close()


async def test_a_standby_ends_at_once_when_it_drains(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.result(await cluster.create(RUN))
    store = await Store.open(f"sqlite:///{tmp_path / 'test.db'}", clock=cluster.clock.now)
    other = second_server(cluster, store, holder="other")
    running = asyncio.create_task(other.run())
    await other.served.wait()
    other.drain()
    async with asyncio.timeout(1.0):
        await running
    await store.close()


async def test_a_lost_lease_ends_the_lead_without_another_write(cluster: Cluster) -> None:
    """And the pool stands by: it leads again when the other one lets go."""
    await cluster.result(await cluster.create(RUN))
    stolen = await cluster.store.leases.acquire(POOL, "thief", 1000.0, instead_of="test")
    assert stolen is not None
    (queued,) = await cluster.submit(pass_op(1, model_id=RUN))
    await until(lambda: not cluster.runner.status.is_ready)
    future = await cluster.store.requests.future(queued)
    assert future is not None
    assert future.state is RequestState.QUEUED
    await cluster.store.leases.release(stolen)
    await cluster.result(queued)
    assert len(cluster.executors) == 2, "it went on with a worker whose states nobody vouches for"


@pytest.mark.postgres
async def test_after_an_outage_the_leader_that_lives_renews_first(
    postgres: ThrowAwayPostgres, postgres_url: str
) -> None:
    """Else every restart of the database would cost the standby's loading of the model."""
    ttl_s = 2.0
    leading, standing_by = await Store.open(postgres_url), await Store.open(postgres_url)
    lease = await leading.leases.acquire(POOL, "leader", ttl_s)
    assert lease is not None
    renewal = leading.leases.keep(lease, ttl_s)
    reports: list[PoolReport] = []
    standby = Standby(standing_by, POOL, holder="standby", ttl_s=ttl_s, on_report=reports.append)
    waiting = asyncio.create_task(standby.lease())
    await until(lambda: reports and reports[-1].holder == "leader")
    await asyncio.to_thread(postgres.stop)
    try:
        await until(lambda: "does not answer" in reports[-1].reason)
        # The lease ends meanwhile.
        await asyncio.sleep(ttl_s)
    finally:
        await asyncio.to_thread(postgres.start)
    await until(lambda: reports[-1].holder == "leader")
    assert not waiting.done()
    standby.stop()
    assert await waiting is None
    await renewal.stop()
    await leading.close()
    await standing_by.close()


def test_only_a_process_that_ran_here_and_ended_is_dead() -> None:
    own = this_process()
    assert not is_dead_here(own)
    host, machine, pid, _, nonce = own.split(" ")
    say_name = "from treadle.scheduler.holders import this_process; print(this_process(), flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", say_name], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        assert len(name.split(" ")) == 5
        assert not is_dead_here(name)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_dead_here(name), "a process that ended and was not reaped yet"
    assert is_dead_here(name)
    assert is_dead_here(" ".join((host, machine, pid, "1", nonce))), "another process has its number now"
    # Of what cannot be known, nothing is said.
    other_machine = " ".join((host, "elsewhere/1", name.split(" ")[2], "1", nonce))
    for unknown in ("", "test", "a b c d e", other_machine):
        assert not is_dead_here(unknown), unknown


@pytest.mark.postgres
def test_two_processes_fight_for_a_lease_and_nothing_is_applied_twice(postgres_url: str) -> None:
    """Each leads whenever it can, steals when it pleases, and adds to a counter in fenced writes only.

    A write of a leader that was fenced off in between would be missing, or would be there twice.
    """
    fighters = [
        subprocess.Popen(
            [sys.executable, str(HERE / "fight_for_lease.py"), postgres_url, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    for fighter in fighters:
        assert fighter.stdout is not None
        assert fighter.stdout.readline() == "here\n"
    for fighter in fighters:
        assert fighter.stdin is not None
        fighter.stdin.write("\n")
        fighter.stdin.flush()
    said = [fighter.communicate(timeout=60)[0].split() for fighter in fighters]
    assert all(fighter.returncode == 0 for fighter in fighters)
    written = sum(int(words[0]) for words in said)
    refused = sum(int(words[1]) for words in said)
    assert refused > 0, "nobody was ever fenced off: this proved nothing"

    async def counted() -> int:
        store = await Store.open(postgres_url)
        cycle = (await store.leases.acquire(POOL, "judge", 60.0, instead_of="a fighter")).cycle  # type: ignore[union-attr]
        await store.close()
        return cycle

    assert asyncio.run(counted()) == written
