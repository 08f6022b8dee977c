"""One pool on one server: led from here with a worker and the two loops that feed it, or by another server.

A worker that dies is replaced, and the cycle loop restores and replays what it held. Whoever does not lead stands by
for the lease and shows what the leader reports; a leader that lost its lease drops its worker and stands by again.
Invariant: a worker of this server runs only while its lease is believed to be held; every write proves that it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.blobs import BlobStore
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import PoolFacts
from treadle.domain.policy import Policies
from treadle.domain.records import LeaseRecord
from treadle.errors import ConfigError, Fenced, ServerError, StoreUnavailable, WorkerDied
from treadle.executor.base import DeathCallback, Executor
from treadle.scheduler.clock_settings import CycleSettings
from treadle.scheduler.commands import watch_commands
from treadle.scheduler.cycle_loop import CycleLoop
from treadle.scheduler.lease import Standby, keep_lease
from treadle.scheduler.outages import Outages
from treadle.scheduler.quarantine import Quarantine
from treadle.scheduler.sampling_loop import SamplingLoop
from treadle.scheduler.slot_report import report_slots
from treadle.store import PoolReport, Store
from treadle.store.slots import Slots
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# Pause before a dead worker is replaced: the first time at once, then doubling up to the last value.
RESTART_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0)
# A worker that lived this long, or ran a cycle, did not die of starting: the next one gets no pause again. What kills
# in a cycle is the quarantine's to find.
STEADY_S = 60.0
# Before a pool that was added at run time, and whose model could not be loaded, is tried again on this server: each try
# is a process that imports everything.
LOAD_PAUSES_S = (10.0, 30.0, 60.0, 300.0)
# How long a leader waits before it tries again to tell the other servers how its pool is.
PUBLISH_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What readiness and the gateway see. `reason` says why it is not ready.

    num_workers: that have loaded the model. num_deaths: of workers since its leader leads.
    """

    facts: PoolFacts | None
    is_ready: bool
    reason: str
    num_workers: int = 0
    num_deaths: int = 0


