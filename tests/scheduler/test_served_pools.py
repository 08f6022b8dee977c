"""Which pools a server has, as operators change their minds: real runners and store, fake workers."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from scheduler_support import PATIENCE_S, SETTINGS

from treadle.blobs import BlobStore, open_blobs
from treadle.config import ModelSettings
from treadle.domain.ids import PoolName, TenantId
from treadle.domain.outcome import PoolFacts
from treadle.domain.pool_decisions import PoolState
from treadle.errors import ConfigError
from treadle.executor.base import DeathCallback, SamplesCallback
from treadle.executor.fake import FakeExecutor
from treadle.gateway.deps import PoolDirectory
from treadle.scheduler.pool import PoolRunner
from treadle.server_pools import ServedPools
from treadle.store import Store
from treadle.store.audit import Author
from treadle.store.pool_watch import PoolWatch
from treadle.telemetry.metrics import Metrics

AUTHOR = Author(TenantId("user:ops"), "user:ops")
BASE, ADDED = PoolName("lab/base"), PoolName("lab/added")
SOURCE = "lab/weights"
NOTHING = "lab/nothing"


class Worker(FakeExecutor):
    """One worker of a server. Of the source NOTHING it cannot be loaded."""

    def __init__(self, blobs: BlobStore, model: ModelSettings, server: OneServer) -> None:
        super().__init__(blobs)
        self.model = model
        self._server = server

    async def start(self, *, on_samples: SamplesCallback, on_death: DeathCallback) -> PoolFacts:
        await self._server.may_load.wait()
        if self.model.source == NOTHING:
            raise ConfigError("there is no such repository")
        facts = await super().start(on_samples=on_samples, on_death=on_death)
        self._server.running.append(self)
        return facts

    async def stop(self) -> None:
        await super().stop()
        if self in self._server.running:
            self._server.running.remove(self)


class OneServer:
    """The pools of one server on a store of its own connection."""

    def __init__(self, store: Store, blobs: BlobStore, *, name: str, models: tuple[str, ...] = (BASE,)) -> None:
        self.store = store
        self.running: list[Worker] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.watch = PoolWatch(store, every_s=0.02)

        def make_runner(model: ModelSettings, is_essential: bool) -> PoolRunner:
            return PoolRunner(
                pool=PoolName(model.name),
                store=store,
                blobs=blobs,
                make_executor=lambda _index, _role: Worker(blobs, model, self),
                settings=SETTINGS,
                holder=name,
                lease_ttl_s=1000.0,
                metrics=Metrics(CollectorRegistry()),
                clock=lambda: 0.0,
                is_essential=is_essential,
            )

        settings = [ModelSettings(name=model, source=f"{model}-source") for model in models]
        self.pools = ServedPools(models=settings, watch=self.watch, make_runner=make_runner)
        self.directory = PoolDirectory(self.pools.views, self.watch)
        self.task: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        await self.watch.start()
        await self.pools.open()
        self.task = asyncio.create_task(self.pools.run())

    async def stop(self) -> bool:
        assert self.task is not None
        self.pools.drain()
        async with asyncio.timeout(PATIENCE_S):
            is_clean = await self.task
        await self.close()
        return is_clean

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        await self.watch.stop()
        await self.store.close()

    def ready(self) -> set[PoolName]:
        return {view.name for view in self.directory.all() if view.is_ready}

    def loaded(self) -> dict[str, int]:
        """Workers by model."""
        names = [worker.model.name for worker in self.running]
        return {name: names.count(name) for name in names}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 (a status has no event)
            await asyncio.sleep(0.005)


@pytest.fixture
async def servers(sqlite_template: Path, tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """Makes servers that share one database; whatever a test leaves running is ended."""
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    made: list[OneServer] = []

    async def make(name: str = "server", *, start: bool = True, **options: object) -> OneServer:
        store = await Store.open(f"sqlite:///{tmp_path / 'test.db'}")
        server = OneServer(store, open_blobs(str(tmp_path / "blobs")), name=name, **options)  # type: ignore[arg-type]
        made.append(server)
        if start:
            await server.start()
        return server

    yield make
    for server in made:
        await server.close()


async def test_a_model_is_added_served_and_removed(servers) -> None:  # type: ignore[no-untyped-def]
    server = await servers()
    await until(lambda: server.ready() == {BASE})
    await server.store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await until(lambda: server.ready() == {BASE, ADDED})
    view = server.directory.by_name(ADDED)
    assert view is not None
    assert (view.source, view.facts is not None) == (SOURCE, True)
    await server.store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    await until(lambda: server.loaded() == {BASE: 1})
    assert server.directory.by_name(ADDED) is None
    await until(lambda: server.pools.running() == [BASE])
    assert await server.store.leases.current(ADDED) is None
    assert await server.stop()
    assert server.running == []


async def test_an_added_pool_is_there_after_a_restart_and_a_removed_one_is_not(servers) -> None:  # type: ignore[no-untyped-def]
    first = await servers()
    await first.store.pool_settings.add(AUTHOR, ADDED, SOURCE, "v2")
    await first.store.pool_settings.decide(AUTHOR, BASE, PoolState.REMOVED)
    await until(lambda: first.ready() == {ADDED})
    assert await first.stop()
    second = await servers()
    await asyncio.wait_for(second.pools.wait_served(), PATIENCE_S)
    await until(lambda: second.ready() == {ADDED})
    assert second.loaded() == {ADDED: 1}
    assert second.pools.unready() == []
    assert second.running[0].model.revision == "v2"


async def test_nobody_waits_for_a_pool_that_is_removed_before_it_served(servers) -> None:  # type: ignore[no-untyped-def]
    server = await servers(start=False)
    server.may_load.clear()
    await server.start()
    announcing = asyncio.create_task(server.pools.wait_served())
    await until(lambda: "loading" in "".join(server.pools.unready()))
    await server.store.pool_settings.decide(AUTHOR, BASE, PoolState.REMOVED)
    await asyncio.wait_for(announcing, PATIENCE_S)
    await until(lambda: server.pools.running() == [])
    assert server.pools.unready() == []


async def test_removed_while_it_loads_and_added_again_at_once(servers) -> None:  # type: ignore[no-untyped-def]
    server = await servers()
    await until(lambda: server.ready() == {BASE})
    server.may_load.clear()
    await server.store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await until(lambda: ADDED in server.pools.running())
    await server.store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    await server.store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    server.may_load.set()
    await until(lambda: server.ready() == {BASE, ADDED})
    await until(lambda: server.loaded() == {BASE: 1, ADDED: 1})


async def test_a_model_that_cannot_be_loaded_says_so_and_ends_nothing(servers) -> None:  # type: ignore[no-untyped-def]
    server = await servers()
    await server.store.pool_settings.add(AUTHOR, ADDED, NOTHING, None)

    def reason() -> str:
        view = server.directory.by_name(ADDED)
        return "" if view is None else view.reason

    await until(lambda: "no such repository" in reason())
    await until(lambda: server.ready() == {BASE})
    assert server.pools.unready() == []
    # Another source, once the first is out of the way.
    await server.store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    await server.store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await until(lambda: server.ready() == {BASE, ADDED})
    assert await server.stop()


async def test_a_model_of_the_settings_that_cannot_be_loaded_ends_the_server(servers) -> None:  # type: ignore[no-untyped-def]
    server = await servers(start=False, models=(BASE, PoolName("lab/other")))
    object.__setattr__(server.pools._models[BASE], "source", NOTHING)
    await server.start()
    await asyncio.wait_for(server.pools.failed.wait(), PATIENCE_S)
    server.pools.drain()
    assert server.task is not None
    with pytest.raises(ConfigError, match="no such repository"):
        await server.task
    assert server.running == [], "no worker outlives it"


async def test_two_servers_follow_one_decision(servers) -> None:  # type: ignore[no-untyped-def]
    """The one that is asked need not be the one that leads; neither has the other's hints."""
    first = await servers("first")
    await until(lambda: first.ready() == {BASE})
    second = await servers("second")
    await until(lambda: second.ready() == {BASE})
    await second.store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await until(lambda: first.ready() == second.ready() == {BASE, ADDED})
    assert len([worker for worker in first.running + second.running if worker.model.name == ADDED]) == 1
    await first.store.pool_settings.decide(AUTHOR, BASE, PoolState.PAUSED, "upkeep")
    for server in (first, second):
        await until(lambda server=server: server.watch.now.state_of(BASE) is PoolState.PAUSED)
        view = server.directory.by_name(BASE)
        assert view is not None
        assert (view.state, view.state_reason) == (PoolState.PAUSED, "upkeep")
    # What leads when the other one is gone is paused too.
    assert await first.stop()
    await until(lambda: second.loaded() == {BASE: 1, ADDED: 1})
    served = second.pools._served[BASE].runner
    assert served._is_paused


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_operators_do_the_last_word_counts(servers, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Random decisions, faster than servers follow: in the end what was decided last is served, by one worker each."""
    rng = random.Random(seed)
    print("seed", seed)
    first, second = await servers("first"), await servers("second")
    names = [BASE, ADDED, PoolName("lab/third")]
    wanted = {BASE: True}
    for _ in range(30):
        server, name = rng.choice((first, second)), rng.choice(names)
        if wanted.get(name):
            state = rng.choice((PoolState.REMOVED, PoolState.PAUSED, PoolState.SERVING, PoolState.DRAINING))
            await server.store.pool_settings.decide(AUTHOR, name, state)
            wanted[name] = state is not PoolState.REMOVED
        else:
            await server.store.pool_settings.add(AUTHOR, name, None if name == BASE else SOURCE, None)
            wanted[name] = True
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.05)
    expected = {name for name, is_wanted in wanted.items() if is_wanted}
    await until(lambda: first.ready() == second.ready() == expected)
    await until(lambda: sorted(worker.model.name for worker in first.running + second.running) == sorted(expected))
    assert await first.stop()
    assert await second.stop()
    assert first.running == second.running == []
