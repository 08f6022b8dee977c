"""Which pools this server has at the moment: those of its settings and those that operators added, less what they
removed.

It follows the operators' decisions, starts a runner for what is wanted and drains what is not, and refuses to know how
a pool is led. Invariants: of one pool there is one runner at a time; only a pool that the server was started with can
end the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from treadle.config import ModelSettings
from treadle.domain.ids import ModelId, PoolName
from treadle.domain.ops import OpKind
from treadle.domain.pool_decisions import PoolState
from treadle.domain.roles import Scale
from treadle.errors import ConfigError, ServerError, StoreUnavailable
from treadle.gateway.deps import PoolView
from treadle.scheduler.crew import CrewCounts
from treadle.scheduler.pool import PoolRunner
from treadle.store.pool_watch import PoolWatch
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Served:
    """One pool with its runner. directory: of a local model, looked up once, for it is a question to a disk.

    is_essential: the server was started with it. is_leaving: it drains, and nobody waits for it any more.
    """

    model: ModelSettings
    runner: PoolRunner
    directory: str | None
    is_essential: bool
    task: asyncio.Task[None] | None = None
    is_leaving: bool = False

    def leave(self) -> None:
        self.is_leaving = True
        self.runner.drain()
        self.runner.served.set()


class ServedPools:
    """See the module. `open`, then `run` until `drain`.

    make_runner: for a model, and whether the server cannot do without it.
    """

    def __init__(
        self,
        *,
        models: Sequence[ModelSettings],
        watch: PoolWatch,
        make_runner: Callable[[ModelSettings, bool], PoolRunner],
        scale_of: Callable[[ModelSettings], Scale] = lambda _: Scale(),
    ) -> None:
        """scale_of: how many workers a pool has as long as operators say nothing else."""
        self._models = {PoolName(model.name): model for model in models}
        self._watch = watch
        self._make_runner = make_runner
        self._scale_of = scale_of
        self._served: dict[PoolName, _Served] = {}
        self._news = asyncio.Event()
        self._is_draining = False
        self._is_cut_off = False
        self._failure: BaseException | None = None
        # Set once something ended that the server cannot do without.
        self.failed = asyncio.Event()

    async def open(self) -> None:
        """Know the pools that are wanted now, with what their leaders reported last. Raises StoreUnavailable."""
        for pool, model in self._wanted().items():
            if (first := self._models.get(pool)) is not None and model != first:
                log.warning(
                    "a pool of the settings was added with another source at run time, which is used",
                    pool=pool,
                    source=model.source,
                    ignored=first.source,
                )
            served = self._served[pool] = self._new(model, is_essential=model == first)
            await served.runner.recall(served.directory)
        self._watch.on_change(self._news.set)

    async def run(self) -> bool:
        """Serve what is wanted until drained; whether every pool ended in order. Raises what ended an essential one."""
        try:
            while True:
                self._news.clear()
                self._reconcile()
                running = {served.task for served in self._served.values() if served.task is not None}
                if self._is_draining and not running:
                    break
                news = asyncio.create_task(self._news.wait())
                try:
                    await asyncio.wait({*running, news}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
                self._reap()
        finally:
            await self._end_all()
        if self._failure is not None:
            raise self._failure
        return not self._is_cut_off

    def drain(self) -> None:
        """Have every pool finish its cycle and persist its runs; `run` then returns. Idempotent."""
        self._is_draining = True
        for served in self._served.values():
            served.runner.drain()
        self._news.set()

    async def wait_served(self) -> None:
        """Return when every pool that the server was started with has served, or was removed."""
        for served in list(self._served.values()):
            if served.is_essential:
                await served.runner.served.wait()

    def running(self) -> list[PoolName]:
        """The pools that have not ended."""
        return list(self._served)

    def wake(self, pool: PoolName, kind: OpKind) -> None:
        """A request of this kind was queued."""
        if (served := self._served.get(pool)) is not None:
            served.runner.wake(kind)

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that workers of this server hold."""
        return [run for served in self._served.values() for run in served.runner.resident_runs()]

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """Have those of these runs that workers of this server hold leave them between cycles."""
        model_ids = list(model_ids)
        for served in self._served.values():
            served.runner.park_cold(model_ids)

    def counts(self) -> dict[PoolName, CrewCounts | None]:
        """What workers of this server hold, by pool; None of those that another server leads."""
        return {pool: served.runner.count() for pool, served in self._served.items()}

    def views(self) -> list[PoolView]:
        """The pools as the gateway sees them: those of the settings in their order, then those that came later."""
        return [
            PoolView(
                name=pool,
                aliases=() if served.directory is None else (served.directory,),
                facts=served.runner.status.facts,
                is_ready=served.runner.status.is_ready,
                reason=served.runner.status.reason,
                source=served.model.source,
                revision=served.model.revision,
            )
            for pool, served in self._served.items()
        ]

    def unready(self) -> list[str]:
        """Why this server is not ready. A pool that operators added, paused or removed keeps no server from that."""
        return [
            f"pool {pool}: {served.runner.status.reason}"
            for pool, served in self._served.items()
            if served.is_essential and not served.is_leaving and not served.runner.status.is_ready
        ]

    def _wanted(self) -> dict[PoolName, ModelSettings]:
        wanted = dict(self._models)
        for pool, decision in self._watch.now.pools.items():
            if decision.state is PoolState.REMOVED:
                wanted.pop(pool, None)
            elif decision.source is not None:
                wanted[pool] = ModelSettings(name=pool, source=decision.source, revision=decision.revision)
        return wanted

    def _new(self, model: ModelSettings, *, is_essential: bool) -> _Served:
        try:
            directory = model.local_dir()
        except ConfigError:
            directory = None  # whoever leads it is told so again, and shows it
        runner = self._make_runner(model, is_essential)
        runner.set_scale(self._scale(model))
        return _Served(model, runner, None if directory is None else str(directory), is_essential)

    def _scale(self, model: ModelSettings) -> Scale:
        return self._watch.now.scale_of(PoolName(model.name), self._scale_of(model))

    def _reconcile(self) -> None:
        """Start, drain, pause and resume until things are as they are wanted."""
        wanted = self._wanted()
        for pool, served in list(self._served.items()):
            if served.model != wanted.get(pool) and not served.is_leaving:
                log.info("pool is removed", pool=pool)
                served.leave()
                if served.task is None:
                    del self._served[pool]
            served.runner.set_paused(self._watch.now.state_of(pool) is PoolState.PAUSED)
            served.runner.set_scale(self._scale(served.model))
        if self._is_draining or self._failure is not None:
            return
        for pool, model in wanted.items():
            if pool not in self._served:
                log.info("pool is added", pool=pool, source=model.source)
                self._served[pool] = self._new(model, is_essential=False)
                self._served[pool].runner.set_paused(self._watch.now.state_of(pool) is PoolState.PAUSED)
        for pool, served in self._served.items():
            if served.task is None:
                served.task = asyncio.create_task(_run(served), name=f"pool {pool}")

    def _reap(self) -> None:
        """Let go of runners that have ended. The next round starts them again if they are wanted again."""
        for pool, served in list(self._served.items()):
            if served.task is None or not served.task.done():
                continue
            del self._served[pool]
            if served.task.cancelled():
                self._is_cut_off = True
            elif (error := served.task.exception()) is not None:
                self._note_failure(pool, served, error)

    def _note_failure(self, pool: PoolName, served: _Served, error: BaseException) -> None:
        if served.is_leaving and isinstance(error, ConfigError | ServerError):
            log.warning("removed pool did not end in order; its runs are replayed", pool=pool, reason=error.message)
            return
        self._failure = self._failure or error
        self.failed.set()

    async def _end_all(self) -> None:
        tasks = [served.task for served in self._served.values() if served.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(served: _Served) -> None:
    if served.runner.status.facts is None:
        with contextlib.suppress(StoreUnavailable):
            await served.runner.recall(served.directory)
    await served.runner.run()