class PoolRunner:
    """Runs one pool. `run` returns after `drain`, or raises what ended the pool for good.

    is_essential: a model that cannot be loaded ends it; else any server tries again after a pause.
    """

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
        weights: Callable[[], Mapping[TenantId, float]] = dict,
        policies: Callable[[], Policies] = Policies,
        is_essential: bool = True,
    ) -> None:
        """policies: what operators decided, as it is known now."""
        self.pool = pool
        self._metrics = metrics
        self._store = store
        self._blobs = blobs
        self._make_executor = make_executor
        self._settings = settings
        self._holder = holder
        self._lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._weights = weights
        self._policies = policies
        self._is_essential = is_essential
        self._is_paused = False
        self._num_workers = 0
        self._num_deaths = 0
        # Of this server, since a model was loaded here: how often it could not be, and why.
        self._num_failed_loads = 0
        self._load_failure = ""
        self._status = PoolStatus(facts=None, is_ready=False, reason="waiting for the lease")
        self._status_changed = asyncio.Event()
        self._standby = Standby(store, pool, holder=holder, ttl_s=lease_ttl_s, on_report=self._show)
        self._cycles: CycleLoop | None = None
        self._samples: SamplingLoop | None = None
        self._draining = asyncio.Event()
        # Set once a worker of this server has loaded, and once the pool serves, from here or from another server;
        # what happens later shows in `status`.
        self.loaded = asyncio.Event()
        self.served = asyncio.Event()

    @property
    def status(self) -> PoolStatus:
        return self._status

    async def recall(self, source_dir: str | None) -> None:
        """Show what the last leader reported of the base model, so that requests can be admitted before it is loaded.

        source_dir: of a local model, None for one of a hub; of another directory nothing is recalled. Call it before
        `run`. Raises StoreUnavailable.
        """
        facts = (await self._store.pools.report(self.pool)).facts
        if facts is not None and source_dir in (None, facts.source_dir):
            self._set_status(facts, reason=self._status.reason)

    def wake(self, kind: OpKind) -> None:
        """A request of this kind was queued."""
        if kind is OpKind.SAMPLE:
            if self._samples is not None:
                self._samples.wake()
        elif self._cycles is not None:
            self._cycles.wake(kind)

    def resident_runs(self) -> Collection[ModelId]:
        """Runs that the worker of this server holds."""
        return () if self._cycles is None else self._cycles.resident_runs()

    def _slots(self) -> Slots:
        """What the worker of this server holds."""
        running = {} if self._samples is None else self._samples.num_running()
        return Slots(sorted(self.resident_runs()), running)

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        """Have these runs leave the worker between cycles, each once its state is durable."""
        if self._cycles is not None:
            self._cycles.park_cold(model_ids)

    def set_paused(self, is_paused: bool) -> None:
        """Plan nothing, of training and of sampling, until told otherwise; what runs is finished. Idempotent."""
        if is_paused is self._is_paused:
            return
        self._is_paused = is_paused
        log.info("pool paused" if is_paused else "pool resumed", pool=self.pool)
        if self._cycles is not None and self._samples is not None:
            self._cycles.wake_all()
            self._samples.wake()

    def drain(self) -> None:
        """Finish the cycle in flight, persist every run, stop the worker; `run` then returns. Idempotent."""
        self._draining.set()
        self._standby.stop()
        for loop in (self._cycles, self._samples):
            if loop is not None:
                loop.stop()

    async def run(self) -> None:
        """Stand by and lead, in turn, until drained. Raises ConfigError when an essential model cannot load."""
        while (lease := await self._standby.lease()) is not None:
            try:
                await self._lead(lease)
            except Fenced as error:
                log.warning("lead lost", pool=self.pool, token=lease.token, reason=error.message)
                self._set_status(self._status.facts, reason="another server leads now")
                continue
            except Exception as error:
                # Nobody need wait for it to expire: the worker is gone.
                await self._store.leases.release(lease)
                if self._is_essential or self._draining.is_set() or not isinstance(error, ConfigError | ServerError):
                    raise
                self._note_failed_load(error.message)
                continue
            await self._store.leases.release(lease)
            return

    def _note_failed_load(self, reason: str) -> None:
        """Have another server try, or this one after a pause."""
        pause_s = LOAD_PAUSES_S[min(self._num_failed_loads, len(LOAD_PAUSES_S) - 1)]
        self._num_failed_loads += 1
        self._load_failure = f"its model could not be loaded: {reason}"
        log.error("model not loaded", pool=self.pool, reason=reason, again_in_s=pause_s)
        self._standby.hold_off(pause_s)
        self._set_status(self._status.facts, reason=self._load_failure)

    async def _lead(self, lease: LeaseRecord) -> None:
        """Serve until drained. Raises Fenced when another leader took over."""
        quarantine, outages = Quarantine(), Outages(self.pool)
        self._num_workers = self._num_deaths = 0
        self._cycles = CycleLoop(
            pool=self.pool,
            store=self._store,
            blobs=self._blobs,
            lease=lease,
            settings=self._settings,
            metrics=self._metrics,
            clock=self._clock,
            quarantine=quarantine,
            outages=outages,
            weights=self._weights,
            policies=self._policies,
            is_paused=lambda: self._is_paused,
        )
        self._samples = SamplingLoop(
            pool=self.pool,
            store=self._store,
            blobs=self._blobs,
            lease=lease,
            metrics=self._metrics,
            quarantine=quarantine,
            outages=outages,
            policies=self._policies,
            is_paused=lambda: self._is_paused,
        )
        keeper = asyncio.create_task(keep_lease(self._store, lease, ttl_s=self._lease_ttl_s))
        publisher = asyncio.create_task(self._publish_forever(lease, outages))
        reporter = asyncio.create_task(report_slots(self._store, lease, self._slots))
        commands = asyncio.create_task(
            watch_commands(self._store, self.pool, outages=outages, take=self._cycles.take_commands)
        )
        serving = asyncio.create_task(self._serve_workers())
        tasks = {keeper, publisher, reporter, commands, serving}
        try:
            # Of these only the last one ends without an error.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._set_status(self._status.facts, reason="stopped")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._cycles = self._samples = None

    def _set_status(self, facts: PoolFacts | None, *, reason: str) -> None:
        """reason: why the pool is not ready; "" when it is."""
        self._status = PoolStatus(
            facts, is_ready=not reason, reason=reason, num_workers=self._num_workers, num_deaths=self._num_deaths
        )
        self._status_changed.set()
        if not reason:
            self.served.set()

    def _show(self, report: PoolReport) -> None:
        """What the leader says, while this server stands by."""
        reason = "" if report.is_ready else report.reason or "its leader is starting"
        if self._load_failure and not report.holder:
            reason = self._load_failure
        self._num_workers, self._num_deaths = report.num_workers, report.num_deaths
        self._set_status(report.facts or self._status.facts, reason=reason)

    async def _publish_forever(self, lease: LeaseRecord, outages: Outages) -> None:
        """Tell the other servers how the pool is, now and whenever that changes. Raises Fenced."""
        while True:
            self._status_changed.clear()
            status = self._status
            try:
                await self._store.pools.publish(
                    lease,
                    facts=status.facts,
                    is_ready=status.is_ready,
                    reason=status.reason,
                    num_workers=status.num_workers,
                    num_deaths=status.num_deaths,
                )
            except Fenced:
                raise
            except ServerError as error:
                if isinstance(error, StoreUnavailable):
                    outages.noticed(error)
                else:
                    log.error("pool not reported", pool=self.pool, reason=error.message)
                await asyncio.sleep(PUBLISH_PAUSE_S)
            else:
                outages.over()
                await self._status_changed.wait()

    async def _serve_workers(self) -> None:
        """One worker after another, for as long as the pool is led. Raises what ended the last one in a drain."""
        num_deaths = 0
        now = asyncio.get_running_loop().time
        assert self._cycles is not None
        while not self._draining.is_set():
            started_at, num_cycles = now(), self._cycles.num_finished
            try:
                await self._serve_one()
                return
            except (ServerError, ConfigError) as death:
                if isinstance(death, Fenced) or not self._may_replace(death):
                    raise
                self._metrics.worker_deaths.labels(self.pool).inc()
                self._num_deaths += 1
                self._cycles.note_death(death.message)
                self._set_status(self._status.facts, reason=death.message)
                if self._draining.is_set():
                    raise  # nothing was persisted, which must not look like a clean end
                if now() - started_at > STEADY_S or self._cycles.num_finished > num_cycles:
                    num_deaths = 0
                pause_s = RESTART_PAUSES_S[min(num_deaths, len(RESTART_PAUSES_S) - 1)]
                num_deaths += 1
                log.warning("worker is replaced", pool=self.pool, reason=death.message, pause_s=pause_s)
                await self._pause(pause_s)

    def _may_replace(self, death: ServerError | ConfigError) -> bool:
        """Whether another worker may do better. A first one that cannot load is the operator's to mend.

        Of an added pool neither may one that dies of loading: its model may be too large for this machine.
        """
        return self.loaded.is_set() or (isinstance(death, WorkerDied) and self._is_essential)

    async def _pause(self, pause_s: float) -> None:
        """Wait, unless the pool drains."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._draining.wait()

    async def _serve_one(self) -> None:
        """Load a worker and feed it until the pool drains or the worker dies."""
        assert self._cycles is not None
        assert self._samples is not None
        self._set_status(self._status.facts, reason="the worker is loading its model")
        executor = self._make_executor()
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_death(reason: str) -> None:
            if not died.done():
                died.set_exception(WorkerDied(reason))

        try:
            facts = await self._started(executor, self._samples, on_death)
            if facts is None:
                return
            self._num_workers, self._num_failed_loads, self._load_failure = 1, 0, ""
            self._set_status(facts, reason="")
            self.loaded.set()
            log.info("pool ready", pool=self.pool, revision=facts.revision, device=facts.device, dtype=facts.dtype)
            await self._feed(executor, facts, died)
            await self._cycles.persist(executor)
        except ConfigError as error:
            self._set_status(self._status.facts, reason=error.message)
            raise
        finally:
            self._num_workers = 0
            if not died.cancel():
                died.exception()  # one that came too late for `_feed` shows in what was asked of the worker then
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

    async def _feed(self, executor: Executor, facts: PoolFacts, died: asyncio.Future[None]) -> None:
        """Run both loops until they were stopped. A death, or an error of either, ends both before it is raised.

        Loops are told to end rather than cancelled: a commit on its way must not be torn from its consequences.
        """
        assert self._cycles is not None
        assert self._samples is not None
        loops = [
            asyncio.create_task(self._cycles.run(executor, facts)),
            asyncio.create_task(self._samples.run(executor)),
        ]
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
