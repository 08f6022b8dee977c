"""One pool: its lease, its worker and the two loops that feed it, kept alive until the server drains.

A worker that dies is replaced; runs whose exact state survives in a snapshot are restored by the cycle loop, the
others say that they are lost. A lease that is lost ends the pool here: another leader has it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treadle.blobs import BlobStore
from treadle.domain.ids import PoolName
from treadle.domain.ops import OpKind
from treadle.domain.outcome import PoolFacts
from treadle.errors import ConfigError, Fenced, ServerError, WorkerDied
from treadle.executor.base import DeathCallback, Executor
from treadle.scheduler.cycle_loop import CycleLoop, CycleSettings
from treadle.scheduler.lease import acquire_lease, keep_lease
from treadle.scheduler.sampling_loop import SamplingLoop
from treadle.store import Store
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Pause before a dead worker is replaced: the first time at once, then doubling up to the last value.
RESTART_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0)
# A worker that lived this long did not die of starting: the next one gets no pause again.
STEADY_S = 60.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What readiness and the gateway see. `reason` says why it is not ready."""

    facts: PoolFacts | None
    is_ready: bool
    reason: str


class PoolRunner:
    """Runs one pool. `run` returns after `drain`, or raises what ended the pool for good."""

    def __init__(
        self,
        *,
        pool: PoolName,
        store: Store,
        blobs: BlobStore,
        make_executor: Callable[[], Executor],
        settings: CycleSettings,
        holder: str,
        lease_ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._make_executor = make_executor
        self._settings = settings
        self._holder = holder
        self._lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._status = PoolStatus(facts=None, is_ready=False, reason="waiting for the lease")
        self._cycles: CycleLoop | None = None
        self._samples: SamplingLoop | None = None
        self._draining = asyncio.Event()
        # Set once the first worker has loaded; what happens later shows in `status`.
        self.loaded = asyncio.Event()

    @property
    def status(self) -> PoolStatus:
        return self._status

    def wake(self, kind: OpKind) -> None:
        """A request of this kind was queued."""
        if kind is OpKind.SAMPLE:
            if self._samples is not None:
                self._samples.wake()
        elif self._cycles is not None:
            self._cycles.wake(kind)

    def drain(self) -> None:
        """Finish the cycle in flight, persist every run, stop the worker; `run` then returns. Idempotent."""
        self._draining.set()
        for loop in (self._cycles, self._samples):
            if loop is not None:
                loop.stop()

    async def run(self) -> None:
        """Lead the pool until drained. Raises ConfigError when the model cannot load, Fenced when the lease is lost."""
        lease = await acquire_lease(self._store, self.pool, holder=self._holder, ttl_s=self._lease_ttl_s)
        self._cycles = CycleLoop(
            pool=self.pool,
            store=self._store,
            blobs=self._blobs,
            lease=lease,
            settings=self._settings,
            metrics=self._metrics,
            clock=self._clock,
        )
        self._samples = SamplingLoop(
            pool=self.pool, store=self._store, blobs=self._blobs, lease=lease, metrics=self._metrics
        )
        keeper = asyncio.create_task(keep_lease(self._store, lease, ttl_s=self._lease_ttl_s))
        serving = asyncio.create_task(self._serve_workers())
        try:
            done, _ = await asyncio.wait({keeper, serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._status = PoolStatus(facts=self._status.facts, is_ready=False, reason="stopped")
            for task in (keeper, serving):
                task.cancel()
            await asyncio.gather(keeper, serving, return_exceptions=True)
        await self._store.leases.release(lease)

    async def _serve_workers(self) -> None:
        """One worker after another, for as long as the pool is led. Raises what ended the last one in a drain."""
        num_deaths = 0
        now = asyncio.get_running_loop().time
        while not self._draining.is_set():
            started_at = now()
            try:
                await self._serve_one()
                return
            except (ServerError, ConfigError) as death:
                # A first worker that cannot load is the operator's to mend; a later one is tried again.
                if isinstance(death, Fenced) or not (self.loaded.is_set() or isinstance(death, WorkerDied)):
                    raise
                self._metrics.worker_deaths.labels(self.pool).inc()
                self._status = PoolStatus(self._status.facts, is_ready=False, reason=death.message)
                if self._draining.is_set():
                    raise  # nothing was persisted, which must not look like a clean end
                if now() - started_at > STEADY_S:
                    num_deaths = 0
                pause_s = RESTART_PAUSES_S[min(num_deaths, len(RESTART_PAUSES_S) - 1)]
                num_deaths += 1
                log.warning("worker is replaced", pool=self.pool, reason=death.message, pause_s=pause_s)
                await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        """Wait, unless the pool drains."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._draining.wait()

    async def _serve_one(self) -> None:
        """Load a worker and feed it until the pool drains or the worker dies."""
        assert self._cycles is not None
        assert self._samples is not None
        self._status = PoolStatus(self._status.facts, is_ready=False, reason="the worker is loading its model")
        executor = self._make_executor()
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_death(reason: str) -> None:
            if not died.done():
                died.set_exception(WorkerDied(reason))

        try:
            facts = await self._started(executor, self._samples, on_death)
            if facts is None:
                return
            self._status = PoolStatus(facts, is_ready=True, reason="")
            self.loaded.set()
            log.info("pool ready", pool=self.pool, revision=facts.revision, device=facts.device, dtype=facts.dtype)
            await self._feed(executor, died)
            await self._cycles.persist(executor)
        except ConfigError as error:
            self._status = PoolStatus(None, is_ready=False, reason=error.message)
            raise
        finally:
            died.cancel()
            await executor.stop()

    async def _started(self, executor: Executor, samples: SamplingLoop, on_death: DeathCallback) -> PoolFacts | None:
        """What the executor says once its model is loaded; None when the drain came first."""
        starting = asyncio.create_task(executor.start(on_samples=samples.on_samples, on_death=on_death))
        draining = asyncio.create_task(self._draining.wait())
        either: set[asyncio.Task[Any]] = {starting, draining}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return starting.result() if starting.done() else None
        finally:
            starting.cancel()
            draining.cancel()
            await asyncio.gather(starting, draining, return_exceptions=True)

    async def _feed(self, executor: Executor, died: asyncio.Future[None]) -> None:
        """Run both loops until they were stopped. A death, or an error of either, ends both before it is raised.

        Loops are told to end rather than cancelled: a commit on its way must not be torn from its consequences.
        """
        assert self._cycles is not None
        assert self._samples is not None
        loops = [asyncio.create_task(self._cycles.run(executor)), asyncio.create_task(self._samples.run(executor))]
        ends: set[asyncio.Future[None]] = {*loops, died}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            self._cycles.abandon()
            self._samples.abandon()
            ended = await asyncio.gather(*loops, return_exceptions=True)
            if died.done():
                died.result()
            for error in ended:
                if isinstance(error, BaseException):
                    raise error
        finally:
            for task in loops:
                task.cancel()
